"""An audit of any adapter by two files of records (`prime.attack.audit_settings` tells what is read and written)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prime.attack.audit_settings import AuditSettings
from prime.attack.intervals import Units, set_summaries
from prime.attack.scoring import Evidence, record_scores, rmia_ratio
from prime.bank.batching import Pair as Row
from prime.bank.batching import every_pair
from prime.bank.encoding import EncodedRecord, Encoder
from prime.bank.logprobs import target_logprobs
from prime.engine import Engine
from prime.errors import InputError
from prime.merging.own import open_own, own_engine
from prime.runs.progress import bar
from prime.users.pairs import Pair, check_apart, read_pairs

BASE, ADAPTER = -1, 0  # in the bank; the references follow
SIDES = ("members", "non_members")

Scores = dict[str, np.ndarray]  # by attack [x]


@dataclass(frozen=True)
class Audit:
    """Scores of all records, members first; lines, users and sides are the pairs'."""

    pairs: Sequence[Pair]
    units: Units
    scores: Scores
    blind: Scores  # the same attacks on the base

    def summaries(self, seed: int) -> dict[str, dict[str, Any]]:
        """By attack what it finds on the adapter and on the base; an attack that lacks something is left out."""
        scores = {("adapter", name): values for name, values in self.scores.items()}
        scores |= {("base", name): values for name, values in self.blind.items()}
        found = set_summaries(scores, self.units, seed=seed)
        return {name: {"adapter": found["adapter", name], "base": found["base", name]} for name in self.scores}


def audit(settings: AuditSettings) -> Audit:
    """Score all records; both files are checked before anything is loaded."""
    if Path(settings.members).resolve() == Path(settings.non_members).resolve():
        raise InputError(f"--members and --non_members are the same file, {settings.members}; give two")
    members = read_pairs(settings.members, texts=True)
    non_members = read_pairs(settings.non_members, texts=True)
    check_apart(settings.members, members, settings.non_members, non_members)
    pairs, is_member = [*members, *non_members], [True] * len(members) + [False] * len(non_members)
    users = [pair.user for pair in pairs]
    adapters = open_own([settings.adapter, *(settings.references or ())], settings.model)
    engine = own_engine(settings.model, settings.prompts, adapters)
    engine.bank.load(adapters)
    records = encoded_records(engine.encoder, pairs)
    evidence = Statistics.of(engine, records, range(1, len(adapters)))
    own = np.array(users) if all(users) else np.arange(len(pairs))
    others = Others(np.array(is_member), own)
    texts = [pair.output for pair in pairs]
    scores = [by_attack(evidence.evidence(model, texts, others)) for model in (ADAPTER, BASE)]
    return Audit(pairs, Units.choose(users, is_member), *scores)


def encoded_records(encoder: Encoder, pairs: Sequence[Pair]) -> list[EncodedRecord]:
    """As the model reads them; a text without input is no turn of a chat, and its first token is not scored where
    nothing stands in front of it.
    """
    plain = Encoder(encoder.tokenizer, encoder.max_length, encoder.embeddings, "off")
    records = []
    for place, pair in enumerate(pairs):
        record = (encoder if pair.input else plain).record(f"record {place}", pair.input, pair.target)
        first = record.target[:1] if not record.ids else ()
        records.append(replace(record, ids=record.ids + first, target=record.target[len(first) :]))
    return records


def by_attack(evidence: Iterator[Evidence]) -> Scores:
    """Of every attack that all records have what it needs for.

    Each record is scored by itself: a population of thousands is not kept for all of them.
    """
    scores = [record_scores([one]) for one in evidence]
    common = [name for name in scores[0] if all(name in of_record for of_record in scores)]
    return {name: np.array([of_record[name][0] for of_record in scores]) for name in common}


@dataclass(frozen=True)
class Others:
    """Whose records RMIA compares a record with: non-members of other owners."""

    is_member: np.ndarray  # [x]
    owner: np.ndarray  # [x] user, or the record itself

    def ratios(self, ratios: np.ndarray, place: int) -> np.ndarray:
        """Of all records `[x]` those that the one at `place` is compared with, in ascending order."""
        return np.sort(ratios[~self.is_member & (self.owner != self.owner[place])])


@dataclass(frozen=True)
class Statistics:
    """What the models say of each record: `[3, t]` under base and adapter, mean token log-probabilities of others."""

    tokens: dict[int, list[np.ndarray]]  # by model
    references: np.ndarray  # [x, m]

    @classmethod
    def of(cls, engine: Engine, records: Sequence[EncodedRecord], references: Sequence[int]) -> "Statistics":
        moments: dict[Row, Any] = {}
        with bar(len(records) * (2 + len(references)), "records") as progress:
            more = engine.max_batch_tokens, progress.update
            found = target_logprobs(engine.bank, records, every_pair((BASE, ADAPTER), len(records)), *more, moments)
            others = target_logprobs(engine.bank, records, every_pair(references, len(records)), *more)
        tokens = {}
        for model in (BASE, ADAPTER):
            rows = range(len(records))
            tokens[model] = [np.vstack([found[model, i].numpy(), moments[model, i].numpy()]) for i in rows]
        means = np.empty((len(records), len(references)))
        for column, reference in enumerate(references):
            means[:, column] = [float(others[reference, i].mean()) for i in range(len(records))]
        return cls(tokens, means)

    def evidence(self, model: int, texts: Sequence[str], others: Others) -> Iterator[Evidence]:
        """What an attack on the model looks at, record by record."""
        rows, with_references = self.tokens[model], self.references.shape[1] > 0
        means = np.array([row[0].mean() for row in rows])
        ratios = rmia_ratio(means, self.references) if with_references else np.empty(0)
        for place, (logprobs, mean, std) in enumerate(rows):
            base, references = self.tokens[BASE][place][0], self.references[place]
            population = others.ratios(ratios, place) if with_references else ratios
            yield Evidence(logprobs, base, mean, std, texts[place], references, population)
