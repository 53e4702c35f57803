"""A run of several penalties: a run directory for each in one folder, and what their searches shared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prime.data import read_lines
from prime.runs import read_results, read_settings, user_dirname

PENALTY_DIR = "penalty-"


def penalty_folder(penalty: float) -> str:
    return f"{PENALTY_DIR}{penalty:g}"


def penalty_runs(folder: Path) -> list[Path]:
    """The run directories of the penalties in `folder`, by rising penalty; none where it is no frontier."""
    found = [path.parent for path in folder.glob(f"{PENALTY_DIR}*/settings.json")]
    return sorted(found, key=lambda path: read_settings(path)["settings"]["sim_penalty"])


def read_evaluations(run: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    path = run / "users" / user_dirname(result["user_id"]) / "evaluations.jsonl"
    return read_lines(path)


def shared_evaluations(runs: Sequence[Path]) -> dict[str, int]:
    """Candidates that all searches asked, how many of them were decoded, and how many a lone search decodes (mean)."""
    asked = 0
    by_user: dict[str, set[str]] = {}
    for run in runs:
        for result in read_results(run):
            weights = [str(one["weights"]) for one in read_evaluations(run, result)]
            asked += len(weights)
            by_user.setdefault(result["user_id"], set()).update(weights)
    decoded = sum(map(len, by_user.values()))
    return {"asked": asked, "shared": asked - decoded, "decoded": decoded, "alone": round(asked / max(1, len(runs)))}


def sharing_text(found: Mapping[str, int]) -> str:
    ratio = found["decoded"] / max(1, found["alone"])
    return (
        f"evaluations: {found['asked']} asked, {found['shared']} shared, {found['decoded']} new (decoded): "
        f"{ratio:.2f} times those of one penalty"
    )
