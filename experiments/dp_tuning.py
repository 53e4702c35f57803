"""Training settings for adapters under differential privacy, chosen on held-out thirds of anchors' own histories.

Reads   the embedded demo; stages 1 and 2 of the task and seed are run first, by reproduce.sh
Writes  <output_dir>/seed<seed>/<task>/dp_tuning.json   scores of every setting measured so far
        prints one table, and the same as one JSON line
Takes   about 20 seconds per setting on one core; resumes by setting

Every third item of an anchor is held out; neither a merge nor a test user is looked at. The choice itself costs privacy
that no epsilon here counts (docs/privacy.md). The noise's key is the file `noise.key` beside the result.

    python experiments/dp_tuning.py --epsilons 1,8 --settings "1:3e-3:20,1:1e-2:20,8:3e-3:20"
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


import train_anchor_peft as stage
from experiments import demo_runs
from prime import cli
from prime.bank.dp import terms_of
from prime.bank.logprobs import target_logprobs
from prime.engine import Engine, load_engine
from prime.merging.answering import history_scores
from prime.merging.sharers import Selection
from prime.runs.files import read_json, write_json
from prime.settings import above_zero, natural, positive, recorded
from prime.users.data import User
from prime.users.prompts import history_records
from prime.users.texts import load_candidates, load_texts


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--task", default="movie_tagging", help="task of the demo")
    parser.add_argument("--seed", type=natural, default=0, help="run seed")
    parser.add_argument("--epsilons", default="8", help="budgets, with commas; 0 = plain training, for comparison")
    parser.add_argument("--settings", default="1:1e-2:20", help="rank:lr:epochs of each setting, with commas")
    parser.add_argument("--batch_size", type=positive, default=50, help="items of a step in expectation")
    parser.add_argument("--max_norm", type=above_zero, default=0.5, help="norm of an item's gradient at most")
    parser.add_argument("--output_dir", default=demo_runs.DEFAULT_DIR, help="results of stages 1 and 2")
    return parser


def settings_of(args: argparse.Namespace, folder: Path, epsilon: float, setting: str) -> stage.Settings:
    """Settings of stage 3; `setting`: rank:lr:epochs."""
    rank, lr, epochs = setting.split(":")
    options = demo_runs.training_options(args.task, args.seed, folder)
    options += ["--lora_r", rank, "--lora_alpha", rank, "--lr", lr, "--epochs", epochs]
    if epsilon:
        options += ["--batch_size", str(args.batch_size), "--max_per_sample_grad_norm", str(args.max_norm)]
        options += ["--enable_dp", "--epsilon", str(epsilon), "--noise_key", str(folder / "noise.key")]
    return cli.parse(stage.Settings, stage.__doc__, options)


def split(user: User) -> tuple[User, User]:
    """The user with two thirds of the history, and with every third item."""
    kept = [item for place, item in enumerate(user.profile) if place % 3 != 2]
    return replace(user, profile=tuple(kept)), replace(user, profile=tuple(user.profile[2::3]))


def prepared(settings: stage.Settings, engine: Engine, folder: Path) -> tuple[stage.Stage, list[User]]:
    """What anchors are trained with, in no run directory; and the anchors."""
    data = settings.data
    texts = load_texts(data.folder, data.task, settings.prompts.prompt_path, settings.prompts.texts)
    anchors = Selection.of(settings.anchors, data.task_name, load_candidates(data.folder, texts.task)).anchors()
    terms = terms_of(settings.privacy, folder, recorded(settings))
    return stage.Stage(settings, texts, engine, None, terms, {}), anchors


def measure(work: stage.Stage, users: Sequence[User]) -> dict:
    """Mean token loss and accuracy on held-out items, means over anchors, by the base and by their adapters."""
    engine, training = work.engine, work.settings.training
    anchors = [stage.Anchor(work, split(user)[0]) for user in users]
    engine.bank.allocate([anchor.seed for anchor in anchors], training.lora_r, training.lora_alpha)
    engine.train([anchor.learner(place) for place, anchor in enumerate(anchors)], training, "anchors")
    task, templates, recent_k = work.texts.task, work.texts.templates, work.settings.prompts.recent_k
    for anchor, user in zip(anchors, users, strict=True):
        anchor.records = history_records(split(user)[1], task, templates, None, recent_k, quoting=False)
    histories = [anchor.records for anchor in anchors]
    reports = history_scores(engine, work.texts, histories, work.settings.train_gen_len)
    scores: dict[str, Any] = {"loss": held_out_loss(engine, anchors, range(len(anchors)))}
    scores["base_loss"] = held_out_loss(engine, anchors, [-1] * len(anchors))
    for when in ("before", "after"):
        scores[when] = {}
        for metric in reports[0][when]:
            scores[when][metric] = fmean(report[when][metric] for report in reports)
    return scores


def held_out_loss(engine: Engine, anchors: Sequence[stage.Anchor], places: Sequence[int]) -> float:
    """Mean over all records of the mean over a record's target tokens; places[i] is anchor i's adapter in the bank."""
    encoded, pairs = [], []
    for anchor, place in zip(anchors, places, strict=True):
        for record in anchor.records:
            pairs.append((place, len(encoded)))
            encoded.append(engine.encoder.record(record.id, record.input, record.target))
    logprobs = target_logprobs(engine.bank, encoded, pairs, engine.max_batch_tokens)
    return fmean(-float(logprobs[pair].mean()) for pair in pairs)


def line(name: str, scores: dict) -> str:
    metrics = [f"{metric} {value:.3f} -> {scores['after'][metric]:.3f}" for metric, value in scores["before"].items()]
    return f"{name}: loss {scores['base_loss']:.3f} -> {scores['loss']:.3f}, {', '.join(metrics)}"


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    folder = demo_runs.trained(args.task, args.seed, args.output_dir, until="task_lora")
    path = folder / "dp_tuning.json"
    known = read_json(path) if path.exists() else {}
    engine = None
    for epsilon in map(float, args.epsilons.split(",")):
        for setting in args.settings.split(","):
            name = f"epsilon {epsilon:g}, batch {args.batch_size}, clip {args.max_norm:g}, rank:lr:epochs {setting}"
            if name not in known:
                settings = settings_of(args, folder, epsilon, setting)
                engine = engine or load_engine(settings.model, settings.prompts)
                known[name] = measure(*prepared(settings, engine, folder))
                write_json(path, known)
            print(line(name, known[name]), flush=True)
    print(json.dumps(known))


if __name__ == "__main__":
    cli.run(main)
