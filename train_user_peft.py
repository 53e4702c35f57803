"""Stage 4c, baselines that train on test users' own histories, many together: OPPU, and merge-then-adapt.

Reads   data/<task>/test_100/user_test_100.json (history; queries only to predict), profile-id2text.json, the task
        adapter; mta also user_anchor_candidate.json, anchor_selection/<task>/, the sharers' adapters
Writes  <output_dir>/users/<user>/adapter/      the personal adapter (PEFT, with a card)
        <output_dir>/users/<user>/result.json   losses of the steps, predictions of oppu or mta
Takes   2 to 3 minutes on the demo (24 users, 2 CPU cores). Resumes by user: run the same command again.

oppu: one LoRA per user, trained as an anchor's is (Tan et al., EMNLP 2024, "One PEFT per user").
mta:  the nearest sharers are merged, frozen, and a LoRA of small rank is trained on top (MTA, Li et al., 2025,
      arXiv 2511.20072: merge anchors, then stack an "ultra-low-rank" LoRA). The sharers' mean stands for MTA's fusion
      by similarity, rank 4 for "ultra-low", half of an anchor's 8; the training settings are the anchors'. What is
      deployed is both parts as one adapter, exactly: their factors side by side.

A user without history has nothing to train on: oppu leaves the base to him, mta the merge.

    python train_user_peft.py --method oppu --task_name movie_tagging \\
        --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --lora_ckpt ./output/movie_tagging/task-base_LLM/lora_ckpt.pt --output_dir ./output/movie_tagging/OPPU
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial

import torch

from prime import cli
from prime.bank.decode import Progress
from prime.bank.lora import Adapter, merge
from prime.bank.sampling import Sampler
from prime.bank.train import Learner, train, train_settings
from prime.checkpoints import plan
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.engine import Engine, load_engine, predict
from prime.errors import tell
from prime.merging.deploy import PERSONAL
from prime.merging.sharers import Pool, add_selection, load_pool
from prime.runs.run import Run
from prime.seeds import derive_seed
from prime.users.data import User, select
from prime.users.holdout import add_holdout, split_of, trained_records

FOLDERS = {"oppu": "OPPU", "mta": "Merge-then-adapt"}
RANKS = {"oppu": 8, "mta": 4}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--method", required=True, choices=tuple(FOLDERS), help="see above")
    parser.add_argument("--output_dir", help="default ./output/<task_name>/OPPU or Merge-then-adapt")
    parser.add_argument("--anchor_dir", help="mta: sharers' adapters; default ./output/<task_name>/Anchor_PEFT/LoRA")
    parser.add_argument("--n_sim", type=cli.natural, default=2, help="mta: most similar sharers to merge; 0 = all")
    parser.add_argument(
        "--users_per_batch", type=cli.natural, default=16, help="users trained together; 0 = all of them"
    )
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=True)
    cli.add_history(parser)
    add_holdout(parser, "each user's")
    cli.add_training(parser, lr=2e-5, clip=1.0, ranks="8 for oppu, 4 for mta")
    cli.add_decoding(parser)
    add_selection(parser)
    cli.add_users(parser, "test users")
    return parser


def learner_of(args: argparse.Namespace, texts: cli.Texts, engine: Engine, user: User, place: int) -> Learner:
    records = trained_records(texts, user, args.recent_k, split_of(args))
    if not records:
        tell(f"user {user.user_id}: an empty history, nothing to train on")
    encoded = [engine.encoder.record(r.id, r.input, r.target) for r in records]
    return Learner(place, f"user {user.user_id}", derive_seed(args.method, args.seed, user.user_id), encoded)


def merged_sharers(pool: Pool, index: int) -> Adapter:
    """The mean update of a test user's sharers."""
    adapters = pool.adapters(index)
    return merge(adapters, torch.full((len(adapters),), 1 / len(adapters)), "delta")


def train_group(
    args: argparse.Namespace, engine: Engine, learners: Sequence[Learner], under: Sequence[Adapter]
) -> list[list[float]]:
    """Losses of every user's steps; the bank then holds the users' adapters, each with its frozen one if there is."""
    settings = train_settings(args)
    engine.bank.allocate([learner.seed for learner in learners], args.lora_r, args.lora_alpha, under)
    with cli.bar(sum(len(learner.batches(settings)) for learner in learners), "users", "step") as progress:
        return train(engine.bank, learners, settings, args.max_batch_tokens, progress.update)


