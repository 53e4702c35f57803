"""A sharer leaves: what is removed of him from output folders, whose merges are made again, what cannot be undone.

A receipt is begun before the first file is removed, and the same call goes on where it was cut off. What is removed is
found anew each time, by the run directories themselves; the receipt is only added to.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prime.errors import InputError
from prime.merging.anchors import ANCHOR_IDX, CANDIDATE_EMB, load_anchor_idx, load_embeddings, save_tensor
from prime.runs.files import check_own, read_json, uninterrupted, write_json
from prime.runs.forms import read_form
from prime.runs.inputs import RESULT_FILE, reopen
from prime.runs.journal import users_of
from prime.runs.locks import unheld
from prime.runs.run import read_result, read_settings, user_dirname

OF_SHARERS = ("train_anchor_peft", "train_anchor_gate", "gen_profile")  # stages whose results are a sharer's own
MERGING = ("lora_composition_evo", "lora_composition", "train_user_peft")
ATTACK = "mia"
# Made of the results of a run, in its folder or the one above; the next stage 5 and 6 make them again.
DERIVED = (
    "output-k*.json", "eval-k*.json", "mia_*", "frontier.*", "summary.json", "summary.md", "scores.csv",
    "weights.csv", "report.html", "figures/*",
)  # fmt: skip
RECEIPT_FORM = {"user_id": str, "state": str, "removed": [str], "rewritten": [str], "reopened": {}, "left": [str]}


@dataclass
class Withdrawal:
    """What is to be done; paths as they are told."""

    user_id: str
    removed: set[Path] = field(default_factory=set)  # of the sharer's own, and of losses of his records
    rewritten: set[Path] = field(default_factory=set)
    reopened: dict[str, set[str]] = field(default_factory=dict)  # users whose merge he was in, by run directory
    unfinished: set[Path] = field(default_factory=set)  # folders and journals of work that he may be in
    derived: set[Path] = field(default_factory=set)

    def told(self, state: str, left: Sequence[str]) -> dict[str, Any]:
        """The receipt."""
        reopened = {run: sorted(users) for run, users in sorted(self.reopened.items()) if users}
        return {
            "user_id": self.user_id,
            "state": state,
            "removed": sorted(map(str, self.removed)),
            "rewritten": sorted(map(str, self.rewritten)),
            "reopened": reopened,
            "left": list(left),
        }


def withdraw(
    user_id: str, roots: Sequence[Path], place: int, n_candidates: int, left: Sequence[str], receipt: Path
) -> dict[str, Any]:
    """Remove a sharer from all that lies under `roots`; returns the receipt.

    Args:
        place: of the sharer among the candidates, whose embeddings and indices go by place.
        left: what cannot be removed.

    Raises:
        InputError: nothing of his is there, or a stage is at work.
    """
    before = _begun(receipt, user_id)
    with ExitStack() as held:
        runs: list[Path] = []
        for root in roots:
            runs += _runs(root)
        for run in runs:
            check_own(run)
            if not held.enter_context(unheld(run / "settings.json")):
                raise InputError(f"{run}: a stage is at work there; wait until it has ended")
        found = Withdrawal(user_id)
        for run in runs:
            _look_into(run, found, before)
        for root in roots:
            _look_for_selections(root, found, place, n_candidates)
            own = root.rglob(f"users/{user_dirname(user_id)}")
            found.removed |= {path for path in own if not (path.parent.parent / "settings.json").exists()}
        if not (before or found.removed or any(found.reopened.values())):
            raise InputError(f"user {user_id}: no adapter of such a sharer, and no merge with it, in {roots[0]}")
        _add(found, before)
        write_json(receipt, found.told("begun", left))
        _carry_out(found, place, n_candidates)
    done = found.told("done", left)
    write_json(receipt, done)
    return done


def _begun(receipt: Path, user_id: str) -> dict[str, Any]:
    """The receipt of an earlier call; empty where there is none."""
    if not receipt.exists():
        return {}
    before = read_form(receipt, RECEIPT_FORM)
    if before["user_id"] != user_id:
        raise InputError(f"{receipt}: the receipt of user {before['user_id']}; give another --receipt")
    return before


def _add(found: Withdrawal, before: dict[str, Any]) -> None:
    found.removed |= set(map(Path, before.get("removed", ())))
    found.rewritten |= set(map(Path, before.get("rewritten", ())))
    for run, users in before.get("reopened", {}).items():
        found.reopened.setdefault(run, set()).update(users)


def _runs(root: Path) -> Iterator[Path]:
    """The run directories of stages under a folder."""
    for path in sorted(root.rglob("settings.json")):
        content = read_json(path)
        if isinstance(content, dict) and {"stage", "method", "settings"} <= content.keys():
            yield path.parent


def _look_into(run: Path, found: Withdrawal, before: dict[str, Any]) -> None:
    stage, own = read_settings(run)["stage"], run / "users" / user_dirname(found.user_id)
    journals = set(run.glob("working/*.jsonl"))
    if stage in OF_SHARERS:
        found.removed |= {own} if own.exists() else set()
        found.unfinished |= {path for path in journals if found.user_id in users_of(path)}
    if stage not in (*MERGING, ATTACK):
        return
    folders = [path for path in sorted(run.glob("users/*")) if path.is_dir()]
    named = [folder for folder in folders if (folder / RESULT_FILE).is_file() and _names(folder, found.user_id)]
    found.unfinished |= {folder for folder in folders if not (folder / RESULT_FILE).is_file()} | journals
    if stage == ATTACK:
        found.removed |= set(named)
        known = any(str(run) + "/" in path for path in before.get("removed", ()))
    else:
        found.reopened[str(run)] = {read_result(folder / RESULT_FILE)["user_id"] for folder in named}
        known = bool(before.get("reopened", {}).get(str(run)))
    if named or known:
        for folder in (run, run.parent, run.parent.parent if stage == ATTACK else run.parent):
            for pattern in DERIVED:
                found.derived |= set(folder.glob(pattern))


def _names(folder: Path, user_id: str) -> bool:
    """Whether a result is of the user, or of what was merged or attacked with him."""
    result = read_result(folder / RESULT_FILE)
    return any(user_id in result.get(key, ()) for key in ("sharers", "member_ids", "non_member_ids"))


def _look_for_selections(root: Path, found: Withdrawal, place: int, n_candidates: int) -> None:
    for path in root.rglob(ANCHOR_IDX):
        if place in load_anchor_idx(path, n_candidates):
            found.rewritten.add(path)
    for path in root.rglob(CANDIDATE_EMB):
        if load_embeddings(path, n_candidates)[place].any():
            found.rewritten.add(path)


def _carry_out(found: Withdrawal, place: int, n_candidates: int) -> None:
    """Idempotent; what others are found by goes last."""
    for path in sorted(found.derived):
        path.unlink(missing_ok=True)
    for run, users in found.reopened.items():
        for user in users:
            _remove(Path(run) / "users" / user_dirname(user))
            _remove(Path(run) / ATTACK / "users" / user_dirname(user))  # of an adapter that is no more
    for path in sorted(found.unfinished | found.removed):
        _remove(path)
    for path in sorted(found.rewritten):
        with uninterrupted():
            _rewrite(path, place, n_candidates)


def _remove(path: Path) -> None:
    if path.is_dir() or path.is_symlink():
        reopen(path)
    else:
        path.unlink(missing_ok=True)


def _rewrite(path: Path, place: int, n_candidates: int) -> None:
    """Without the sharer: he is no anchor any more, and his embedding is that of an empty history."""
    if path.name == CANDIDATE_EMB:
        embeddings = load_embeddings(path, n_candidates).clone()
        embeddings[place] = 0
        return save_tensor(path, embeddings)
    kept = [other for other in load_anchor_idx(path, n_candidates) if other != place]
    if not kept:
        raise InputError(f"{path}: he is the only anchor; remove the folder instead")
    save_tensor(path, torch.tensor(kept, dtype=torch.int64))
