"""Adapters of one's own merged by one's own pairs.

The pairs are the history of one user without a task: PriME's search (`prime.merging.evolution`) runs on it as it is.
What is searched is what is saved: every candidate is cut to the rank of the result before it answers. The saved file
is then read again, and answers beside the base, each adapter alone and their average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prime.bank.batching import every_pair
from prime.bank.decode import Progress
from prime.bank.encoding import Tokens
from prime.bank.identity import factors_identity
from prime.bank.lora import Adapter, merge, norm
from prime.bank.sampling import Sampler
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.engine import Engine
from prime.errors import InputError, tell
from prime.merging.evolution import Evaluation, choose, search_each
from prime.merging.population import Population, Setup
from prime.runs.journal import Journal
from prime.seeds import derive_seed
from prime.settings import FitnessSettings, SamplingSettings, SearchSettings
from prime.users.data import User
from prime.users.holdout import Split
from prime.users.metrics import Metric, bootstrap
from prime.users.own_metric import listed
from prime.users.pairs import Pair
from prime.users.tasks import Task
from prime.users.texts import Texts

FEWEST_PAIRS = 4
USER = "pairs"
BASE, UNIFORM, MERGED, ALONE = "base", "uniform", "merged", " alone"  # rows of the table; the last behind a name
WORDING = {"OPPU_input": "{input}", "OPPU_full": "{input}{output}", "retrieval_history": ""}

# -- pairs as a history ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Pairs, which of them are held out, and how answers to them are judged."""

    user: User  # the pairs as his history
    held_out: frozenset[int]  # positions of pairs
    texts: Texts
    metric: Metric

    @classmethod
    def of(
        cls, pairs: Sequence[Pair], metric: Metric, labels: tuple[str, ...] | None, share: float, seed: int
    ) -> "Question":
        """Equal pairs are held out together, see `prime.users.holdout.Split`."""
        task = Task(
            USER, USER, ("id", "input", "output"), "output", (metric.name,), "", labels=labels,
            history_metrics=(metric.name,), history_labels=labels,
        )  # fmt: skip
        items = [{"id": str(pair.line), "input": pair.input, "output": pair.target} for pair in pairs]
        user = User(USER, tuple(items))
        return cls(user, Split(share, seed).positions(user), Texts(task, WORDING, None), metric)

    @property
    def searched_by(self) -> User:
        """The pairs that are not held out."""
        kept = [item for place, item in enumerate(self.user.profile) if place not in self.held_out]
        return replace(self.user, profile=tuple(kept))

    @property
    def golds(self) -> list[str]:
        return [item["output"].strip() for item in self.user.profile]

    def scores(self, answers: Sequence[str]) -> dict[str, dict[str, float]]:
        """Of answers to all pairs: mean and interval on those searched by and on those held out."""
        choices = self.texts.task.history_choices
        parts: dict[str, list] = {"searched_by": [], "held_out": []}
        for place, (answer, gold) in enumerate(zip(answers, self.golds, strict=True)):
            part = "held_out" if place in self.held_out else "searched_by"
            parts[part].append(self.metric.stats(answer, gold, choices))
        return {part: bootstrap(np.array(rows), self.metric.finish)._asdict() for part, rows in parts.items()}


def check_pairs(path: str, pairs: Sequence[Pair]) -> None:
    """InputError where there are too few pairs to search by some and to judge by others."""
    different = len({(pair.input, pair.output) for pair in pairs})
    if different < FEWEST_PAIRS:
        raise InputError(f"{path}: {different} different pairs; give {FEWEST_PAIRS} or more (30 tell something)")