def choice_of(pool: Pool | None, index: int) -> dict:
    """What a user deploys, and whose adapters are in it."""
    if pool is None:
        return {"deployed": "own"}
    sharers = [sharer.user_id for sharer in pool.sharers(index)]
    return {"deployed": "merge", "sharers": sharers, "weights": [1 / len(sharers)] * len(sharers), "rule": "delta"}


def predict_user(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, run: Run, results: Sequence[dict], place: int,
    user: User, progress: Progress,
) -> None:  # fmt: skip
    """Predict with the adapter at `place` of the bank; the result file comes last."""
    started = time.perf_counter()
    sampler = Sampler(args.temperature, args.top_p, derive_seed(args.seed, user.user_id))
    found = predict(engine, texts, user, {args.method: place}, sampler, args.k_list, args.max_gen_len, progress)
    seconds = results[place]["seconds"] | {"predict": round(time.perf_counter() - started, 3)}
    run.finish(user.user_id, results[place] | {"predictions": found, "seconds": seconds})


def learn_group(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, run: Run, pool: Pool | None,
    group: Sequence[tuple[int, User]],
) -> list[dict]:  # fmt: skip
    """Train a group of test users together; what will be in their results, while their adapters are on disk."""
    started = time.perf_counter()
    learners = [learner_of(args, texts, engine, user, place) for place, (_, user) in enumerate(group)]
    losses = train_group(args, engine, learners, [merged_sharers(pool, index) for index, _ in group] if pool else [])
    seconds = {"train": round((time.perf_counter() - started) / len(group), 3)}
    results = []
    for place, (index, user) in enumerate(group):
        ids = [record.id for record in learners[place].records]
        own = {"user_id": user.user_id, **choice_of(pool, index), **split_of(args).told(user)}
        if not run.done(user.user_id):
            card = {"task": args.task_name, "method": args.method, "task_adapter": args.lora_ckpt, **own}
            folder = run.user_dir(user.user_id) / PERSONAL
            save_adapter(engine.bank.adapter(place), folder, cli.base_name(args), card | {"records": len(ids)})
        results.append(own | {"index": index, "record_ids": ids, "losses": losses[place], "seconds": seconds})
    return results


def finish_group(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, run: Run, pool: Pool | None,
    group: Sequence[tuple[int, User]],
) -> None:  # fmt: skip
    """Train a group of test users, or go on where that is done, and predict for those who are not finished."""
    journal = run.journal([user.user_id for _, user in group])
    results = journal.call("trained", partial(learn_group, args, texts, engine, run, pool, group))
    engine.bank.load([load_adapter(run.user_dir(user.user_id) / PERSONAL) for _, user in group])
    todo = [(place, user) for place, (_, user) in enumerate(group) if not run.done(user.user_id)]
    cli.for_each(todo, len(todo), partial(predict_user, args, texts, engine, run, results))
    journal.drop()


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.anchor_dir = args.anchor_dir or f"./output/{args.task_name}/Anchor_PEFT/LoRA"
    args.lora_r = args.lora_r or RANKS[args.method]
    args.lora_alpha = args.lora_alpha or args.lora_r
    if args.plan:
        return plan.show("train_user_peft", args)
    texts = cli.load_texts(args)
    users = cli.load_test_users(args, texts.task)
    pool = load_pool(args, cli.load_candidates(args, texts.task), len(users)) if args.method == "mta" else None
    folder = args.output_dir or f"./output/{args.task_name}/{FOLDERS[args.method]}"
    run = cli.open_run(args, folder, "train_user_peft", args.method)
    groups = cli.open_groups(select(users, args.user_idxs), args.users_per_batch, run.done)
    if not groups:
        return
    order = {user.user_id: index for index, user in enumerate(users)}
    engine = load_engine(args, task_adapter=args.lora_ckpt)
    for group in cli.share_groups(args, run, groups):
        finish_group(args, texts, engine, run, pool, [(order[user.user_id], user) for user in group])


if __name__ == "__main__":
    cli.run(main)
