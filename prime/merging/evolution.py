"""PriME's search for one user: candidates are merged, decoded and scored a whole population at a time.

The base (zero weights) and the single sharers (one-hot) have to be decoded anyway, since similarity is measured
against the sharers' own answers; they are the first evaluated candidates, for free. LoraHub's objective scores the
history's targets and decodes nothing.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prime import cli
from prime.bank.batching import every_pair
from prime.bank.decode import Progress
from prime.bank.encoding import EncodedPrompt, EncodedRecord, Tokens
from prime.bank.logprobs import target_logprobs
from prime.bank.lora import RULES
from prime.bank.sampling import Sampler
from prime.cli import Texts
from prime.engine import Engine
from prime.errors import InputError, tell
from prime.merging.objective import (
    METRIC_REDUCERS,
    PENALTIES,
    TRIAL_REDUCERS,
    Objective,
    Score,
    Trial,
    score_by_likelihood,
)
from prime.merging.optimizer import STEP, Points, Search, capped, is_pareto, lockstep, ranked_weights
from prime.runs.files import write_text
from prime.runs.journal import Journal
from prime.seeds import derive_seed
from prime.users.data import User
from prime.users.prompts import Record, history_records, query_records

STARTS = ("zero", "uniform", "ranked")
BASELINES = {"best_sharer": "zero", "uniform": "uniform"}  # and where their evaluations end: --start

Answers = list[list[str]]  # [repeats][records]
Measure = Callable[[Tensor], list[Any]]  # of candidates [c, n] or [c, n, l], all that a score needs


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One candidate: weights `[n]` or `[n, l]`, its scores, and where it came from (base, sharer, search)."""

    weights: Tensor
    loss: float
    utility: float
    similarity: float
    unpenalised: float  # the loss at penalty 0
    seconds: float
    origin: str
    cost: float = 0.0  # what the penalty weighs; not written down, it follows from the others

    def line(self) -> str:
        """All but the seconds, which differ from run to run, and the cost, which follows from the rest."""
        listed = {key: value for key, value in vars(self).items() if key not in ("seconds", "cost")}
        return json.dumps(listed | {"weights": self.weights.tolist()}) + "\n"


