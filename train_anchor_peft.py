"""Stage 3: one LoRA adapter for each anchor user, on the task-adapted base; many are trained together.

Reads   data/<task>/user_anchor_candidate.json, profile-id2text.json, the task adapter, anchor_user_idx.pt
Writes  <output_dir>/users/<anchor>/adapter/      PEFT directory with a card
        <output_dir>/users/<anchor>/result.json   losses, and scores on the own history before and after
        <output_dir>/noise.key                    --enable_dp only: the secret behind the noise; never share it
Takes   about 2 minutes on the demo (16 anchors, 2 CPU cores). Resumes by anchor: run the same command again.

    python train_anchor_peft.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --output_dir ./output/movie_tagging/Anchor_PEFT/LoRA

--enable_dp protects every single history item (docs/privacy.md says what that covers). It trains on one record per
item, without records that quote other items, and the card then carries the guarantee, but no scores on the history.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from prime import cli
from prime.bank.batching import Pair
from prime.bank.dp import Terms, terms_of
from prime.bank.encoding import EncodedPrompt, EncodedRecord
from prime.bank.sampling import Sampler
from prime.bank.train import Learner, train, train_settings
from prime.checkpoints import plan
from prime.checkpoints.peft import save_adapter
from prime.engine import Engine, load_engine
from prime.errors import InputError
from prime.merging.sharers import add_selection, training_anchors
from prime.runs.run import Run
from prime.seeds import derive_seed
from prime.users.data import User, select
from prime.users.holdout import add_holdout, split_of, trained_records
from prime.users.metrics import score
from prime.users.prompts import Record


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--output_dir", help="default ./output/<task_name>/Anchor_PEFT/LoRA")
    parser.add_argument(
        "--anchors_per_batch", type=cli.natural, default=16, help="anchors trained together; 0 = all of them"
    )
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=True)
    cli.add_history(parser)
    add_holdout(parser, "each anchor's")
    cli.add_training(parser, lr=2e-5, clip=1.0)
    cli.add_privacy(parser)
    cli.add_history_decoding(parser)
    add_selection(parser)
    cli.add_users(parser, "anchors, counted in the order of the anchor file,")
    return parser


class Anchor:
    """One anchor in training: its records as texts and as ids, and how they are kept private."""

    def __init__(self, user: User, args: argparse.Namespace, texts: cli.Texts, engine: Engine, terms: Terms | None):
        self.user, self.name, self.held_out = user, f"anchor {user.user_id}", split_of(args).told(user)
        self.records: list[Record] = trained_records(texts, user, args.recent_k, split_of(args))
        if not self.records:
            raise InputError(f"{self.name}: an empty history, nothing to train on")
        self.encoded: list[EncodedRecord] = [engine.encoder.record(r.id, r.input, r.target) for r in self.records]
        self.seed = derive_seed("anchor", args.seed, user.user_id)
        self.mechanism = terms and terms.mechanism(
            self.name, self.seed, self.encoded, args.batch_size, args.epochs
        )
        self.privacy = {"privacy": terms.report(self.mechanism)} if terms and self.mechanism else {}

    def card(self, task: str, scores: dict) -> dict:
        """What is published with the adapter; scores of a private one would tell of its history without noise."""
        about = {"task": task, "user_id": self.user.user_id, "records": len(self.records)} | self.held_out
        return about | (self.privacy or {"scores_on_history": scores})


def train_group(args: argparse.Namespace, engine: Engine, anchors: Sequence[Anchor]) -> list[list[float | None]]:
    settings = train_settings(args)
    learners = [Learner(i, a.name, a.seed, a.encoded, a.mechanism) for i, a in enumerate(anchors)]
    engine.bank.allocate([anchor.seed for anchor in anchors], args.lora_r, args.lora_alpha)
    with cli.bar(sum(len(learner.batches(settings)) for learner in learners), "anchors", "step") as progress:
        return train(engine.bank, learners, settings, args.max_batch_tokens, progress.update)


def history_scores(args: argparse.Namespace, texts: cli.Texts, engine: Engine, anchors: Sequence[Anchor]) -> list[dict]:
    """Scores of each anchor on its own history by the base and by its adapter, which is in the bank at its place."""
    prompts = [engine.encoder.prompt(record.id, record.input) for anchor in anchors for record in anchor.records]
    owner = [place for place, anchor in enumerate(anchors) for _ in anchor.records]
    before = _texts(args, texts, engine, prompts, [(-1, index) for index in range(len(prompts))])
    after = _texts(args, texts, engine, prompts, [(place, index) for index, place in enumerate(owner)])
    reports = []
    for place, anchor in enumerate(anchors):
        own = [index for index, whose in enumerate(owner) if whose == place]
        golds = [record.target.strip() for record in anchor.records]
        by = {
            name: score(texts.task.history_metrics, [found[i] for i in own], golds, texts.task.history_labels)
            for name, found in (("before", before), ("after", after))
        }
        reports.append(by)
    return reports


def _texts(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, prompts: list[EncodedPrompt], pairs: list[Pair]
) -> dict[int, str]:
    limit = engine.limit(texts.task.history_labels, args.train_gen_len)
    found = engine.answer(prompts, pairs, Sampler(temperature=0), limit)
    return {index: engine.encoder.text(tokens) for (_, index), tokens in found.items()}


def finish_group(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, run: Run, group: Sequence[Anchor], order: dict[str, int]
) -> None:
    started = time.perf_counter()
    losses = train_group(args, engine, group)
    seconds = round((time.perf_counter() - started) / len(group), 3)
    with torch.inference_mode():
        reports = history_scores(args, texts, engine, group)
    for place, (anchor, report) in enumerate(zip(group, reports, strict=True)):
        if not run.done(anchor.user.user_id):
            folder = run.user_dir(anchor.user.user_id) / "adapter"
            card = anchor.card(args.task_name, report)
            save_adapter(engine.bank.adapter(place), folder, cli.base_name(args), card)
    run.finish_all(
        [
            {
                "user_id": anchor.user.user_id,
                "index": order[anchor.user.user_id],
                "record_ids": [record.id for record in anchor.records],
                **anchor.held_out,
                "losses": own,
                "history": report,
                **anchor.privacy,
                "seconds": {"train": seconds},
            }
            for anchor, own, report in zip(group, losses, reports, strict=True)
        ]
    )


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.plan:
        return plan.show("train_anchor_peft", args)
    texts = cli.load_texts(args)
    anchors = training_anchors(args, cli.load_candidates(args, texts.task))
    order = {user.user_id: place for place, user in enumerate(anchors)}
    folder = Path(args.output_dir or f"./output/{args.task_name}/Anchor_PEFT/LoRA")
    terms = terms_of(args, folder, cli.settings_of(args))
    run = cli.open_run(args, folder, "train_anchor_peft", "anchors")
    groups = cli.open_groups(select(anchors, args.user_idxs), args.anchors_per_batch, run.done)
    if not groups:
        return
    engine = load_engine(args, task_adapter=args.lora_ckpt)
    for group in cli.share_groups(args, run, groups):
        learners = [Anchor(user, args, texts, engine, terms) for user in group]
        finish_group(args, texts, engine, run, learners, order)


if __name__ == "__main__":
    cli.run(main)
