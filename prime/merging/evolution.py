"""PriME's search for one user, top to bottom.

The base (zero weights) and the single sharers (one-hot weights) are evaluated first: similarity is measured against
the sharers' own answers, so they have to be decoded anyway. The search starts at an average of the sharers, asks a
generation of candidates, has them merged, answered and scored together, and tells their losses to the optimizer,
until its budget is spent. The best *evaluated* candidate is chosen.

Several penalties make several searches over one memo, in which no candidate is measured twice.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prime.errors import InputError
from prime.merging.objective import Objective, Score, score_by_likelihood
from prime.merging.optimizer import Search, is_pareto, ranked_weights
from prime.merging.population import Measure, Population
from prime.runs.files import write_text
from prime.settings import FitnessSettings, SearchSettings

ScoreOf = Callable[[Any, Tensor], Score]  # of a measurement and the candidate's weights


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One candidate: weights `[n]` or `[n, l]`, its scores, and its origin: base, sharer, start or search."""

    weights: Tensor
    loss: float
    utility: float
    similarity: float
    unpenalised: float  # the loss at penalty 0
    seconds: float
    origin: str
    cost: float = 0.0  # what the penalty weighs

    def line(self) -> str:
        """All but the seconds, which differ from run to run, and the cost, which follows from the rest."""
        listed = {key: value for key, value in vars(self).items() if key not in ("seconds", "cost")}
        return json.dumps(listed | {"weights": self.weights.tolist()}) + "\n"


def check_search(search: SearchSettings, fitness: FitnessSettings) -> None:
    """InputError where there is nothing that pareto could trade."""
    if is_pareto(search.opt_type) and fitness.objective == "nll":
        raise InputError(f"--opt_type {search.opt_type}: --objective nll knows no resemblance to trade utility for")


def search_each(
    population: Population, penalties: Sequence[float], logs: Sequence[Path]
) -> list[list[Evaluation]]:
    """At each penalty, all evaluated candidates of one user; the searches share what they ask in common.

    Args:
        penalties: of resembling the sharers; LoraHub's objective knows none.
        logs: a file for each penalty.
    """
    settings, fitness = population.setup.search, population.setup.fitness
    if fitness.objective == "nll":
        memo = Memo(population, population.logprobs)
        return [evolve(memo, score_by_likelihood, settings, population.seed, logs[0])]
    task, reducers = population.setup.texts.task, (fitness.m_reduce, fitness.t_reduce, fitness.unknown_answers)
    objectives = [Objective(task, population.golds, penalty, *reducers) for penalty in penalties]
    # Any of the objectives serves: utility and similarity do not depend on the penalty, which only `score` weighs.
    memo = Memo(population, population.trials(objectives[0]))
    searches = []
    for objective, log in zip(objectives, logs, strict=True):
        searches.append(evolve(memo, objective.score, settings, population.seed, log))
    return searches


def evolve(memo: "Memo", score: ScoreOf, settings: SearchSettings, seed: int, log: Path) -> list[Evaluation]:
    """One search of one objective: all evaluated candidates, in their order, each also a line of `log`.

    A baseline asks for no search: best_sharer ends with the sharers, uniform with their average as the start. Nor is
    there one where there is no history to search by.

    Args:
        score: the objective, at its penalty.
        seed: of the user.
    """
    n, shape = memo.population.n, memo.population.shape
    pareto = is_pareto(settings.opt_type)
    trace = Trace(memo, score, log)

    # 1. The base and the single sharers.
    known = trace.evaluate(memo.population.known_points(), ["base"] + ["sharer"] * n)
    if settings.baseline == "best_sharer" or not (memo.population.golds or settings.baseline):
        return trace.evaluations

    # 2. Where the search starts; zero weights are the base, which is evaluated already.
    losses = [sharer.unpenalised if pareto else sharer.loss for sharer in known[1:]]
    start = starting_point("uniform" if settings.baseline else settings.start, losses, shape)
    if start.any():
        trace.evaluate(as_weights([start], shape), ["start"])
    if settings.baseline:
        return trace.evaluations

    # 3. Ask, evaluate, tell.
    worst = [max(e.unpenalised for e in known), max(e.cost for e in known)] if pareto else []
    search = Search(start, settings.opt_type, settings.opt_budget, seed, settings.step, worst)
    while search.open:
        points = search.ask()
        generation = trace.evaluate(as_weights(points, shape), ["search"] * len(points))
        search.tell([[e.unpenalised, e.cost] if pareto else e.loss for e in generation])
    return trace.evaluations


