"""What the attacks look at: token statistics of all owners' records under the attacked, the base and reference models.

One pass over all owners' records gives everything; the attacks' formulas are in `prime.attack.scoring`.
"""
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prime.attack import scoring
from prime.attack.scoring import Evidence
from prime.attack.subjects import Owners, Subject
from prime.bank.batching import Pair, every_pair
from prime.bank.encoding import EncodedRecord, Encoder
from prime.bank.logprobs import target_logprobs
from prime.bank.lora import Adapter
from prime.checkpoints.published import open_adapter
from prime.engine import Engine
from prime.errors import InputError
from prime.runs.progress import bar
from prime.seeds import derive_seed
from prime.users.data import User
from prime.users.holdout import check_split, records_of, trained_split
from prime.users.prompts import Record
from prime.users.texts import Texts


@dataclass(frozen=True)
class Attacked:
    """A record as the attacks need it: as ids to score, its target as text, and whether nothing trained on it."""

    encoded: EncodedRecord
    text: str
    held_out: bool


Records = Mapping[str, Sequence[Attacked]]  # by owner
TokenStatistics = Mapping[str, Sequence[np.ndarray]]  # by owner: [3, t] of each record, see `Scorer`


def owned_records(
    owners: Owners, users: Sequence[User], texts: Texts, encoder: Encoder, recent_k: int, max_records: int
) -> Records:
    """Each owner's last `max_records` records (0: all), checked against what his adapter's run wrote down.

    Args:
        users: who the owners may be, with their histories.
        recent_k: history items whose records are attacked, the last ones, of however many were trained on; 0 = all.
    """
    known = {user.user_id: user for user in users}
    split = trained_split(owners.folder)
    records_by_owner = {}
    for result in owners.results:
        name = result["user_id"]
        if name not in known:
            raise InputError(f"{owners.folder}: anchor {name} is not among the users of --data_dir")
        records = records_of(texts, known[name], split.recent_k, split)
        check_split(owners.folder, result, records)
        first = len(known[name].profile) - recent_k if recent_k else 0
        records = [record for record in records if record.position >= first]
        records_by_owner[name] = [attacked_record(encoder, record) for record in records[-max_records:]]
    return records_by_owner


def attacked_record(encoder: Encoder, record: Record) -> Attacked:
    encoded = encoder.record(record.id, record.input, record.target)
    return Attacked(encoded, record.target, record.held_out)


