"""What decides how good a merge is? PriME's choices changed one at a time, on the trained demo.

Reads   the embedded demo; stages 1 to 3 of every (task, seed) are run first, by reproduce.sh
Writes  <output_dir>/seed<seed>/<task>/ablation-<users>.json   answers of every arm at k = 0, origins of the chosen
        prints a table over all seeds, and the same as one JSON line
Takes   4 to 23 minutes per task and seed (one thread); resumes by task and seed

Every arm merges the same three sharers, searches by the same seed, and is compared with `prime` user by user; a user's
statistics are added up over the seeds. What is changed: the rule, where the search begins, its budget, who may win,
what is asked (the history's records, or its items as test queries), how often each answer is drawn (the noise of the
fitness that sampling makes), and which records search and choose (the noise that their number makes): one half does
both, or one half searches and the other chooses among what was evaluated. `by likelihood` scores the history's targets
as LoraHub does, without generating anything: a fitness without noise of sampling, and without the penalty.

`other questions choose` is no method: it reads the test's labels. Of what prime evaluated, one half of a user's
questions chooses what answers the other half, and the other way round, so nothing is chosen by what measures it. It
tells how much a better choice among the same candidates could gain, with as few questions to choose by.

`same choice` draws each user's history records anew, with replacement, 1000 times: the share of draws in which the same
candidate would have been best by the first metric. The search itself is not repeated.

    python experiments/ablation.py --tasks all --seeds 0
"""

import argparse
import copy
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora_composition_evo as stage
from experiments import demo_runs, seeds
from prime import cli
from prime.merging.evolution import Evaluation, Population, evolve, key_of
from prime.merging.objective import Answers, Objective
from prime.report.scores import metric_intervals, paired_comparison, stack, user_stats
from prime.report.tables import markdown
from prime.runs.files import read_json, write_json
from prime.runs.journal import Journal
from prime.seeds import derive_seed
from prime.users.data import User, load_labels
from prime.users.metrics import METRICS, score
from prime.users.tasks import TASKS, Task, get_task

BUDGET, LARGE = 10, 30
DRAWS = 1000
REFERENCE = "prime"
CHOSEN_BY_TEST = "other questions choose"
ORIGINS = ("base", "sharer", "start", "search")


@dataclass(frozen=True)
class Arm:
    """A choice of the best of a search's first candidates: how it differs from prime's, which has no arguments."""

    changes: tuple[tuple[str, Any], ...] = ()  # options of stage 4
    budget: int = BUDGET
    singles: bool = True  # whether a single sharer may win
    searched: int | None = None  # half of the history that searches; None: all of it
    chosen: int | None = None  # half that chooses; None: what searched


PUBLISHED = (("merge_rule", "factor"), ("start", "zero"), ("step", 1.0))
ARMS = {
    REFERENCE: Arm(),
    "no search": Arm(budget=0),
    f"budget {LARGE}": Arm(budget=LARGE),
    "no single sharer may win": Arm(singles=False),
    "start uniform": Arm((("start", "uniform"),)),
    "start zero": Arm((("start", "zero"),)),
    "step 1": Arm((("step", 1.0),)),
    "rule factor": Arm((("merge_rule", "factor"),)),
    "published: factor, start zero, step 1, no single sharer": Arm(PUBLISHED, singles=False),
    "4 draws of each answer": Arm((("num_repeat", 4),)),
    "the other fitness": Arm((("fitness", "other"),)),
    "by likelihood": Arm((("objective", "nll"),)),
    "half the history": Arm(searched=0),
    "half the history, the other half chooses": Arm(searched=0, chosen=1),
}
LONGEST = Arm(budget=LARGE)  # its beginning is prime's search
ROWS = (*ARMS, CHOSEN_BY_TEST)