# -- merging --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merging:
    """What is merged, by what, and with which settings."""

    question: Question
    search: SearchSettings
    sampling: SamplingSettings
    engine: Engine
    adapters: Sequence[Adapter]
    seed: int
    journal: Journal
    progress: Progress | None = None

    def found(self, log: Path) -> Evaluation:
        """The candidate that the search chooses; `log`: a line for each."""
        fitness = FitnessSettings(train_gen_len=self.sampling.max_gen_len)
        setup = Setup(self.search, fitness, self.sampling, 0, self.question.texts, self.engine)
        self.engine.bank.load(self.adapters)
        user, n = self.question.searched_by, len(self.adapters)
        population = Population(setup, user, derive_seed(self.seed, USER), n, self.journal, self.progress)
        with listed(self.question.metric):
            return choose(search_each(population, self.search.sim_penalty, [log])[0], self.search)

    def merged(self, weights: Tensor) -> Adapter:
        """By weights `[n]`, cut to the rank of the result."""
        return merge(self.adapters, weights, self.search.merge_rule, self.search.keep_rank)

    def lost(self, weights: Tensor) -> float:
        """Share of the exact merge that the cut changes: norm of the difference over its norm."""
        exact = merge(self.adapters, weights, self.search.merge_rule)
        difference = merge([exact, self.merged(weights)], torch.tensor([1.0, -1.0]), "delta")
        return norm(difference) / norm(exact)

    def answers(self, rows: Mapping[str, Adapter | None]) -> dict[str, list[str]]:
        """Answers of each row's adapter (None: the base) to all pairs."""
        engine, items = self.engine, self.question.user.profile
        engine.bank.load([adapter for adapter in rows.values() if adapter is not None])
        records = [engine.encoder.record(item["id"], item["input"], item["output"]) for item in items]
        about = [(record.id, record.ids, record.target) for record in records]
        question = [factors_identity(engine.bank), engine.identity, about, list(rows)]
        tokens = self.journal.call(question, lambda: self._decode(len(rows), [[r.target[:-1]] for r in records]))
        texts = [[engine.encoder.text(ids) for ids in of_row] for of_row in tokens]
        return dict(zip(rows, texts, strict=True))

    def _decode(self, rows: int, drafts: list[list[Tokens]]) -> list[list[Tokens]]:
        """Token ids `[rows][pairs]`: of the base, then of the adapters in the bank."""
        items = self.question.user.profile
        prompts = [self.engine.encoder.prompt(item["id"], item["input"]) for item in items]
        limit = self.engine.limit(self.question.texts.task.history_labels, self.sampling.max_gen_len)
        sampler = Sampler(self.sampling.temperature, self.sampling.top_p, derive_seed(self.seed, USER))
        pairs = every_pair(range(-1, rows - 1), len(prompts))
        tokens = self.engine.answer(prompts, pairs, sampler, limit, drafts, self.progress)
        by_row = []
        for adapter in range(-1, rows - 1):
            by_row.append([tokens[adapter, place] for place in range(len(prompts))])
        return by_row


def merge_own(work: Merging, names: Sequence[str], folder: Path, base: str) -> dict[str, Any]:
    """Search, save the merged adapter as PEFT in `folder`, and judge what was saved; returns the result.

    Args:
        names: of the adapters.
        base: the model as the adapter names it.
    """
    best = work.found(folder / "evaluations.jsonl")
    rule, n = work.search.merge_rule, len(names)
    result: dict[str, Any] = {
        "adapters": list(names), "weights": best.weights.tolist(), "rule": rule, "origin": best.origin,
        "loss": best.loss, "utility": best.utility, "similarity": best.similarity, "metric": work.question.metric.name,
    }  # fmt: skip
    rows: dict[str, Adapter | None] = {BASE: None}
    rows |= {f"{name}{ALONE}": adapter for name, adapter in zip(names, work.adapters, strict=True)}
    rows[UNIFORM] = work.merged(torch.full((n,), 1 / n))
    if best.weights.any():
        merged = work.merged(best.weights)
        result |= {"rank": merged.rank, "lost": work.lost(best.weights)}
        save_adapter(merged, folder, base, {"base_model": base, **result})
        rows[MERGED] = load_adapter(folder)
    answers = work.answers(rows)
    result["scores"] = {name: work.question.scores(texts) for name, texts in answers.items()}
    result["held_out"] = [work.question.user.profile[place]["id"] for place in sorted(work.question.held_out)]
    ids = [item["id"] for item in work.question.user.profile]
    result["predictions"] = {}
    for name, texts in answers.items():
        result["predictions"][name] = [{"id": i, "output": text} for i, text in zip(ids, texts, strict=True)]
    return result


def told_of_few(held_out: int) -> None:
    """A word where scores are coarse."""
    if held_out < 10:
        tell(f"only {held_out} pairs are held out: their scores tell large differences only; give more pairs")
