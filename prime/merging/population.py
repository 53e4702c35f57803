"""A test user's history, and the machinery that answers it for many merged candidates at once."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prime.bank.batching import every_pair
from prime.bank.decode import Progress
from prime.bank.encoding import EncodedPrompt, Tokens
from prime.bank.identity import factors_identity
from prime.bank.logprobs import target_logprobs
from prime.bank.sampling import Sampler
from prime.engine import Engine
from prime.merging.objective import Objective, Trial
from prime.runs.journal import Journal
from prime.seeds import derive_seed
from prime.settings import FitnessSettings, SamplingSettings, SearchSettings
from prime.users.data import User
from prime.users.prompts import Record, history_records, query_records
from prime.users.texts import Texts

Answers = list[list[str]]  # [repeats][records]
Measure = Callable[[Tensor], list[Any]]  # of candidates [c, n] or [c, n, l], all that a score needs


@dataclass(frozen=True)
class Setup:
    """What the searches of all users have in common."""

    search: SearchSettings
    fitness: FitnessSettings
    sampling: SamplingSettings
    recent_k: int  # history items that are asked, the last ones; 0 = all
    texts: Texts
    engine: Engine


class Population:
    """A user's history and the machinery that answers it for many candidates at once.

    Only history records are read here: no test query reaches the search.

    Args:
        seed: of the user.
        n: sharers, whose adapters are loaded in the bank.
        journal: answers every decoding that was done before an interruption.
    """

    def __init__(
        self, setup: Setup, user: User, seed: int, n: int, journal: Journal, progress: Progress | None = None
    ):
        self.setup, self.engine, self.n, self.seed = setup, setup.engine, n, seed
        self.journal, self.progress = journal, progress
        fitness, sampling, encoder = setup.fitness, setup.sampling, setup.engine.encoder
        self.records = sample_records(fitness_records(setup, user, seed), fitness.train_sample, seed)
        self.golds = [record.target.strip() for record in self.records]
        self.prompts: list[EncodedPrompt] = [encoder.prompt(record.id, record.input) for record in self.records]
        self.encoded = self.engine.encode_records(self.records)
        self.limit = self.engine.limit(setup.texts.task.history_labels, fitness.train_gen_len)
        self.samplers = []
        for repeat in range(fitness.num_repeat):
            noise = derive_seed(seed, "repeat", repeat)
            self.samplers.append(Sampler(sampling.temperature, sampling.top_p, noise))
        # Gold answers are good drafts: they are what the sharers were trained to write.
        self.drafts: list[list[Tokens]] = [[record.target[:-1]] for record in self.encoded]
        self.about = [(record.id, record.ids, record.target) for record in self.encoded]
        # In every question to the journal: sharers or a model trained anew answer otherwise.
        self.asked = factors_identity(self.engine.bank), self.engine.identity
        self.shape = (n, self.engine.bank.layers) if setup.search.piece_merge else (n,)

    def known_points(self) -> Tensor:
        """The base and the single sharers: `[1 + n, n]`, or `[1 + n, n, l]`."""
        points = torch.cat([torch.zeros(1, self.n), torch.eye(self.n)])
        return points[:, :, None].expand(-1, -1, self.shape[1]).clone() if len(self.shape) == 2 else points

    def answers(self, weights: Tensor) -> list[Answers]:
        """Answers of candidates `[c, n]` or `[c, n, l]` to all history records, once per repeat."""
        answers: list[Answers] = [[] for _ in weights]
        for repeat, sampler in enumerate(self.samplers):
            question = [self.asked, self.about, weights.tolist(), repeat]
            tokens = self.journal.call(question, partial(self._decode, weights, sampler))
            for answers_of_candidate, tokens_of_candidate in zip(answers, tokens, strict=True):
                answers_of_candidate.append([self.engine.encoder.text(ids) for ids in tokens_of_candidate])
                for drafts, ids in zip(self.drafts, tokens_of_candidate, strict=True):
                    drafts.append(tuple(ids))
        return answers

    def _decode(self, weights: Tensor, sampler: Sampler) -> list[list[Tokens]]:
        """Token ids `[c][records]` of each candidate's answers."""
        self._combine(weights)
        records = range(len(self.prompts))
        pairs = every_pair(range(len(weights)), len(self.prompts))
        tokens = self.engine.answer(self.prompts, pairs, sampler, self.limit, self.drafts, self.progress)
        by_candidate = []
        for candidate in range(len(weights)):
            by_candidate.append([tokens[candidate, record] for record in records])
        return by_candidate

    def _combine(self, weights: Tensor) -> None:
        self.engine.bank.combine(weights, self.setup.search.merge_rule, self.setup.search.keep_rank)

    def trials(self, objective: Objective) -> Measure:
        """PriME's measurement; the first candidates it is asked for have to be the base and the sharers, whose answers
        the similarity is measured against.
        """
        sharers: list[Answers] = []

        def measure(weights: Tensor) -> list[list[Trial]]:
            answers = self.answers(weights)
            sharers.extend(answers[1:] if not sharers else [])
            return [objective.trials(answers_of_candidate, sharers) for answers_of_candidate in answers]

        return measure

    def logprobs(self, weights: Tensor) -> list[list[Tensor]]:
        """LoraHub's measurement: of each candidate, log-probabilities of the targets of all history records."""
        values = self.journal.call([self.asked, self.about, weights.tolist()], partial(self._logprobs, weights))
        tensors = []
        for values_of_candidate in values:
            tensors.append([torch.tensor(record) for record in values_of_candidate])
        return tensors

    def _logprobs(self, weights: Tensor) -> list[list[list[float]]]:
        """`[c][records][target tokens]` log-probabilities under each candidate."""
        self._combine(weights)
        records = range(len(self.encoded))
        pairs = every_pair(range(len(weights)), len(records))
        scored = target_logprobs(self.engine.bank, self.encoded, pairs, self.engine.max_batch_tokens, self.progress)
        by_candidate = []
        for candidate in range(len(weights)):
            by_candidate.append([scored[candidate, record].tolist() for record in records])
        return by_candidate


def fitness_records(setup: Setup, user: User, seed: int) -> list[Record]:
    """What candidates answer: the history's records, or its items asked as test queries (`--fitness query`)."""
    texts = setup.texts
    if setup.fitness.fitness == "query":
        return query_records(user, texts.task, texts.templates, texts.others, random.Random(seed), setup.recent_k)
    profile = texts.profile_of(user.user_id)
    return history_records(user, texts.task, texts.templates, profile, setup.recent_k)


def sample_records(records: Sequence[Record], size: float, seed: int) -> list[Record]:
    """`size` of the records in their order, drawn by the user's seed; below 1 a share of them, 0 = all."""
    size = max(1, round(size * len(records))) if 0 < size < 1 else int(size)
    if size == 0 or size >= len(records):
        return list(records)
    places = sorted(random.Random(seed).sample(range(len(records)), size))
    return [records[place] for place in places]
