"""Stage 3b, for Per-Pcs only: one gate vector per LoRA module and anchor, trained with the anchor's LoRA frozen.

Reads   data/<task>/user_anchor_candidate.json, profile-id2text.json, the task adapter, anchor_user_idx.pt,
        the anchors' adapters (--anchor_path)
Writes  <output_dir>/users/<anchor>/gate.safetensors   module name -> gate [in]
        <output_dir>/users/<anchor>/result.json        losses of the steps
        <output_dir>/noise.key                         --enable_dp only: the secret behind the noise; never share it
Takes   1 to 2 minutes on the demo (16 anchors, 2 CPU cores). Resumes by anchor: run the same command again.

The input of each factor pair is scaled by sigmoid(<x, g>), g starts at 0 (Per-Pcs, Tan et al., EMNLP 2024). Here a
gate sees --epochs passes over the history, without what the adapters held out, cut at --max_step, under a cosine over
just these steps. Published code repeats the history until its step limit, with a cosine over the epochs that turns
back up behind the last of them.

    python train_anchor_gate.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt \\
        --anchor_path ./output/movie_tagging/Anchor_PEFT/LoRA --output_dir ./output/movie_tagging/Anchor_PEFT/gate

--enable_dp protects every single history item, as in train_anchor_peft.py. A gate comes on top of an adapter trained
on the same items: result.json also tells the budget of both together, or that the adapter was not trained privately.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prime import cli
from prime.bank.dp import Terms, terms_of
from prime.bank.train import Learner, train, train_settings
from prime.checkpoints import plan
from prime.checkpoints.peft import load_adapter
from prime.engine import Engine, load_engine
from prime.errors import InputError, tell
from prime.merging.gates import Gates, gate_file, save_gate
from prime.merging.sharers import adapter_folder, add_selection, training_anchors
from prime.runs.files import read_json
from prime.runs.run import Run
from prime.seeds import derive_seed
from prime.users.data import User, select
from prime.users.holdout import trained_records, trained_split


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--output_dir", help="default ./output/<task_name>/Anchor_PEFT/gate")
    parser.add_argument("--anchor_path", help="anchors' adapters; default ./output/<task_name>/Anchor_PEFT/LoRA")
    parser.add_argument(
        "--anchors_per_batch", type=cli.natural, default=16, help="anchors trained together; 0 = all of them"
    )
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=True)
    cli.add_history(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--max_step", type=cli.natural, default=50, help="steps of a gate at most; 0 = all of --epochs")
    group.add_argument("--lr", type=cli.non_negative, default=2e-5, help="learning rate at the start of the cosine")
    group.add_argument("--min_lr", type=cli.non_negative, default=0.0, help="learning rate at its end")
    group.add_argument("--weight_decay", type=cli.non_negative, default=0.0, help="of AdamW")
    group.add_argument("--clip", type=cli.non_negative, default=0.3, help="norm at most of a gate's gradient")
    group.add_argument("--batch_size", type=cli.positive, default=6, help="records of one step of a gate")
    group.add_argument("--epochs", type=cli.positive, default=3, help="passes over the records at most")
    group.add_argument("--lora_dropout", type=cli.fraction, default=0.05, help="dropout behind the gate")
    cli.add_checkpointing(group)
    cli.add_privacy(parser)
    add_selection(parser)
    cli.add_users(parser, "anchors, counted in the order of the anchor file,")
    return parser


def learner_of(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, terms: Terms | None, anchor: User, place: int
) -> Learner:
    name, seed = f"anchor {anchor.user_id}", derive_seed("gate", args.seed, anchor.user_id)
    split = trained_split(args.anchor_path)._replace(quoting=terms is None)
    records = trained_records(texts, anchor, args.recent_k, split)
    if not records:
        raise InputError(f"{name}: an empty history, nothing to train on")
    encoded = [engine.encoder.record(r.id, r.input, r.target) for r in records]
    chosen = terms and terms.mechanism(name, seed, encoded, args.batch_size, args.epochs, args.max_step)
    return Learner(place, name, seed, encoded, chosen)


def privacy_of(args: argparse.Namespace, terms: Terms | None, learner: Learner, anchor: User) -> dict:
    """The gate's guarantee, and that of the gate and the adapter it was trained on together."""
    if terms is None or learner.mechanism is None:
        return {}
    path = adapter_folder(args.anchor_path, anchor.user_id).parent / "result.json"
    adapter = read_json(path).get("privacy") if path.exists() else None
    if adapter is None:
        tell(f"{learner.name}: its adapter is not private (--enable_dp); epsilon is the gate's alone")
    return {"privacy": terms.report(learner.mechanism) | terms.together(learner.mechanism, adapter)}


def finish_group(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, run: Run, terms: Terms | None, group: Sequence[User],
    order: dict[str, int],
) -> None:  # fmt: skip
    """Train the gates of a group of anchors together and write those that are not there yet."""
    started = time.perf_counter()
    engine.bank.load([load_adapter(adapter_folder(args.anchor_path, anchor.user_id)) for anchor in group])
    gates = Gates.zeros(engine.bank)
    settings = replace(train_settings(args), max_step=args.max_step)
    learners = [learner_of(args, texts, engine, terms, anchor, place) for place, anchor in enumerate(group)]
    with cli.bar(sum(len(learner.batches(settings)) for learner in learners), "gates", "step") as bar:
        losses = train(engine.bank, learners, settings, args.max_batch_tokens, bar.update, gates.stacks, gates.scaler)
    seconds = round((time.perf_counter() - started) / len(group), 3)
    for place, anchor in enumerate(group):
        if not run.done(anchor.user_id):
            save_gate(gates.gate(place), gate_file(run.root, anchor.user_id))
    run.finish_all(
        [
            {
                "user_id": anchor.user_id,
                "index": order[anchor.user_id],
                "record_ids": [record.id for record in learner.records],
                "losses": own,
                **privacy_of(args, terms, learner, anchor),
                "seconds": {"train": seconds},
            }
            for anchor, learner, own in zip(group, learners, losses, strict=True)
        ]
    )


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.anchor_path = args.anchor_path or f"./output/{args.task_name}/Anchor_PEFT/LoRA"
    if args.plan:
        return plan.show("train_anchor_gate", args)
    texts = cli.load_texts(args)
    anchors = training_anchors(args, cli.load_candidates(args, texts.task))
    order = {user.user_id: place for place, user in enumerate(anchors)}
    folder = Path(args.output_dir or f"./output/{args.task_name}/Anchor_PEFT/gate")
    terms = terms_of(args, folder, cli.settings_of(args))
    run = cli.open_run(args, folder, "train_anchor_gate", "gates")
    groups = cli.open_groups(select(anchors, args.user_idxs), args.anchors_per_batch, run.done)
    if not groups:
        return
    engine = load_engine(args, task_adapter=args.lora_ckpt)
    for group in cli.share_groups(args, run, groups):
        finish_group(args, texts, engine, run, terms, group, order)


if __name__ == "__main__":
    cli.run(main)
