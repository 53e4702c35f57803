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
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora_composition_evo as stage
from experiments import demo_runs, seeds
from prime import cli
from prime.merging.evolution import Evaluation, Memo, ScoreOf, choose, evolve, key_of
from prime.merging.objective import Objective, score_by_likelihood
from prime.merging.population import Answers, Population
from prime.report.scores import user_stats
from prime.report.tables import markdown
from prime.runs.files import read_json, write_json
from prime.runs.journal import Journal
from prime.runs.progress import bar
from prime.seeds import derive_seed
from prime.settings import FitnessSettings, SearchSettings, int_list, positive, published
from prime.users.data import User
from prime.users.metrics import METRICS, score
from prime.users.prompts import Record
from prime.users.tasks import Task, get_task

LARGE = 30  # candidates of the long search; prime's has 10
DRAWS = 1000
REFERENCE = "prime"
CHOSEN_BY_TEST = "other questions choose"
ORIGINS = ("base", "sharer", "start", "search")
OTHER_FITNESS = {"history": "query", "query": "history"}


@dataclass(frozen=True)
class Arm:
    """How a search and its choice differ from prime's, which changes nothing."""

    search: Mapping[str, Any] = field(default_factory=dict)  # changed settings of the search, by name
    fitness: Mapping[str, Any] = field(default_factory=dict)  # changed settings of the fitness
    other_fitness: bool = False  # test queries in place of the history's records, or the other way round
    searched: int | None = None  # half of the history that searches; None: all of it
    chosen: int | None = None  # half that chooses; None: what searched

    def settings(self, settings: stage.Settings) -> stage.Settings:
        """Stage 4's settings with these changes."""
        fitness = replace(settings.fitness, **self.fitness)
        if self.other_fitness:
            fitness = replace(fitness, fitness=OTHER_FITNESS[fitness.fitness])
        return replace(settings, search=replace(settings.search, **self.search), fitness=fitness)


ARMS = {
    REFERENCE: Arm(),
    "no search": Arm({"opt_budget": 0}),
    f"budget {LARGE}": Arm({"opt_budget": LARGE}),
    "no single sharer may win": Arm({"search_only": True}),
    "start uniform": Arm({"start": "uniform"}),
    "start zero": Arm({"start": "zero"}),
    "step 0.5": Arm({"step": 0.5}),
    "rule factor": Arm({"merge_rule": "factor"}),
    "as published": Arm(published(SearchSettings), published(FitnessSettings)),
    "4 draws of each answer": Arm(fitness={"num_repeat": 4}),
    "the other fitness": Arm(other_fitness=True),
    "by likelihood": Arm(fitness={"objective": "nll"}),
    "half the history": Arm(searched=0),
    "half the history, the other half chooses": Arm(searched=0, chosen=1),
}
ROWS = (*ARMS, CHOSEN_BY_TEST)


def arms_of(task: Task) -> dict[str, Arm]:
    """Those that the task can have: a history without questions cannot be asked as test queries."""
    return {name: arm for name, arm in ARMS.items() if task.source or not arm.other_fitness}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--tasks", default="all", help="tasks of the demo, with commas; all: the six of them")
    parser.add_argument("--seeds", type=int_list, default=(0,), help="run seeds, with commas")
    parser.add_argument("--users", type=positive, default=24, help="test users, the first ones")
    parser.add_argument("--output_dir", default=demo_runs.DEFAULT_DIR, help="stages 1 to 3, and results")
    return parser


def as_reproduced(settings: stage.Settings) -> stage.Settings:
    """Citation's search asks test queries, as in reproduce.sh."""
    asked = get_task(settings.data.task).fitness
    return replace(settings, fitness=replace(settings.fitness, fitness=asked))


# -- searching ------------------------------------------------------------------------------------------------------


class Watched(Population):
    """A population that keeps the answers of each candidate (of the first draw)."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.kept: dict[bytes, list[str]] = {}

    def answers(self, weights: Tensor) -> list[Answers]:
        answers = super().answers(weights)
        for candidate, repeats in zip(weights, answers, strict=True):
            self.kept[key_of(candidate)] = repeats[0]
        return answers

    def goodness(self, evaluations: Sequence[Evaluation]) -> np.ndarray:
        """The first metric of each candidate's answer to each record, higher is better: `[c, records]`."""
        task = self.setup.texts.task
        name, choices = task.history_metrics[0], task.history_choices
        rows = []
        for evaluation in evaluations:
            answers = self.kept[key_of(evaluation.weights)]
            pairs = zip(answers, self.golds, strict=True)
            rows.append([score([name], [answer], [gold], choices)[name] for answer, gold in pairs])
        values = np.array(rows)
        return values if METRICS[name].higher_is_better else -values


def half_of(population: Watched, half: int | None) -> Watched:
    """The same of every second history item, counted from the first (0) or second (1); records of an item stay
    together. None: of all.
    """
    if half is None:
        return population
    items = list(dict.fromkeys(item_of(record) for record in population.records))
    wanted = set(items[half::2])
    places = [place for place, record in enumerate(population.records) if item_of(record) in wanted]
    part = copy.copy(population)
    for name in ("records", "golds", "prompts", "encoded", "drafts", "about"):
        values = getattr(population, name)
        setattr(part, name, [values[place] for place in places])
    return part