def add_search(parser: argparse.ArgumentParser) -> None:
    """Options of the search and of what it searches by."""
    search = parser.add_argument_group("search")
    search.add_argument("--n_sim", type=cli.natural, default=3, help="most similar sharers to merge; 0 = all")
    search.add_argument(
        "--opt_type",
        default="cma",
        help="cma, ngopt, tbpsa, or any optimizer of nevergrad; pareto: one search of utility and similarity at once, "
        "from which each --sim_penalty deploys its best",
    )
    search.add_argument("--opt_budget", type=cli.natural, default=10, help="candidates the search evaluates")
    search.add_argument(
        "--sim_penalty",
        type=cli.penalty_list,
        default="0.1",
        help="weight of resembling the sharers; several, with commas: the whole frontier, on shared evaluations, in "
        "<output_dir>/penalty-<p>; nll generates nothing to compare, so there it is 0 whatever is given",
    )
    search.add_argument(
        "--penalty",
        choices=tuple(PENALTIES),
        default="output",
        help="what --sim_penalty weighs: resemblance to the sharers' answers (published), how unevenly the weights "
        "are spread over the sharers (1 - normalised entropy), or their Euclidean norm",
    )
    search.add_argument(
        "--start",
        choices=STARTS,
        default="ranked",
        help="where the search begins: zero (published), the sharers' average, or one weighted by rank of their losses",
    )
    search.add_argument(
        "--step",
        type=cli.above_zero,
        default=0.3,
        help=f"standard deviation of its first candidates around the start (published: {STEP:g})",
    )
    search.add_argument("--merge_rule", choices=RULES, default="delta", help="factor is the published rule")
    search.add_argument(
        "--keep_rank",
        type=cli.natural,
        default=0,
        help="leading singular directions kept of each module's merged update, scaled to its size, of every candidate "
        "alike; 0 = all. Few of them hold what the sharers have in common and less of what each remembers",
    )
    search.add_argument(
        "--top_share",
        type=cli.fraction,
        default=1.0,
        help="largest share of sum |w| (of each layer's, with --piece_merge) that one sharer may have; candidates are "
        "cut to it, and a single sharer cannot win; 1 = no limit",
    )
    search.add_argument("--piece_merge", action="store_true", help="one weight per sharer and layer")
    search.add_argument(
        "--search_only", action="store_true", help="published selection: a single sharer, known beforehand, cannot win"
    )
    search.add_argument(
        "--baseline",
        choices=tuple(BASELINES),
        help="no search: deploy the single sharer that does best on the history, or the sharers' average, as a run of "
        "its own that mia.py can attack; the row is the one that comes with PriME",
    )
    fitness = parser.add_argument_group("fitness")
    fitness.add_argument(
        "--objective",
        choices=("metric", "nll"),
        default="metric",
        help="metric: of generated answers (PriME); nll: cross-entropy of the history's targets plus L1 of the weights "
        "(LoraHub), which does without the sampling, --num_repeat, --m_reduce, --t_reduce and --train_gen_len",
    )
    fitness.add_argument(
        "--fitness",
        choices=("history", "query"),
        default="history",
        help="what candidates answer: the history's records (published), or its items asked as test queries, which "
        "differ in citation; there wrong references come from user_base_LLM.json",
    )
    fitness.add_argument("--num_repeat", type=cli.positive, default=1, help="sampled decodings per evaluation")
    fitness.add_argument("--m_reduce", choices=tuple(METRIC_REDUCERS), default="sum", help="of a task's metrics")
    fitness.add_argument("--t_reduce", choices=tuple(TRIAL_REDUCERS), default="mean", help="of the repeats' losses")
    fitness.add_argument("--train_sample", type=cli.natural, default=0, help="history records drawn; 0 = all")
    cli.add_history_decoding(fitness)


def check_search(args: argparse.Namespace, n: int) -> None:
    """InputError where n sharers cannot keep to `--top_share`, there is nothing that pareto could trade, or a single
    sharer is to be deployed and must not be.
    """
    if args.top_share * n < 1:
        told = f"{n} sharers cannot all have less than 1 / {n} of the weights"
        raise InputError(f"--top_share {args.top_share:g}: {told}")
    if is_pareto(args.opt_type) and args.objective == "nll":
        raise InputError(f"--opt_type {args.opt_type}: --objective nll knows no resemblance to trade utility for")
    if args.baseline == "best_sharer" and (args.search_only or args.top_share < 1):
        raise InputError("--baseline best_sharer: under --search_only or --top_share no single sharer is deployed")


