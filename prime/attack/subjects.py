"""What is attacked: somebody's deployed adapter, and whose records may be in it.

*Owners* are the people whose records are at hand, each with an adapter trained on them: the anchors, or where
everybody trained alone (OPPU) the test users. A *subject* is somebody's deployed adapter: its members are owners whose
adapters went into it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prime.checkpoints.identity import adapter_source
from prime.checkpoints.published import has_adapter
from prime.errors import InputError, tell
from prime.merging.sharers import adapter_folder
from prime.runs.inputs import PLACE, Source, digest_of
from prime.runs.run import read_results, read_settings
from prime.settings import BEFORE_THE_OPTION
from prime.users.data import User

# Options that make the records what they were when the owners' adapters were trained.
RECORD_OPTIONS = ("task_name", "prompt_path", "max_length", "texts", "chat")


@dataclass(frozen=True)
class Owners:
    """The people whose records are attacked: a stage's results, in its order, and the settings it ran under."""

    folder: Path
    results: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    are_test_users: bool = False  # who trained alone, and merged nobody's adapter

    @property
    def ids(self) -> list[str]:
        return [result["user_id"] for result in self.results]

    def adapter(self, owner: str) -> Path:
        return adapter_folder(self.folder, owner)


def read_owners(folder: Path, recorded: Mapping[str, Any], *, are_test_users: bool = False) -> Owners | None:
    """Those who trained in a stage's directory, None where no stage did; the settings have to make the records that
    were trained on.

    Args:
        recorded: the attack's settings by name.
    """
    results = read_results(folder)
    if not results:
        return None
    trained = read_settings(folder)["settings"]
    trained = BEFORE_THE_OPTION | trained
    changed = [key for key in RECORD_OPTIONS if trained.get(key) != recorded[key]]
    if changed:
        lines = [f"  {key}: there {trained.get(key)!r}, now {recorded[key]!r}" for key in changed]
        raise InputError(f"{folder}: the anchors were trained on other records:\n" + "\n".join(lines))
    return Owners(folder, results, trained, are_test_users)


def imported_owners(folder: Path, anchors: Sequence[User]) -> Owners:
    """The anchors whose adapters were put into a folder without a stage's results, as those of the published code are;
    they were trained on whole histories, as published.
    """
    results = []
    for index, anchor in enumerate(anchors):
        if has_adapter(adapter_folder(folder, anchor.user_id)):
            results.append({"user_id": anchor.user_id, "index": index})
    if not results:
        raise InputError(f"{folder}: no anchors' adapters there; run train_anchor_peft.py first (--anchor_dir)")
    return Owners(folder, results, {"imported": True})


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

    def sources(self, references: Mapping[str, Path]) -> dict[str, Source]:
        """What an attack reads of the subject, as a run records it; `references`: adapters by owner."""
        deployed = str(self.adapter or "the base")
        found = {PLACE: Source(str(self.index), deployed), "deployed adapter": Source("the base", deployed)}
        found["members"] = Source(digest_of([list(self.members), list(self.neither)]), deployed)
        if self.adapter is not None:
            found |= adapter_source("deployed adapter", self.adapter)
        for owner, path in references.items():
            found |= adapter_source(f"adapter of {owner}", path)
        return found


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
        problem = "merged no sharer's adapter, so it has no members to look for (--exp_dir)"
        raise InputError(f"{exp_dir}: user {user_id} {problem}")
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


def with_members(subjects: Sequence[Subject], owners: Owners) -> list[Subject]:
    """Without those whose members trained on nothing."""
    empty = {result["user_id"] for result in owners.results if result.get("record_ids") == []}
    kept = [subject for subject in subjects if not set(subject.members) <= empty]
    for subject in subjects:
        if subject not in kept:
            tell(f"user {subject.user_id}: trained on nothing, not attacked")
    return kept