def choose(evaluations: Sequence[Evaluation], settings: SearchSettings) -> Evaluation:
    """What is deployed: the evaluated candidate of lowest loss; with `--baseline` that baseline, whatever its loss.

    Of equal losses the first evaluated wins. Published selection (`--search_only`): no single sharer may win, and the
    base has to be better than all that was searched. A pareto search too deploys by its loss, that of the penalty at
    hand.
    """
    if settings.baseline == "best_sharer":
        return best_sharer(evaluations)
    if settings.baseline == "uniform":
        return next(evaluation for evaluation in evaluations if evaluation.origin == "start")
    eligible = list(evaluations)
    if settings.search_only:
        searched = [evaluation for evaluation in evaluations if evaluation.origin in ("start", "search")]
        eligible = searched + [evaluation for evaluation in evaluations if evaluation.origin == "base"]
    return min(eligible, key=lambda evaluation: evaluation.loss)


def sharers_of(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The single sharers, most similar first."""
    return [evaluation for evaluation in evaluations if evaluation.origin == "sharer"]


def best_sharer(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The best single sharer, without any penalty."""
    return min(sharers_of(evaluations), key=lambda evaluation: evaluation.unpenalised)


# -- the parts ------------------------------------------------------------------------------------------------------


def starting_point(start: str, losses: Sequence[float], shape: tuple[int, ...]) -> np.ndarray:
    """Weights of `shape` where the search begins: zero (published), the sharers' average, or their average weighted by
    the rank of each one's own loss, which is known before the search (`prime.merging.optimizer.ranked_weights`).
    """
    n = len(losses)
    weights = {"zero": np.zeros(n), "uniform": np.full(n, 1 / n), "ranked": ranked_weights(losses)}[start]
    exact = weights.astype(np.float32)  # as it is evaluated
    return np.broadcast_to(exact.reshape(-1, *[1] * (len(shape) - 1)), shape).copy()


def as_weights(points: Sequence[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    """The candidates of a search's points: `[c, *shape]`, fp32."""
    return torch.tensor(np.array(points), dtype=torch.float32).reshape(-1, *shape)


class Memo:
    """Measurements by the exact weights: what several searches ask in common is measured once."""

    def __init__(self, population: Population, measure: Measure):
        self.population, self.measure = population, measure
        self.measured: dict[bytes, tuple[Any, float]] = {}  # by weights: the measurement, and the seconds it took

    def learn(self, candidates: Tensor) -> None:
        """Measure those of the candidates `[c, n]` or `[c, n, l]` that are new, together."""
        new = {key_of(weights): weights for weights in candidates if key_of(weights) not in self.measured}
        if new:
            journal = self.population.journal  # `spared`: seconds of what was measured before an interruption
            started, spared = time.perf_counter(), journal.spared
            measurements = self.measure(torch.stack(list(new.values())))
            seconds = (time.perf_counter() - started + journal.spared - spared) / len(new)
            for key, measurement in zip(new, measurements, strict=True):
                self.measured[key] = measurement, seconds

    def __getitem__(self, weights: Tensor) -> tuple[Any, float]:
        return self.measured[key_of(weights)]


def key_of(weights: Tensor) -> bytes:
    return weights.numpy().tobytes()


class Trace:
    """The evaluations of one objective in order, a line of `log` each."""

    def __init__(self, memo: Memo, score: ScoreOf, log: Path):
        self.memo, self.score, self.log = memo, score, log
        self.evaluations: list[Evaluation] = []

    def evaluate(self, candidates: Tensor, origins: Sequence[str]) -> list[Evaluation]:
        """Evaluate candidates `[c, n]` or `[c, n, l]` together."""
        self.memo.learn(candidates)
        new = []
        for weights, origin in zip(candidates, origins, strict=True):
            measured, seconds = self.memo[weights]
            s = self.score(measured, weights)
            new.append(Evaluation(weights, s.loss, s.utility, s.similarity, s.unpenalised, seconds, origin, s.cost))
        self.evaluations += new
        write_text(self.log, "".join(evaluation.line() for evaluation in self.evaluations))
        return new