def item_of(record: Record) -> str:
    """Id of the history item that a record was made of; records that quote other items are called <item>-k<k>..."""
    return record.id.split("-k")[0]


class Searches:
    """The searches of one user; what the arms ask in common is measured once.

    Args:
        index: place of the user among the test users.
        folder: for files that nobody needs afterwards.
    """

    def __init__(self, start: demo_runs.Start, index: int, folder: Path):
        self.start, self.user, self.folder = start, start.users[index], folder
        self.n = len(start.pool.sharers(index))
        self.seed = derive_seed(start.settings.seed, self.user.user_id)
        self.known: dict[tuple, tuple[Memo, ScoreOf]] = {}

    def measured(self, settings: stage.Settings, half: int | None) -> tuple[Memo, ScoreOf]:
        """What is known of candidates on a half of the history (None: on all of it), and what makes scores of it."""
        key = settings.fitness, settings.search.merge_rule, half
        if key not in self.known:
            journal = Journal(self.folder / f"{len(self.known)}.jsonl")
            setup = replace(self.start, settings=settings).setup()
            population = half_of(Watched(setup, self.user, self.seed, self.n, journal), half)
            if settings.fitness.objective == "nll":
                self.known[key] = Memo(population, population.logprobs), score_by_likelihood
            else:
                objective = Objective(setup.texts.task, population.golds, *settings.search.sim_penalty)
                self.known[key] = Memo(population, population.trials(objective)), objective.score
        return self.known[key]

    def evaluations(self, arm: Arm) -> list[Evaluation]:
        """All evaluated candidates of an arm, in order."""
        settings = arm.settings(self.start.settings)
        memo, score_of = self.measured(settings, arm.searched)
        return evolve(memo, score_of, settings.search, self.seed, self.folder / "log.jsonl")

    def chosen(self, arm: Arm) -> Evaluation:
        """What an arm deploys."""
        settings, evaluations = arm.settings(self.start.settings), self.evaluations(arm)
        if arm.chosen is None:
            return choose(evaluations, settings.search)
        memo, score_of = self.measured(settings, arm.chosen)
        memo.learn(memo.population.known_points())  # whose answers the others' are compared with
        memo.learn(torch.stack([evaluation.weights for evaluation in evaluations]))
        losses = [score_of(memo[evaluation.weights][0], evaluation.weights).loss for evaluation in evaluations]
        return evaluations[int(np.argmin(losses))]

    def same_choice(self) -> float:
        """Share of draws of the history's records in which prime's best candidate by the first metric is the same."""
        memo, _ = self.measured(self.start.settings, None)
        values = memo.population.goodness(self.evaluations(ARMS[REFERENCE]))
        records = values.shape[1]
        counts = np.random.default_rng(self.seed).multinomial(records, np.full(records, 1 / records), DRAWS)
        return float(((counts @ values.T).argmax(1) == values.mean(1).argmax()).mean())


# -- one task and seed ----------------------------------------------------------------------------------------------


class Deployed(NamedTuple):
    """Answers to a user's queries, and the origins of the candidates that gave them."""

    answers: list[Mapping[str, str]]  # {"id", "output"}
    origins: list[str]


def run_one(start: demo_runs.Start, users: int) -> dict[str, Any]:
    """Answers at k = 0 `{row: {user: [{id, output}]}}`, origins of what each row chose, and `same choice` of prime."""
    start = replace(start, settings=as_reproduced(start.settings))
    arms = arms_of(start.texts.task)
    answers: dict[str, dict[str, list]] = {name: {} for name in (*arms, CHOSEN_BY_TEST)}
    origins = {name: Counter[str]() for name in answers}
    same = []
    title = f"{start.texts.task.name}, seed {start.settings.seed}"
    with bar(min(users, len(start.users)), title, "user") as progress:
        for index, user in enumerate(start.users[:users]):
            start.engine.bank.load(start.pool.adapters(index))
            with tempfile.TemporaryDirectory() as scratch:
                searches = Searches(start, index, Path(scratch))
                chosen = {name: searches.chosen(arm) for name, arm in arms.items()}
                evaluated = searches.evaluations(ARMS[REFERENCE])
                same.append(searches.same_choice())
            deployed = deployed_by_arms(start, user, chosen)
            deployed[CHOSEN_BY_TEST] = chosen_by_test(start, user, evaluated)
            for name, row in deployed.items():
                answers[name][user.user_id] = row.answers
                origins[name].update(row.origins)
            progress.update()
    return {"answers": answers, "origins": {name: dict(counts) for name, counts in origins.items()}, "same": same}


