"""A run of several penalties: a run directory for each in one folder, and what their searches shared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.runs.forms import EVALUATED_WEIGHTS, PENALTY_SETTINGS, SEARCH_RESULT, form_problems, read_form_lines
from prime.runs.run import read_results, read_settings, user_dirname

PENALTY_DIR = "penalty-"


def penalty_runs(folder: Path) -> list[Path]:
    """The run directories of the penalties in `folder`, by rising penalty; none where there is no frontier."""
    runs = [path.parent for path in folder.glob(f"{PENALTY_DIR}*/settings.json")]
    return sorted(runs, key=penalty_of)


def penalty_of(run: Path) -> float:
    """The penalty of a run directory; InputError where something else than a search at a penalty made it."""
    settings = read_settings(run)["settings"]
    if problems := form_problems(settings, PENALTY_SETTINGS, f"{run / 'settings.json'}: settings"):
        raise InputError.many(problems)
    return settings["sim_penalty"]


def read_evaluations(run: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the search of a finished user evaluated: first the base, then the sharers of the result, then candidates.

    Raises:
        InputError: the result is not that of a search, or its evaluations lack the base or a sharer.
    """
    folder = run / "users" / user_dirname(result["user_id"])
    problems = form_problems(result, SEARCH_RESULT, f"{folder / 'result.json'}: the file")
    if not problems and result["best_sharer"] not in result["sharers"]:
        problems = [f"{folder / 'result.json'}: best_sharer is none of the sharers"]
    if problems:
        raise InputError.many(problems)
    path = folder / "evaluations.jsonl"
    evaluations, sharers = read_form_lines(path, EVALUATED_WEIGHTS), len(result["sharers"])
    if len(evaluations) < 1 + sharers:
        raise InputError(f"{path}: {len(evaluations)} lines, expected the base and {sharers} sharers first")
    return evaluations


def shared_evaluations(runs: Sequence[Path]) -> dict[str, int]:
    """How much the searches at several penalties shared, in candidates.

    `asked` by all searches together, of which `decoded` once each and `shared` thereafter; `alone`: what the search at
    one penalty decodes (mean).
    """
    asked = 0
    different: dict[str, set[str]] = {}  # weights that were asked, by user
    for run in runs:
        for result in read_results(run):
            weights = [str(evaluation["weights"]) for evaluation in read_evaluations(run, result)]
            asked += len(weights)
            different.setdefault(result["user_id"], set()).update(weights)
    decoded = sum(map(len, different.values()))
    return {"asked": asked, "shared": asked - decoded, "decoded": decoded, "alone": round(asked / max(1, len(runs)))}


def sharing_text(counts: Mapping[str, int]) -> str:
    ratio = counts["decoded"] / max(1, counts["alone"])
    return (
        f"evaluations: {counts['asked']} asked, {counts['shared']} shared, {counts['decoded']} new (decoded): "
        f"{ratio:.2f} times those of one penalty"
    )