@dataclass
class Scorer:
    """Token statistics `[3, t]` of all records: log-probability, and its `Evidence` mean and deviation.

    Those of the base and of the owners' adapters are kept, since they come again: as references and as subjects. An
    owner's adapter is always scored together with the same others, so no figure depends on what was scored before.
    """

    engine: Engine
    records: Records
    adapters_at_once: int
    owned: Sequence[Path]  # the owners' adapters
    model: str  # directory of the base model
    kept: dict[Path, TokenStatistics] = field(default_factory=dict)

    @cached_property
    def base(self) -> TokenStatistics:
        return self._pass([-1])[0]

    def of(self, adapters: Sequence[Path]) -> dict[Path, TokenStatistics]:
        """By adapter."""
        for start in range(0, len(self.owned), self.adapters_at_once):
            chunk = self.owned[start : start + self.adapters_at_once]
            if any(adapter in adapters and adapter not in self.kept for adapter in chunk):
                self.kept |= self._together(chunk)
        scored = {adapter: self.kept[adapter] for adapter in adapters if adapter in self.kept}
        others = [adapter for adapter in dict.fromkeys(adapters) if adapter not in scored]
        for start in range(0, len(others), self.adapters_at_once):
            scored |= self._together(others[start : start + self.adapters_at_once])
        return scored

    def _together(self, adapters: Sequence[Path]) -> dict[Path, TokenStatistics]:
        self.engine.bank.load([open_adapter(adapter, self.model) for adapter in adapters])
        return dict(zip(adapters, self._pass(range(len(adapters))), strict=True))

    def _pass(self, adapters: Sequence[int]) -> list[TokenStatistics]:
        """All records under adapters in the bank (-1: the base)."""
        encoded: list[EncodedRecord] = []
        for records in self.records.values():
            encoded += [record.encoded for record in records]
        rows = self._rows(encoded, every_pair(adapters, len(encoded)))
        return [self._by_owner([rows[adapter, index] for index in range(len(encoded))]) for adapter in adapters]

    def of_pieces(self, pieces: Sequence[Adapter], owners: Sequence[str]) -> list[Sequence[np.ndarray]]:
        """The records of one owner under each of the pieces of adapters."""
        scored: list[Sequence[np.ndarray]] = []
        for start in range(0, len(pieces), self.adapters_at_once):
            chunk = range(start, min(start + self.adapters_at_once, len(pieces)))
            self.engine.bank.load([pieces[place] for place in chunk])
            encoded: list[EncodedRecord] = []
            pairs: list[Pair] = []
            for place in chunk:
                records = self.records[owners[place]]
                pairs += [(place - start, len(encoded) + number) for number in range(len(records))]
                encoded += [record.encoded for record in records]
            rows = iter(self._rows(encoded, pairs).values())
            scored += [[next(rows) for _ in self.records[owners[place]]] for place in chunk]
        return scored

    def _rows(self, encoded: Sequence[EncodedRecord], pairs: Sequence[Pair]) -> dict[Pair, np.ndarray]:
        """[3, t] of pairs of an adapter in the bank (-1: the base) and a record, in their order."""
        moments: dict[Pair, torch.Tensor] = {}
        bank, budget = self.engine.bank, self.engine.max_batch_tokens
        with bar(len(pairs), "records") as progress:
            logprobs = target_logprobs(bank, encoded, pairs, budget, progress.update, moments)
        return {pair: np.vstack([logprobs[pair].numpy(), moments[pair].numpy()]) for pair in pairs}

    def _by_owner(self, rows: Sequence[np.ndarray]) -> TokenStatistics:
        """Rows of all records, in the order of the owners, parted among them."""
        by_owner, start = {}, 0
        for owner, records in self.records.items():
            by_owner[owner] = rows[start : start + len(records)]
            start += len(records)
        return by_owner


# -- attacks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """Offline RMIA's models: for each subject the first `count` others in one order of the owners drawn by the seed.

    No record is held against the model of its own owner: then the next in the order takes its place.
    """

    order: Sequence[str]
    count: int

    @classmethod
    def draw(cls, owners: Sequence[str], count: int, seed: int) -> "References":
        order = sorted(owners)
        random.Random(derive_seed("references", seed)).shuffle(order)
        return cls(order, count)

    def pool(self, subject: Subject) -> list[str]:
        """One more than are used for a record, so that its owner's can be left out."""
        return subject.others(self.order)[: self.count + 1] if self.count else []

    def of(self, subject: Subject, owner: str) -> list[str]:
        """The references for an owner's records; as many for everybody."""
        pool = self.pool(subject)
        return [name for name in pool if name != owner][: len(pool) - 1]