class Population:
    """A user's history and the machinery that answers it for many candidates at once.

    Only history records are read here: no test query reaches the search.
    """

    def __init__(
        self, args: argparse.Namespace, texts: Texts, engine: Engine, user: User, seed: int, n: int, journal: Journal,
        progress: Progress | None = None,
    ):  # fmt: skip
        self.args, self.engine, self.n = args, engine, n
        self.records = sample_records(fitness_records(args, texts, user, seed), args.train_sample, seed)
        self.golds = [record.target.strip() for record in self.records]
        self.prompts: list[EncodedPrompt] = [engine.encoder.prompt(r.id, r.input) for r in self.records]
        self.limit = engine.limit(texts.task.history_labels, args.train_gen_len)
        self.samplers = [
            Sampler(args.temperature, args.top_p, derive_seed(seed, "repeat", repeat))
            for repeat in range(args.num_repeat)
        ]
        self.encoded: list[EncodedRecord] = [engine.encoder.record(r.id, r.input, r.target) for r in self.records]
        # Gold answers are good drafts: they are what the sharers were trained to write.
        self.drafts: list[list[Tokens]] = [[record.target[:-1]] for record in self.encoded]
        self.progress = progress
        self.journal = journal
        self.about = [(record.id, record.ids, record.target) for record in self.encoded]
        self.shape = (n, engine.bank.layers) if args.piece_merge else (n,)

    def known_points(self) -> Tensor:
        """The base and the single sharers: `[1 + n, n]`, or `[1 + n, n, l]`."""
        points = torch.cat([torch.zeros(1, self.n), torch.eye(self.n)])
        return points[:, :, None].expand(-1, -1, self.shape[1]).clone() if len(self.shape) == 2 else points

    def answers(self, weights: Tensor) -> list[Answers]:
        """Answers of candidates `[c, n]` or `[c, n, l]` to all history records, once per repeat."""
        found: list[Answers] = [[] for _ in weights]
        for repeat, sampler in enumerate(self.samplers):
            asked = [self.about, weights.tolist(), repeat]
            tokens = self.journal.call(asked, partial(self._decode, weights, sampler))
            for answers, own in zip(found, tokens, strict=True):
                answers.append([self.engine.encoder.text(ids) for ids in own])
                for drafts, ids in zip(self.drafts, own, strict=True):
                    drafts.append(tuple(ids))
        return found

    def _decode(self, weights: Tensor, sampler: Sampler) -> list[list[Tokens]]:
        """Token ids `[c][records]` of each candidate's answers."""
        self.engine.bank.combine(weights, self.args.merge_rule, self.args.keep_rank)
        pairs = every_pair(range(len(weights)), len(self.prompts))
        tokens = self.engine.answer(self.prompts, pairs, sampler, self.limit, self.drafts, self.progress)
        return [[tokens[place, index] for index in range(len(self.prompts))] for place in range(len(weights))]

    def trials(self, objective: Objective) -> Measure:
        """PriME's measurement; the first candidates it sees have to be the base and the sharers."""
        sharers: list[Answers] = []

        def measure(weights: Tensor) -> list[list[Trial]]:
            answers = self.answers(weights)
            sharers.extend(answers[1:] if not sharers else [])
            return [objective.trials(own, sharers) for own in answers]

        return measure

    def logprobs(self, weights: Tensor) -> list[list[Tensor]]:
        """LoraHub's measurement: of each candidate, log-probabilities of the targets of all history records."""
        found = self.journal.call([self.about, weights.tolist()], partial(self._logprobs, weights))
        return [[torch.tensor(row) for row in rows] for rows in found]

    def _logprobs(self, weights: Tensor) -> list[list[list[float]]]:
        """`[c][records][target tokens]` log-probabilities under each candidate."""
        self.engine.bank.combine(weights, self.args.merge_rule, self.args.keep_rank)
        rows = range(len(self.encoded))
        pairs = every_pair(range(len(weights)), len(rows))
        found = target_logprobs(self.engine.bank, self.encoded, pairs, self.engine.max_batch_tokens, self.progress)
        return [[found[place, row].tolist() for row in rows] for place in range(len(weights))]


def fitness_records(args: argparse.Namespace, texts: Texts, user: User, seed: int) -> list[Record]:
    """What candidates answer: the history's records, or its items asked as test queries (`--fitness query`)."""
    if args.fitness == "query":
        return query_records(user, texts.task, texts.templates, texts.others, random.Random(seed), args.recent_k)
    profile = (texts.profiles or {}).get(user.user_id)
    return history_records(user, texts.task, texts.templates, profile, args.recent_k)


def sample_records(records: Sequence[Record], size: int, seed: int) -> list[Record]:
    """`size` of the records in their order, drawn by the user's seed; 0 = all."""
    if size == 0 or size >= len(records):
        return list(records)
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), size))]


