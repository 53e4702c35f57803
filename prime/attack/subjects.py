"""Attacks on adapters in the bank: what is attacked, with whose records, and by which reference models.

*Owners* are the people whose records are at hand, each with an adapter trained on them: the anchors, or where
everybody trained alone (OPPU) the test users. A *subject* is somebody's deployed adapter: its members are owners whose
adapters went into it. One pass over all owners' records gives everything that the attacks look at.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prime import cli
from prime.attack import scoring
from prime.attack.scoring import Evidence
from prime.bank.batching import Pair, every_pair
from prime.bank.encoding import EncodedRecord
from prime.bank.logprobs import target_logprobs
from prime.checkpoints.peft import load_adapter
from prime.engine import Engine
from prime.errors import InputError, tell
from prime.merging.sharers import adapter_folder
from prime.runs.run import read_results, read_settings
from prime.seeds import derive_seed
from prime.users.data import User
from prime.users.holdout import check_split, records_of, trained_split

# Options that make the records what they were when the owners' adapters were trained.
RECORD_OPTIONS = ("task_name", "recent_k", "prompt_path", "max_length")


@dataclass(frozen=True)
class Owners:
    """The people whose records are attacked: a stage's results, in its order, and the settings it ran under."""

    folder: Path
    results: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    @property
    def ids(self) -> list[str]:
        return [result["user_id"] for result in self.results]

    def adapter(self, owner: str) -> Path:
        return adapter_folder(self.folder, owner)


def read_owners(folder: str | Path, args: argparse.Namespace) -> Owners:
    """Those who trained in a stage's directory; the options have to make the records that were trained on."""
    results = read_results(folder)
    if not results:
        raise InputError(f"{folder}: no anchors' results there; run train_anchor_peft.py first (--anchor_dir)")
    trained = read_settings(folder)["settings"]
    changed = [key for key in RECORD_OPTIONS if trained.get(key) != getattr(args, key)]
    if changed:
        lines = [f"  {key}: there {trained.get(key)!r}, now {getattr(args, key)!r}" for key in changed]
        raise InputError(f"{folder}: the anchors were trained on other records:\n" + "\n".join(lines))
    return Owners(Path(folder), results, trained)


# -- subjects -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Somebody's deployed adapter, and whose records are in it."""

    user_id: str
    index: int
    adapter: Path | None  # None: the base was deployed
    members: Sequence[str]  # owners
    neither: Sequence[str] = ()  # sharers of weight 0 or beyond --n_sim: neither members nor non-members

    def others(self, owners: Iterable[str]) -> list[str]:
        """The owners who are non-members."""
        return [owner for owner in owners if owner not in self.members and owner not in self.neither]


def own_subjects(owners: Owners) -> list[Subject]:
    """Every owner's own adapter."""
    return [Subject(r["user_id"], r["index"], owners.adapter(r["user_id"]), [r["user_id"]]) for r in owners.results]


def deployments(exp_dir: Path, n_sim: int) -> list[Subject]:
    """The finished test users of a stage 4 run; its results list the sharers nearest first."""
    results = read_results(exp_dir)
    if not results:
        raise InputError(f"{exp_dir}: no finished users there; run stage 4 first (lora_composition_evo.py)")
    return [deployment(exp_dir, result, n_sim) for result in results]


def deployment(exp_dir: Path, result: Mapping[str, Any], n_sim: int) -> Subject:
    """What a test user deployed. A sharer of weight 0 is not in it; where the base won, all listed are looked for."""
    user_id = result["user_id"]
    if "sharers" not in result:
        told = "merged no sharer's adapter, so it has no members to look for (--exp_dir)"
        raise InputError(f"{exp_dir}: user {user_id} {told}")
    on_base = result.get("deployed") == "base"
    weights = result.get("weights", [1.0] * len(result["sharers"]))
    merged = [s for s, w in zip(result["sharers"], weights, strict=True) if on_base or np.any(w)]
    members = merged[:n_sim] if n_sim else merged
    others = [sharer for sharer in result["sharers"] if sharer not in members]
    adapter = None if on_base else adapter_folder(exp_dir, user_id)
    return Subject(user_id, result["index"], adapter, members, others)


def trained_alone(exp_dir: Path) -> bool:
    """Whether a stage 4 directory merged nobody's adapter: its users trained their own (OPPU)."""
    results = read_results(exp_dir)
    return bool(results) and all(result.get("deployed") == "own" for result in results)


def check_members(subjects: Sequence[Subject], owners: Sequence[str]) -> None:
    """Every subject needs members among the owners, and owners to tell them from."""
    problems = []
    for subject in subjects:
        chosen = [*subject.members, *subject.neither]
        unknown = [name for name in chosen if name not in owners]
        if unknown:
            problems.append(f"user {subject.user_id}: no results of sharers {', '.join(unknown)} in --anchor_dir")
        elif len(chosen) == len(owners):
            problems.append(f"user {subject.user_id}: all {len(owners)} anchors are sharers, there are no non-members")
    if problems:
        raise InputError.many(problems)


# -- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attacked:
    """A record as the attacks need it: as ids to score, its target as text, and whether nothing trained on it."""

    encoded: EncodedRecord
    text: str
    held_out: bool


Records = Mapping[str, Sequence[Attacked]]  # by owner
TokenStatistics = Mapping[str, Sequence[np.ndarray]]  # by owner: [3, t] of each record, see `Scorer`


