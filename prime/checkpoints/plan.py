"""`--plan`: what each stage would rehearse, see `rehearsal.py`; the passes of a stage that can be its largest."""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from prime import cli
from prime.bank.encoding import EncodedRecord
from prime.bank.train import train_settings
from prime.checkpoints.peft import read_config
from prime.checkpoints.rehearsal import OF_DATA, PUBLISHED_ANCHORS, Plan, Rehearsal
from prime.merging.gates import Gates
from prime.merging.optimizer import generation_size, is_pareto, make_optimizer
from prime.merging.sharers import anchor_idx_path, anchor_users
from prime.runs.workers import keep_freed_memory
from prime.users.data import User, load_users, select
from prime.users.prompts import Record, task_records
from prime.users.tasks import Task

PUBLISHED_RANK = 8


def task_lora(args: argparse.Namespace, run: Rehearsal) -> None:
    def base_users(args: argparse.Namespace, task: Task) -> Sequence[User]:
        return load_users(cli.data_dir(args) / "user_base_LLM.json", task, need_queries=True, need_golds=True)

    def own(texts: cli.Texts, user: User) -> list[Record]:
        return task_records(user, texts.task, texts.templates, (texts.profiles or {}).get(user.user_id))

    run.allocate(1)
    run.train([[record for records in run.texts(base_users, own, 100) for record in records]], train_settings(args))
    run.load(1, args.lora_r)
    run.combine(2, "delta")
    run.answer(run.queries(test_users), 1, 0.0, run.limits()[1])


def train_anchor_peft(args: argparse.Namespace, run: Rehearsal) -> None:
    group = most_at_once(run.histories(anchors), args.anchors_per_batch)
    run.allocate(len(group))
    run.train(group, train_settings(args))
    run.answer([record for records in group for record in records], 1, 0.0, run.limits()[0])


def train_anchor_gate(args: argparse.Namespace, run: Rehearsal) -> None:
    group = most_at_once(run.histories(anchors), args.anchors_per_batch)
    run.load(len(group), rank_of(args.anchor_path))
    run.train(group, replace(train_settings(args), max_step=args.max_step), gates=Gates.zeros)


def train_user_peft(args: argparse.Namespace, run: Rehearsal) -> None:
    group = most_at_once(run.histories(test_users), args.users_per_batch)
    run.allocate(len(group))
    run.train(group, train_settings(args))
    run.answer(run.queries(test_users), 1, 0.0, run.limits()[1])


def lora_composition_evo(args: argparse.Namespace, run: Rehearsal) -> None:
    """The population with most open rows (searches side by side evaluate theirs together), and the predictions."""
    n, several = args.n_sim or PUBLISHED_ANCHORS, len(args.sim_penalty)
    generation = generation_size(make_optimizer(np.zeros(n), args.opt_type, args.opt_budget or 1, 0))
    candidates = generation * (1 if is_pareto(args.opt_type) else several)
    history, queries = run.histories(test_users)[0], run.queries(test_users)
    run.load(n, rank_of(args.anchor_dir))
    ends = run.endings(history)
    rows, share = most_open((1 + n, ends.golds), (candidates, ends.answers))
    run.combine(rows, args.merge_rule)
    run.answer(history, rows, share, ends.history_limit if args.objective == "metric" else 0)
    run.combine(2 + several, args.merge_rule)
    run.answer(queries, *most_open((1, 0.0), (1 + several, ends.golds)), ends.query_limit)


def most_open(*phases: tuple[int, float]) -> tuple[int, float]:
    """Of adapters that answer and the share of their rows that end at once, the pair that leaves most rows."""
    return max(phases, key=lambda phase: phase[0] * (1 - phase[1]))


def lora_composition(args: argparse.Namespace, run: Rehearsal) -> None:
    n = args.n_sim or PUBLISHED_ANCHORS
    history, queries = run.histories(test_users)[0], run.queries(test_users)
    run.load(n + 1, rank_of(args.anchor_dir))
    ends = run.endings(history)
    run.answer(history, n + 1, ends.golds, ends.history_limit)
    run.answer(queries, 1, 0.0, ends.query_limit)


def mia(args: argparse.Namespace, run: Rehearsal) -> None:
    """Some anchors' records under the adapters that are attacked together."""
    run.load(args.users_per_batch, rank_of(args.exp_dir))
    run.answer(run.histories(cli.load_candidates)[0], args.users_per_batch, 0.0, 0)


STAGES: dict[str, Callable[[argparse.Namespace, Rehearsal], None]] = {
    stage.__name__: stage
    for stage in (
        task_lora, train_anchor_peft, train_anchor_gate, train_user_peft, lora_composition_evo, lora_composition, mia,
    )
}  # fmt: skip


ENDINGS_EXPECTED = ("lora_composition_evo", "lora_composition")  # the stages that ask `Rehearsal.endings`


def plan_of(stage: str, args: argparse.Namespace) -> Plan:
    """The bound, and where the data are there what is expected.

    What is expected is rehearsed in a process of its own: a heap that the other rehearsal has frayed would mislead.
    """
    plan = rehearsed(stage, args)
    if stage in ENDINGS_EXPECTED and plan.lengths == OF_DATA:
        plain = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "parser"})
        with ProcessPoolExecutor(1, get_context("spawn"), keep_freed_memory) as fresh:
            other = fresh.submit(rehearsed, stage, plain, expecting=True).result()
        plan.expected = plan.process + other.peak - other.process  # both grow from this process
    return plan


def rehearsed(stage: str, args: argparse.Namespace, expecting: bool = False) -> Plan:
    rehearsal = Rehearsal(args, expecting)
    STAGES[stage](args, rehearsal)
    return rehearsal.done()


def show(stage: str, args: argparse.Namespace) -> None:
    """Print the plan of a stage, named by its script."""
    print(plan_of(stage, args).text())


# -- whose texts ----------------------------------------------------------------------------------------------------


def test_users(args: argparse.Namespace, task: Task) -> Sequence[User]:
    """The test users of --user_idxs."""
    return select(cli.load_test_users(args, task), args.user_idxs)


def anchors(args: argparse.Namespace, task: Task) -> Sequence[User]:
    """The anchors of --user_idxs; before stage 2 has chosen any, all candidates."""
    candidates = cli.load_candidates(args, task)
    return select(anchor_users(args, candidates), args.user_idxs) if anchor_idx_path(args).exists() else candidates


def most_at_once(users: Sequence[list[EncodedRecord]], size: int) -> Sequence[list[EncodedRecord]]:
    """The first `size` users (0: all), repeated where only one is assumed."""
    return users[: size or None] if len(users) > 1 else list(users) * (size or PUBLISHED_ANCHORS)


def rank_of(folder: str | Path) -> int:
    """Rank of the adapters below a folder, the published one where there are none."""
    paths = sorted(Path(folder).glob("users/*/adapter/adapter_config.json"))
    return read_config(paths[0])[0] if paths else PUBLISHED_RANK