def deployed_by_arms(start: demo_runs.Start, user: User, chosen: Mapping[str, Evaluation]) -> dict[str, Deployed]:
    """What each arm deploys answers the user's queries; all of a rule together."""
    weights: dict[str, dict[str, Tensor]] = {}
    for name, evaluation in chosen.items():
        rule = ARMS[name].settings(start.settings).search.merge_rule
        weights.setdefault(rule, {})[name] = evaluation.weights
    answers: dict[str, list] = {}
    for rule, weights_of_rule in weights.items():
        answers |= answered(start, user, weights_of_rule, rule)
    return {name: Deployed(answers[name], [evaluation.origin]) for name, evaluation in chosen.items()}


def answered(start: demo_runs.Start, user: User, weights: Mapping[str, Tensor], rule: str) -> dict[str, list]:
    """Answers to the user's queries at k = 0, without profile, by named weights."""
    settings = replace(start.settings, search=replace(start.settings.search, merge_rule=rule))
    setup = replace(start, settings=settings, texts=start.texts._replace(profiles=None)).setup()
    worked_with = stage.Stage(settings, setup, start.engine, start.pool, runs=())
    answers = stage.answer_queries(worked_with, user, weights, lambda _: None)
    return {name: by_setting["k0"] for name, by_setting in answers.items()}


def chosen_by_test(start: demo_runs.Start, user: User, evaluated: Sequence[Evaluation]) -> Deployed:
    """Each half of the user's questions is answered by the candidate that is best at the other half."""
    weights = {str(place): evaluation.weights for place, evaluation in enumerate(evaluated)}
    answers = answered(start, user, weights, start.settings.search.merge_rule)
    deployed = Deployed([], [])
    for half in (0, 1):
        losses = [query_loss(start, answers[name][1 - half :: 2]) for name in weights]
        best = int(np.argmin(losses))
        deployed.answers.extend(answers[str(best)][half::2])
        deployed.origins.append(evaluated[best].origin)
    return deployed


def query_loss(start: demo_runs.Start, samples: Sequence[Mapping[str, str]]) -> float:
    """The task's first metric of answers to test queries, lower is better."""
    task = start.texts.task
    name = task.metrics[0]
    golds = [start.golds[sample["id"]] for sample in samples]
    value = score([name], [sample["output"] for sample in samples], golds, task.choices)[name]
    return -value if METRICS[name].higher_is_better else value


def run_once(args: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """`run_one`, from the file where it ran before with as many users."""
    path = Path(args.output_dir) / f"seed{seed}" / task / f"ablation-{args.users}.json"
    if not path.exists():
        write_json(path, run_one(demo_runs.start(task, seed, args.output_dir), args.users))
    return read_json(path)


# -- tables ---------------------------------------------------------------------------------------------------------


def compare(name: str, by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per arm the score, its difference to prime's by user, and where the chosen came from."""
    task, golds = get_task(name), demo_runs.golds_of(name)
    totals = {}
    for arm in ROWS:
        if all(arm in run["answers"] for run in by_seed):
            totals[arm] = seeds.pooled([user_stats(task, run["answers"][arm], golds) for run in by_seed])
    rows = seeds.against(task, totals, REFERENCE)
    for arm, row in rows.items():
        row["origins"] = dict(sum((Counter(run["origins"][arm]) for run in by_seed), Counter[str]()))
    return {"rows": rows, "same_choice": fmean(chain.from_iterable(run["same"] for run in by_seed))}


def cells(task: str, row: Mapping[str, Any]) -> list[str]:
    """Score; its difference to prime's with the interval; users better and worse; what the chosen were."""
    metric = get_task(task).metrics[0]
    paired, gap = row["paired"], row["paired"][metric]
    return [
        f"{row['scores'][metric]['mean']:.3f}", f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]",
        f"{paired['better']} : {paired['worse']}",
        " / ".join(str(row["origins"].get(name, 0)) for name in ORIGINS),
    ]  # fmt: skip


def overview(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """All tasks beside each other: scores, with + and - where the paired interval to prime is clear of 0."""
    columns = {}
    for name, result in tables.items():
        task = get_task(name)
        metric = task.metrics[0]
        column = columns[f"{name}, {metric}"] = {}
        for arm, row in result["rows"].items():
            column[arm] = seeds.marked(row["scores"][metric]["mean"], seeds.verdict(task, row["paired"][metric]))
    return seeds.side_by_side("arm", ROWS, columns)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    tables = {}
    for task in demo_runs.tasks_of(args.tasks):
        tables[task] = compare(task, [run_once(args, task, seed) for seed in args.seeds])
    for task, table in tables.items():
        metric = get_task(task).metrics[0]
        better = "higher" if METRICS[metric].higher_is_better else "lower"
        print(f"\n**{task}**, {metric} ({better} is better); same choice {table['same_choice']:.2f}\n")
        rows = [[name, *cells(task, row)] for name, row in table["rows"].items()]
        print(markdown([["arm", "score", "to prime", "better : worse", " / ".join(ORIGINS)], *rows]))
    print(f"\n{overview(tables)}\n")
    print(json.dumps(tables))


if __name__ == "__main__":
    cli.run(main)