def owned_records(
    args: argparse.Namespace, owners: Owners, users: Sequence[User], texts: cli.Texts, engine: Engine
) -> Records:
    """Each owner's last --max_records records, checked against what his adapter's run wrote down."""
    known = {user.user_id: user for user in users}
    found = {}
    for result in owners.results:
        name = result["user_id"]
        if name not in known:
            raise InputError(f"{owners.folder}: anchor {name} is not in {cli.data_dir(args)}")
        records = records_of(texts, known[name], args.recent_k, trained_split(owners.folder))
        check_split(owners.folder, result, records)
        found[name] = [
            Attacked(engine.encoder.record(r.id, r.input, r.target), r.target, r.held_out)
            for r in records[-args.max_records :]
        ]
    return found


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
        found = {adapter: self.kept[adapter] for adapter in adapters if adapter in self.kept}
        others = [adapter for adapter in dict.fromkeys(adapters) if adapter not in found]
        for start in range(0, len(others), self.adapters_at_once):
            found |= self._together(others[start : start + self.adapters_at_once])
        return found

    def _together(self, adapters: Sequence[Path]) -> dict[Path, TokenStatistics]:
        self.engine.bank.load([load_adapter(adapter) for adapter in adapters])
        return dict(zip(adapters, self._pass(range(len(adapters))), strict=True))

    def _pass(self, adapters: Sequence[int]) -> list[TokenStatistics]:
        """All records under adapters in the bank (-1: the base)."""
        flat = [record.encoded for own in self.records.values() for record in own]
        moments: dict[Pair, torch.Tensor] = {}
        with cli.bar(len(flat) * len(adapters), "records") as progress:
            pairs = every_pair(adapters, len(flat))
            bank, budget = self.engine.bank, self.engine.max_batch_tokens
            scored = target_logprobs(bank, flat, pairs, budget, progress.update, moments)
        found: list[TokenStatistics] = []
        for adapter in adapters:
            pairs_of = ((adapter, index) for index in range(len(flat)))
            rows = (np.vstack([scored[pair].numpy(), moments[pair].numpy()]) for pair in pairs_of)
            found.append({owner: [next(rows) for _ in own] for owner, own in self.records.items()})
        return found


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
        places = {side: list(self._places(side, owners)) for side, owners in sides.items()}
        result: dict[str, Any] = {"user_id": subject.user_id, "index": subject.index}
        result["on_base"] = subject.adapter is None
        for key, model in (("scores", attacked), ("blind", self.base)):
            by_side = self._scores(subject, model, places)
            names = [name for name in scoring.ATTACKS if all(name in own for own in by_side.values())]
            result[key] = {name: {side: by_side[side][name] for side in by_side} for name in names}
        for side, owners in (("member", list(subject.members)), ("non_member", others)):
            numbers = Counter(owner for owner, _ in places[side])
            result[f"{side}_ids"] = owners
            result[f"{side}_num_samples"] = [numbers[owner] for owner in owners]
            result[f"{side}_loss"] = [-value for value in result["scores"][scoring.PUBLISHED_ATTACK][side]]
        return result

    def _places(self, side: str, owners: Iterable[str]) -> Iterator[tuple[str, int]]:
        """(owner, place among his records) of a side."""
        for owner in owners:
            for place, record in enumerate(self.records[owner]):
                if record.held_out == (side == "held_out"):
                    yield owner, place

    def _scores(
        self, subject: Subject, model: TokenStatistics, places: Mapping[str, Sequence[tuple[str, int]]]
    ) -> dict[str, dict[str, list[float]]]:
        """By side and attack; a side without records (nothing was held out) is left out."""
        owners = dict.fromkeys(owner for own in places.values() for owner, _ in own)
        references = {owner: self._reference_means(subject, owner) for owner in owners}
        population = self._population(subject, model, references)
        found = {}
        for side, own in places.items():
            evidence = [
                self._evidence(model, owner, place, references[owner][place], population[owner]) for owner, place in own
            ]
            if evidence:
                found[side] = scoring.record_scores(evidence)
        return found

    def _evidence(
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
            rest = [own for name, own in ratios.items() if name != owner]
            return np.sort(np.concatenate(rest)) if rest else np.empty(0)

        return {owner: but(owner) for owner in references}


def token_means(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[n] mean token log-probability of records [3, t]."""
    return np.array([row[0].mean() for row in rows])


def attack_group(
    scorer: Scorer, owners: Owners, references: References, group: Sequence[Subject]
) -> list[dict[str, Any]]:
    """Results of subjects, in their order."""
    names = dict.fromkeys(name for subject in group for name in references.pool(subject))
    related = scorer.of([owners.adapter(name) for name in names])
    means = {
        name: {owner: token_means(rows) for owner, rows in related[owners.adapter(name)].items()} for name in names
    }
    attack = Attack(scorer.records, scorer.base, references, means)
    scored = scorer.of([subject.adapter for subject in group if subject.adapter is not None])
    return [
        attack.on(subject, scorer.base if subject.adapter is None else scored[subject.adapter]) for subject in group
    ]


def with_members(subjects: Sequence[Subject], owners: Owners) -> list[Subject]:
    """Without those whose members trained on nothing."""
    empty = {result["user_id"] for result in owners.results if not result["record_ids"]}
    kept = [subject for subject in subjects if not set(subject.members) <= empty]
    for subject in subjects:
        if subject not in kept:
            tell(f"user {subject.user_id}: trained on nothing, not attacked")
    return kept