@dataclass(frozen=True)
class Attack:
    """Everything known when subjects are attacked."""

    records: Records
    base: TokenStatistics
    references: References
    reference_means: Mapping[str, Mapping[str, np.ndarray]]  # by reference, owner: [n] mean token log-probabilities

    def on(self, subject: Subject, attacked: TokenStatistics) -> dict[str, Any]:
        """Scores of every attack on what was deployed and (blind) on the base alone, by side; what a result holds."""
        others = subject.others(self.records)
        sides = {"member": subject.members, "non_member": others, "held_out": subject.members}
        places = {side: list(self.places(side, owners)) for side, owners in sides.items()}
        result: dict[str, Any] = {"user_id": subject.user_id, "index": subject.index}
        result["on_base"] = subject.adapter is None
        for key, model in (("scores", attacked), ("blind", self.base)):
            result[key] = by_attack(self._scores(subject, model, places))
        for side, owners in (("member", list(subject.members)), ("non_member", others)):
            numbers = Counter(owner for owner, _ in places[side])
            result[f"{side}_ids"] = owners
            result[f"{side}_num_samples"] = [numbers[owner] for owner in owners]
            result[f"{side}_loss"] = [-value for value in result["scores"][scoring.PUBLISHED_ATTACK][side]]
        numbers = Counter(owner for owner, _ in places["held_out"])
        result["held_out_num_samples"] = [numbers[owner] for owner in subject.members]
        return result

    def places(self, side: str, owners: Iterable[str]) -> Iterator[tuple[str, int]]:
        """(owner, place among his records) of a side."""
        for owner in owners:
            for place, record in enumerate(self.records[owner]):
                if record.held_out == (side == "held_out"):
                    yield owner, place

    def _scores(
        self, subject: Subject, model: TokenStatistics, places: Mapping[str, Sequence[tuple[str, int]]]
    ) -> dict[str, dict[str, list[float]]]:
        """By side and attack; a side without records (nothing was held out) is left out."""
        owners: dict[str, None] = {}
        for places_of_side in places.values():
            owners |= dict.fromkeys(owner for owner, _ in places_of_side)
        references = {owner: self._reference_means(subject, owner) for owner in owners}
        population = self._population(subject, model, references)
        scores = {}
        for side, places_of_side in places.items():
            evidence = []
            for owner, place in places_of_side:
                means, ratios = references[owner][place], population[owner]
                evidence.append(self.evidence(model, owner, place, means, ratios))
            if evidence:
                scores[side] = scoring.record_scores(evidence)
        return scores

    def evidence(
        self, model: TokenStatistics, owner: str, place: int, references: np.ndarray, population: np.ndarray
    ) -> Evidence:
        logprob, mean, std = model[owner][place]
        text = self.records[owner][place].text
        return Evidence(logprob, self.base[owner][place][0], mean, std, text, references, population)

    def _reference_means(self, subject: Subject, owner: str) -> np.ndarray:
        """[n, m] of the owner's records."""
        means = [self.reference_means[name][owner] for name in self.references.of(subject, owner)]
        return np.stack(means, axis=1) if means else np.empty((len(self.records[owner]), 0))

    def _population(
        self, subject: Subject, model: TokenStatistics, references: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """By owner the ascending RMIA ratios of all non-members' records but his own."""
        ratios = {
            owner: scoring.rmia_ratio(token_means(model[owner]), references[owner])
            for owner in subject.others(references)
            if references[owner].shape[1]
        }

        def but(owner: str) -> np.ndarray:
            others = [ratios_of_owner for name, ratios_of_owner in ratios.items() if name != owner]
            return np.sort(np.concatenate(others)) if others else np.empty(0)

        return {owner: but(owner) for owner in references}


def token_means(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[n] mean token log-probability of records [3, t]."""
    return np.array([row[0].mean() for row in rows])


def attack_of(scorer: Scorer, owners: Owners, references: References, group: Sequence[Subject]) -> Attack:
    """What is known when these subjects are attacked."""
    names: dict[str, None] = {}
    for subject in group:
        names |= dict.fromkeys(references.pool(subject))
    related = scorer.of([owners.adapter(name) for name in names])
    means: dict[str, dict[str, np.ndarray]] = {}
    for name in names:
        rows_by_owner = related[owners.adapter(name)]
        means[name] = {owner: token_means(rows) for owner, rows in rows_by_owner.items()}
    return Attack(scorer.records, scorer.base, references, means)


def attack_group(scorer: Scorer, attack: Attack, group: Sequence[Subject]) -> list[dict[str, Any]]:
    """Results of subjects, in their order."""
    scored = scorer.of([subject.adapter for subject in group if subject.adapter is not None])
    results = []
    for subject in group:
        results.append(attack.on(subject, scorer.base if subject.adapter is None else scored[subject.adapter]))
    return results


def by_attack(scores: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Scores by side and attack, turned round; an attack that lacks a side is left out."""
    turned = {}
    for name in scoring.ATTACKS:
        if all(name in scores_of_side for scores_of_side in scores.values()):
            turned[name] = {side: scores_of_side[name] for side, scores_of_side in scores.items()}
    return turned