def arms_of(task: Task) -> dict[str, Arm]:
    """Those that the task can have: a history without questions cannot be asked as test queries."""
    return {name: arm for name, arm in ARMS.items() if task.source or ("fitness", "other") not in arm.changes}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--tasks", default="all", help="tasks of the demo, with commas; all: the six of them")
    parser.add_argument("--seeds", type=cli.int_list, default=(0,), help="run seeds, with commas")
    parser.add_argument("--users", type=cli.positive, default=24, help="test users, the first ones")
    parser.add_argument("--output_dir", default=demo_runs.DEFAULT_DIR, help="stages 1 to 3, and results")
    return parser


# -- searching ------------------------------------------------------------------------------------------------------


def options(args: argparse.Namespace, task: str, changes: Sequence[tuple[str, Any]]) -> argparse.Namespace:
    """Stage 4's options with changes; citation's search asks test queries, as in reproduce.sh."""
    own = copy.copy(args)
    own.fitness, other = ("query", "history") if task == "citation" else ("history", "query")
    for name, value in changes:
        setattr(own, name, other if value == "other" else value)
    return own


def texts_of(start: demo_runs.Start) -> dict[str, cli.Texts]:
    """Task and prompts by `--fitness`, as stage 4 takes them."""
    return {"history": start.texts, "query": cli.asked_as_queries(start.args, start.texts)}


class Watched(Population):
    """A population that knows its task and keeps the answers of each candidate (of the first draw)."""

    def __init__(self, args: argparse.Namespace, texts: cli.Texts, *more: Any):
        super().__init__(args, texts, *more)
        self.task = texts.task
        self.kept: dict[bytes, Answers] = {}

    def answers(self, weights: Tensor) -> list[Answers]:
        found = super().answers(weights)
        self.kept |= {key_of(one): answers[0] for one, answers in zip(weights, found, strict=True)}
        return found


def half_of(population: Watched, half: int | None) -> Watched:
    """The same of every second history item, counted from the first (0) or second (1); records of an item stay
    together. None: of all.
    """
    if half is None:
        return population
    items = list(dict.fromkeys(record.id.split("-k")[0] for record in population.records))
    wanted = {item for place, item in enumerate(items) if place % 2 == half}
    kept = [place for place, record in enumerate(population.records) if record.id.split("-k")[0] in wanted]
    found = copy.copy(population)
    for name in ("records", "golds", "prompts", "encoded", "drafts", "about"):
        setattr(found, name, [getattr(population, name)[place] for place in kept])
    return found


class Searches:
    """All searches of one user, each run once for the arms that share it."""

    def __init__(self, start: demo_runs.Start, texts: Mapping[str, cli.Texts], user: User, folder: Path):
        self.start, self.texts, self.user, self.folder = start, texts, user, folder
        self.seed = derive_seed(start.args.seed, user.user_id)
        self.known: dict[tuple, tuple[Watched, list[Evaluation]]] = {}

    def objective(self, population: Watched) -> Objective | None:
        """PriME's; none where the targets' likelihood is searched by."""
        if population.args.objective == "nll":
            return None
        (penalty,) = self.start.args.sim_penalty
        return Objective(population.task, population.golds, penalty)

    def population(self, arm: Arm) -> Watched:
        s = self.start
        own = options(s.args, s.texts.task.name, (*arm.changes, ("opt_budget", LARGE if arm == LONGEST else BUDGET)))
        journal = Journal(self.folder / f"{len(self.known)}-{arm.chosen}.jsonl")
        return Watched(own, self.texts[own.fitness], s.engine, self.user, self.seed, own.n_sim, journal)

    def evaluations(self, arm: Arm) -> tuple[Watched, list[Evaluation]]:
        """The search behind an arm; budgets are beginnings of the longest one."""
        behind = Arm(arm.changes, searched=arm.searched) if arm.changes or arm.searched is not None else LONGEST
        if behind not in self.known:
            half = half_of(self.population(behind), behind.searched)
            (found,) = evolve(half, [self.objective(half)], self.seed, [self.folder / "log.jsonl"])
            self.known[behind] = half, found
        return self.known[behind]

    def candidates(self, arm: Arm) -> list[Evaluation]:
        """Those of an arm's search that may win, in order."""
        _, found = self.evaluations(arm)
        before = sum(one.origin != "search" for one in found)
        found = found[: before + arm.budget]
        return [one for one in found if arm.singles or one.origin != "sharer"]

    def chosen(self, arm: Arm) -> Evaluation:
        own = self.candidates(arm)
        if arm.chosen is None:
            return min(own, key=lambda one: one.loss)
        judge = half_of(self.population(arm), arm.chosen)
        objective = self.objective(judge)
        trials = judge.trials(objective)
        trials(judge.known_points())  # whose answers the others' are compared with
        measured = trials(torch.stack([one.weights for one in own]))
        losses = [objective.score(found, one.weights).loss for found, one in zip(measured, own, strict=True)]
        return own[int(np.argmin(losses))]

    def same_choice(self, arm: Arm) -> float:
        """Share of draws of the history's records in which the same candidate is best by the first metric."""
        population, _ = self.evaluations(arm)
        task = population.task
        name = task.history_metrics[0]

        def value(answer: str, gold: str) -> float:
            return score([name], [answer], [gold], task.history_labels)[name]

        answers = [population.kept[key_of(candidate.weights)] for candidate in self.candidates(arm)]
        values = np.array([list(map(value, by_record, population.golds)) for by_record in answers])
        values = values if METRICS[name].higher_is_better else -values
        records = values.shape[1]
        counts = np.random.default_rng(self.seed).multinomial(records, np.full(records, 1 / records), DRAWS)
        return float(((counts @ values.T).argmax(1) == values.mean(1).argmax()).mean())