def starting_point(start: str, losses: Sequence[float], shape: tuple[int, ...]) -> np.ndarray:
    """Weights of `shape` where the search begins: zero (published), the sharers' average, or their average weighted by
    the rank of each one's own loss, which is known before the search (`prime.merging.optimizer.ranked_weights`).
    """
    n = len(losses)
    weights = {"zero": np.zeros(n), "uniform": np.full(n, 1 / n), "ranked": ranked_weights(losses)}[start]
    exact = weights.astype(np.float32)  # as it is evaluated
    return np.broadcast_to(exact.reshape(-1, *[1] * (len(shape) - 1)), shape).copy()


class Memory:
    """Measurements by the exact weights: what several searches ask in common is measured once."""

    def __init__(self, measure: Measure, journal: Journal):
        self.measure, self.journal = measure, journal
        self.known: dict[bytes, tuple[Any, float]] = {}  # with its seconds

    def learn(self, weights: Tensor) -> None:
        """Measure those of the candidates `[c, n]` or `[c, n, l]` that are new, together."""
        new = {key_of(own): own for own in weights if key_of(own) not in self.known}
        if new:
            started, spared = time.perf_counter(), self.journal.spared
            found = self.measure(torch.stack(list(new.values())))
            seconds = (time.perf_counter() - started + self.journal.spared - spared) / len(new)
            self.known |= {key: (one, seconds) for key, one in zip(new, found, strict=True)}

    def __getitem__(self, weights: Tensor) -> tuple[Any, float]:
        return self.known[key_of(weights)]


def key_of(weights: Tensor) -> bytes:
    return weights.numpy().tobytes()


class Trace:
    """The evaluations of one objective in order, a line of `log` each.

    Args:
        score: makes a score of a measurement and the candidate's weights.
    """

    def __init__(self, score: Callable[[Any, Tensor], Score], log: Path):
        self.score, self.log = score, log
        self.found: list[Evaluation] = []

    def add(self, memory: Memory, weights: Tensor, origins: Sequence[str]) -> list[Evaluation]:
        """Enter candidates that the memory holds."""
        new = []
        for own, origin in zip(weights, origins, strict=True):
            measured, seconds = memory[own]
            s = self.score(measured, own)
            new.append(Evaluation(own, s.loss, s.utility, s.similarity, s.unpenalised, seconds, origin, s.cost))
        self.found += new
        write_text(self.log, "".join(one.line() for one in self.found))
        return new


def search_user(
    args: argparse.Namespace, texts: Texts, engine: Engine, user: User, n: int, logs: Sequence[Path],
    journal: Journal, progress: Progress,
) -> list[list[Evaluation]]:  # fmt: skip
    """At each penalty, all evaluated candidates of one user: the base first, then the n sharers loaded in the bank.

    What was evaluated before an interruption is in the journal, and is not evaluated again.
    """
    seed = derive_seed(args.seed, user.user_id)
    population = Population(args, texts, engine, user, seed, n, journal, progress)
    if not population.golds:
        deployed = args.baseline or "the base"
        tell(f"user {user.user_id}: an empty history, nothing to search by; {deployed} is deployed")
    objectives: list[Objective | None] = [None]
    if args.objective == "metric":
        objectives = [
            Objective(texts.task, population.golds, penalty, args.m_reduce, args.t_reduce, args.penalty)
            for penalty in args.sim_penalty
        ]
    return evolve(population, objectives, seed, logs)


def evolve(
    population: Population, objectives: Sequence[Objective | None], seed: int, logs: Sequence[Path]
) -> list[list[Evaluation]]:
    """Evaluate the base, the sharers, the starting point and `--opt_budget` candidates of the search.

    Args:
        objectives: PriME's at each penalty, which share all else; or one None: LoraHub's.
        logs: a file for each.

    Returns:
        For each objective all evaluations, a line of its log each: the base, the n sharers, the start unless it is
        the base, then the search's in order.
    """
    measure = population.logprobs if objectives[0] is None else population.trials(objectives[0])
    memory = Memory(measure, population.journal)
    scores = [score_by_likelihood if objective is None else objective.score for objective in objectives]
    traces = [Trace(score, log) for score, log in zip(scores, logs, strict=True)]
    known = population.known_points()
    memory.learn(known)
    for trace in traces:
        trace.add(memory, known, ["base"] + ["sharer"] * population.n)
    search = search_both if is_pareto(population.args.opt_type) else search_each
    search(population, memory, traces, seed)
    return [trace.found for trace in traces]


