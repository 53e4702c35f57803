"""Stage 1: adapt the base model to the task, and predict with and without that adaptation.

Reads   data/<task>/user_base_LLM.json (training), test_100/user_test_100.json, profile-id2text.json
Writes  <output_dir>/adapter_config.json + adapter_model.safetensors   the task adapter (PEFT); later stages fold it in
        <output_dir>/train_log.json                                    loss of every step
        <output_dir>/users/<user>/result.json                          test predictions of `base` and `task_lora`
Takes   1 to 2 minutes on the demo (2 CPU cores). Resumes: run the same command again.

    python task_lora.py --task_name movie_tagging --llama_model_path ./llama/checkpoints/Llama-2-7b \\
        --output_dir ./output/movie_tagging/task-base_LLM
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from prime import cli
from prime.bank.decode import Progress
from prime.bank.encoding import EncodedRecord
from prime.bank.sampling import Sampler
from prime.bank.train import Learner, train, train_settings
from prime.checkpoints import plan
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.engine import Engine, load_engine, predict
from prime.errors import InputError
from prime.runs.files import write_json
from prime.runs.run import Run
from prime.seeds import derive_seed
from prime.users.data import User, load_users
from prime.users.prompts import task_records


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--output_dir", help="default ./output/<task_name>/task-base_LLM")
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=False)
    cli.add_prompts(parser)
    cli.add_training(parser, lr=1e-4, clip=0.3)
    cli.add_decoding(parser)
    cli.add_users(parser, "test users")
    return parser


def training_records(texts: cli.Texts, engine: Engine, users: Sequence[User]) -> list[EncodedRecord]:
    profiles = texts.profiles or {}
    return [
        engine.encoder.record(record.id, record.input, record.target)
        for user in users
        for record in task_records(user, texts.task, texts.templates, profiles.get(user.user_id))
    ]


def load_base_users(args: argparse.Namespace, texts: cli.Texts) -> list[User]:
    path = cli.data_dir(args) / "user_base_LLM.json"
    users = load_users(path, texts.task, need_queries=True, need_golds=True)
    if not any(user.queries for user in users):
        raise InputError(f"{path}: no user has a query to train on")
    return users


def train_task_adapter(args: argparse.Namespace, engine: Engine, records: list[EncodedRecord], folder: Path) -> None:
    settings = train_settings(args)
    learner = Learner(0, "task adapter", derive_seed("task", args.seed), records)
    engine.bank.allocate([learner.seed], args.lora_r, args.lora_alpha)
    with cli.bar(len(learner.batches(settings)), "task adapter", "step") as progress:
        losses = train(engine.bank, [learner], settings, args.max_batch_tokens, progress.update)[0]
    write_json(folder / "train_log.json", {"records": len(records), "loss": losses})
    save_adapter(engine.bank.adapter(0), folder, cli.base_name(args))


def predict_user(
    args: argparse.Namespace, texts: cli.Texts, engine: Engine, run: Run, index: int, user: User, progress: Progress
) -> None:
    """Predictions of the untouched model (bank row 0, zero weight) and of the task-adapted one (row 1)."""
    started = time.perf_counter()
    sampler = Sampler(args.temperature, args.top_p, derive_seed(args.seed, user.user_id))
    methods = {"task_lora": 1, "base": 0}
    found = predict(engine, texts, user, methods, sampler, args.k_list, args.max_gen_len, progress)
    seconds = {"predict": round(time.perf_counter() - started, 3)}
    run.finish(user.user_id, {"user_id": user.user_id, "index": index, "predictions": found, "seconds": seconds})


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.plan:
        return plan.show("task_lora", args)
    folder = Path(args.output_dir or f"./output/{args.task_name}/task-base_LLM")
    texts = cli.load_texts(args)
    base_users, users = load_base_users(args, texts), cli.load_test_users(args, texts.task)
    run = cli.open_run(args, folder, "task_lora", "task_lora")
    todo = cli.open_users(users, args.user_idxs, run.done)
    trained = folder / "adapter_config.json"
    if trained.exists() and not todo:
        return
    engine = load_engine(args)
    with run.turn("the task adapter"):
        if not trained.exists():
            train_task_adapter(args, engine, training_records(texts, engine, base_users), folder)
    engine.bank.load([load_adapter(folder)])
    engine.bank.combine(torch.tensor([[0.0], [1.0]]), "delta")
    cli.for_each(cli.share_users(args, run, todo), len(todo), partial(predict_user, args, texts, engine, run))


if __name__ == "__main__":
    cli.run(main)