# -- one task and seed ----------------------------------------------------------------------------------------------


def run_one(args: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """Answers at k = 0 `{row: {user: [{id, output}]}}`, origins of what each row chose, and `same choice` of prime."""
    start = demo_runs.start(task, seed, args.output_dir)
    texts, arms = texts_of(start), arms_of(start.texts.task)
    answers: dict[str, dict[str, list]] = {name: {} for name in (*arms, CHOSEN_BY_TEST)}
    origins = {name: Counter[str]() for name in answers}
    same = []
    with cli.bar(min(args.users, len(start.users)), f"{task}, seed {seed}", "user") as progress:
        for index, user in enumerate(start.users[: args.users]):
            start.engine.bank.load(start.pool.adapters(index))
            with tempfile.TemporaryDirectory() as scratch:
                searches = Searches(start, texts, user, Path(scratch))
                picked = {name: searches.chosen(arm) for name, arm in arms.items()}
                evaluated = searches.candidates(ARMS[REFERENCE])
                same.append(searches.same_choice(ARMS[REFERENCE]))
            found, by_test = predicted(start, user, picked), chosen_by_test(start, user, evaluated)
            for name in arms:
                answers[name][user.user_id] = found[name]
                origins[name][picked[name].origin] += 1
            answers[CHOSEN_BY_TEST][user.user_id] = list(chain.from_iterable(samples for _, samples in by_test))
            origins[CHOSEN_BY_TEST].update(one.origin for one, _ in by_test)
            progress.update()
    return {"answers": answers, "origins": {name: dict(own) for name, own in origins.items()}, "same": same}


def predicted(start: demo_runs.Start, user: User, picked: Mapping[str, Evaluation]) -> dict[str, list]:
    """Answers to the user's queries of what each arm deploys, rule by rule."""
    found: dict[str, list] = {}
    for rule in ("delta", "factor"):
        weights = {
            name: one.weights for name, one in picked.items()
            if dict(ARMS[name].changes).get("merge_rule", "delta") == rule
        }  # fmt: skip
        found |= answered(start, user, weights, rule)
    return found


def answered(start: demo_runs.Start, user: User, weights: Mapping[str, Tensor], rule: str) -> dict[str, list]:
    """Answers to the user's queries at k = 0, without profile, by named weights."""
    own = options(start.args, start.texts.task.name, [("merge_rule", rule)])
    texts = start.texts._replace(profiles=None)
    answers = stage.predictions(own, texts, start.engine, user, weights, lambda _: None)
    return {name: settings["k0"] for name, settings in answers.items()}


def chosen_by_test(
    start: demo_runs.Start, user: User, evaluated: Sequence[Evaluation]
) -> list[tuple[Evaluation, list]]:
    """For each half of the user's questions: the candidate that is best at the other half, and its answers to this."""
    weights = {str(place): one.weights for place, one in enumerate(evaluated)}
    answers = answered(start, user, weights, start.args.merge_rule)
    halves = []
    for half in (0, 1):
        loss = [query_loss(start, answers[name][1 - half :: 2]) for name in weights]
        best = int(np.argmin(loss))
        halves.append((evaluated[best], answers[str(best)][half::2]))
    return halves


def query_loss(start: demo_runs.Start, samples: Sequence[Mapping[str, str]]) -> float:
    """The task's first metric of answers to test queries, lower is better."""
    task = start.texts.task
    name = task.metrics[0]
    golds = [start.golds[sample["id"]] for sample in samples]
    found = score([name], [sample["output"] for sample in samples], golds, task.labels)[name]
    return -found if METRICS[name].higher_is_better else found


def measured(args: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """`run_one`, from the file where it ran before with as many users."""
    path = Path(args.output_dir) / f"seed{seed}" / task / f"ablation-{args.users}.json"
    if not path.exists():
        write_json(path, run_one(args, task, seed))
    return read_json(path)


# -- tables ---------------------------------------------------------------------------------------------------------


def compare(name: str, by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per arm the score, its difference to prime's by user, and where the chosen came from."""
    task = get_task(name)
    golds = load_labels(ROOT / "data/demo" / name / "test_100" / "user_test_100_label.json")
    totals = {}
    for arm in ROWS:
        if all(arm in run["answers"] for run in by_seed):
            totals[arm] = seeds.pooled([user_stats(task, run["answers"][arm], golds) for run in by_seed])
    reference = stack(totals[REFERENCE], list(totals[REFERENCE]))
    rows: dict[str, Any] = {}
    for arm, total in totals.items():
        stacked = stack(total, list(total))
        origins = sum((Counter(run["origins"][arm]) for run in by_seed), Counter[str]())
        rows[arm] = {
            "scores": metric_intervals(task, stacked),
            "to_prime": paired_comparison(task, stacked, reference),
            "origins": dict(origins),
        }
    return {"rows": rows, "same_choice": fmean(chain.from_iterable(run["same"] for run in by_seed))}


def cells(task: str, row: Mapping[str, Any]) -> list[str]:
    """Score; its difference to prime's with the interval; users better and worse; what the chosen were."""
    metric = get_task(task).metrics[0]
    paired, gap = row["to_prime"], row["to_prime"][metric]
    return [
        f"{row['scores'][metric]['mean']:.3f}", f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]",
        f"{paired['better']} : {paired['worse']}",
        " / ".join(str(row["origins"].get(name, 0)) for name in ORIGINS),
    ]  # fmt: skip


def overview(found: Mapping[str, Mapping[str, Any]]) -> str:
    """All tasks beside each other: scores, with + and - where the paired interval to prime is clear of 0."""
    columns = {}
    for name, result in found.items():
        task = get_task(name)
        metric = task.metrics[0]
        column = columns[f"{name}, {metric}"] = {}
        for arm, row in result["rows"].items():
            column[arm] = seeds.marked(row["scores"][metric]["mean"], seeds.verdict(task, row["to_prime"][metric]))
    return seeds.side_by_side("arm", ROWS, columns)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    tasks = [task for task in TASKS if (ROOT / "data/demo" / task).is_dir()]
    tasks = tasks if args.tasks == "all" else args.tasks.split(",")
    found = {}
    for task in tasks:
        found[task] = compare(task, [measured(args, task, seed) for seed in args.seeds])
        metric = get_task(task).metrics[0]
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        print(f"\n**{task}**, {metric} ({better} is better); same choice {found[task]['same_choice']:.2f}\n")
        rows = [[name, *cells(task, row)] for name, row in found[task]["rows"].items()]
        print(markdown([["arm", "score", "to prime", "better : worse", " / ".join(ORIGINS)], *rows]))
    print(f"\n{overview(found)}\n")
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