def search_each(population: Population, memory: Memory, traces: Sequence[Trace], seed: int) -> None:
    """A search for each trace, the one it would have alone; side by side, so that candidates that several ask are
    answered once, and all new ones together.
    """
    args, shape = population.args, population.shape

    def evaluate(points: Sequence[Tensor], origin: str) -> list[list[float]]:
        memory.learn(torch.cat(list(points)))
        entered = (t.add(memory, own, [origin] * len(own)) for t, own in zip(traces, points, strict=True))
        return [[one.loss for one in new] for new in entered]

    sharers = [trace.found[1 : 1 + population.n] for trace in traces]
    starts = [starting_point(args.start, [one.loss for one in own], shape) for own in sharers]
    evaluate([candidates([start] * bool(start.any()), args.top_share, shape) for start in starts], "start")
    searches = [Search(start, args.opt_type, args.opt_budget, seed, args.step) for start in starts]
    lockstep(searches, lambda asked: evaluate([candidates(own, args.top_share, shape) for own in asked], "search"))


def search_both(population: Population, memory: Memory, traces: Sequence[Trace], seed: int) -> None:
    """One search of both objectives at once, without a penalty; each trace scores all its points."""
    args, shape = population.args, population.shape

    def evaluate(points: Tensor, origin: str) -> list[list[float]]:
        memory.learn(points)
        entered = [trace.add(memory, points, [origin] * len(points)) for trace in traces]
        return [[one.unpenalised, one.cost] for one in entered[0]]

    known = traces[0].found[: 1 + population.n]
    start = starting_point(args.start, [one.unpenalised for one in known[1:]], shape)
    evaluate(candidates([start] * bool(start.any()), args.top_share, shape), "start")
    worst = [max(one.unpenalised for one in known), max(one.cost for one in known)]
    search = Search(start, args.opt_type, args.opt_budget, seed, args.step, worst)
    lockstep([search], lambda asked: [evaluate(candidates(asked[0], args.top_share, shape), "search")])


def candidates(points: Points, top_share: float, shape: tuple[int, ...]) -> Tensor:
    """What is evaluated, and maybe deployed, of the points that a search asks: `[c, *shape]`, also where c is 0."""
    own = [capped(point, top_share) for point in points] if top_share < 1 else points
    return torch.tensor(np.array(own), dtype=torch.float32).reshape(-1, *shape)


def chosen(args: argparse.Namespace, evaluations: Sequence[Evaluation], n: int) -> Evaluation:
    """What is deployed: the evaluated candidate of lowest loss. No single one of the n sharers, where the options say
    so, or where they limit a sharer's share. With `--baseline` that baseline, whatever its loss.
    """
    if args.baseline:
        return best_sharer(evaluations, n) if args.baseline == "best_sharer" else evaluations[-1]
    eligible = [evaluations[0], *evaluations[1 + n :]] if args.search_only or args.top_share < 1 else evaluations
    return min(eligible, key=lambda one: one.loss)


def best_sharer(evaluations: Sequence[Evaluation], n: int) -> Evaluation:
    """The best single one of the n sharers, without any penalty."""
    return min(evaluations[1 : 1 + n], key=lambda one: one.unpenalised)


def distinct(*traces: Sequence[Evaluation]) -> int:
    """How many candidates had to be answered for all these evaluations."""
    return len({key_of(one.weights) for trace in traces for one in trace})
