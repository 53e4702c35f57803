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

import numpy as np
import torch
from torch import Tensor

from prime.cli import Texts
from prime.data import User
from prime.decode import EncodedPrompt, EncodedRecord, Progress, Tokens, every_pair, score
from prime.engine import Engine
from prime.fitness import Objective, Score, likelihood_score
from prime.journal import Journal
from prime.prompts import Record, history_records, query_records
from prime.runs import derive_seed, write_text
from prime.sampling import Sampler
from prime.search import minimise, ranked_weights

STARTS = ("zero", "uniform", "ranked")

Answers = list[list[str]]  # [repeats][records]
Scorer = Callable[[Tensor], list[Score]]  # scores of candidates [c, n] or [c, n, l]


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

    def line(self) -> str:
        """All but the seconds, which differ from run to run."""
        listed = {key: value for key, value in vars(self).items() if key != "seconds"}
        return json.dumps(listed | {"weights": self.weights.tolist()}) + "\n"


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
        self.engine.bank.combine(weights, self.args.merge_rule)
        pairs = every_pair(range(len(weights)), len(self.prompts))
        tokens = self.engine.answer(self.prompts, pairs, sampler, self.limit, self.drafts, self.progress)
        return [[tokens[place, index] for index in range(len(self.prompts))] for place in range(len(weights))]

    def metric_scorer(self, objective: Objective) -> Scorer:
        """PriME's objective; the first candidates it sees have to be the base and the sharers."""
        sharers: list[Answers] = []

        def scores(weights: Tensor) -> list[Score]:
            answers = self.answers(weights)
            sharers.extend(answers[1:] if not sharers else [])
            return [objective(own, sharers) for own in answers]

        return scores

    def likelihood_scores(self, weights: Tensor) -> list[Score]:
        """LoraHub's objective: the targets of all history records under each candidate."""
        found = self.journal.call([self.about, weights.tolist()], partial(self._logprobs, weights))
        tensors = [[torch.tensor(row) for row in rows] for rows in found]
        return [likelihood_score(own, of_records) for own, of_records in zip(weights, tensors, strict=True)]

    def _logprobs(self, weights: Tensor) -> list[list[list[float]]]:
        """`[c][records][target tokens]` log-probabilities under each candidate."""
        self.engine.bank.combine(weights, self.args.merge_rule)
        rows = range(len(self.encoded))
        pairs = every_pair(range(len(weights)), len(rows))
        found = score(self.engine.bank, self.encoded, pairs, self.engine.max_batch_tokens, self.progress)
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


def starting_point(start: str, sharers: Sequence[Evaluation], shape: tuple[int, ...]) -> Tensor:
    """Weights of `shape` where the search begins: zero (published), the sharers' average, or their average weighted by
    the rank of each one's own loss, which is known before the search (`prime.search.ranked_weights`).
    """
    weights = {
        "zero": torch.zeros(len(sharers)),
        "uniform": torch.full((len(sharers),), 1 / len(sharers)),
        "ranked": torch.tensor(ranked_weights([one.loss for one in sharers]), dtype=torch.float32),
    }[start]
    return weights.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


def evolve(population: Population, objective: Objective | None, seed: int, log: Path) -> list[Evaluation]:
    """Evaluate the base, the sharers, the starting point and `--opt_budget` candidates of the search.

    Args:
        objective: PriME's; None: LoraHub's.

    Returns:
        All evaluations, a line of `log` each: the base, the n sharers, the start unless it is the base, then the
        search's in order.
    """
    args = population.args
    scorer: Scorer = population.likelihood_scores if objective is None else population.metric_scorer(objective)
    found: list[Evaluation] = []

    def evaluate(weights: Tensor, origins: list[str]) -> list[float]:
        started, spared = time.perf_counter(), population.journal.spared
        scores = scorer(weights)
        seconds = (time.perf_counter() - started + population.journal.spared - spared) / len(weights)
        found.extend(
            Evaluation(w, s.loss, s.utility, s.similarity, s.unpenalised, seconds, origin)
            for w, s, origin in zip(weights, scores, origins, strict=True)
        )
        write_text(log, "".join(one.line() for one in found))
        return [one.loss for one in found[-len(weights) :]]

    def evaluate_points(points: list[np.ndarray]) -> list[float]:
        return evaluate(torch.tensor(np.stack(points), dtype=torch.float32), ["search"] * len(points))

    evaluate(population.known_points(), ["base"] + ["sharer"] * population.n)
    start = starting_point(args.start, found[1:], population.shape)
    if start.any():
        evaluate(start[None], ["start"])
    minimise(start.numpy(), evaluate_points, args.opt_type, args.opt_budget, seed, args.step)
    return found
