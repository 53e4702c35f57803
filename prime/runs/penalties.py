"""A run of several penalties: a run directory for each in one folder, and what their searches shared."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prime import cli
from prime.errors import InputError
from prime.runs.forms import EVALUATED_WEIGHTS, PENALTY_SETTINGS, SEARCH_RESULT, form_problems, read_form_lines
from prime.runs.run import Run, read_results, read_settings, user_dirname

PENALTY_DIR = "penalty-"


def alone(args: argparse.Namespace, place: int) -> argparse.Namespace:
    """The options of a run at one of the penalties alone."""
    return argparse.Namespace(**vars(args) | {"sim_penalty": args.sim_penalty[place]})


def open_runs(folder: Path, args: argparse.Namespace) -> list[Run]:
    """A run directory for each penalty: `folder` itself, or penalty-<p> in it where there are several."""
    several = len(args.sim_penalty) > 1
    folders = [folder / f"{PENALTY_DIR}{penalty:g}" if several else folder for penalty in args.sim_penalty]
    return [
        cli.open_run(alone(args, place), root, "lora_composition_evo", args.name)
        for place, root in enumerate(folders)
    ]


def penalty_runs(folder: Path) -> list[Path]:
    """The run directories of the penalties in `folder`, by rising penalty; none where it is no frontier."""
    found = [path.parent for path in folder.glob(f"{PENALTY_DIR}*/settings.json")]
    return sorted(found, key=penalty_of)


def penalty_of(run: Path) -> float:
    """The penalty of a run directory; InputError where a search of another kind, or a stranger, made it."""
    settings = read_settings(run)["settings"]
    if problems := form_problems(settings, PENALTY_SETTINGS, f"{run / 'settings.json'}: settings"):
        raise InputError.many(problems)
    return settings["sim_penalty"]


def read_evaluations(run: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the search of a finished user evaluated: the base, the sharers of the result, and what it asked."""
    folder = run / "users" / user_dirname(result["user_id"])
    problems = form_problems(result, SEARCH_RESULT, f"{folder / 'result.json'}: the file")
    if not problems and result["best_sharer"] not in result["sharers"]:
        problems = [f"{folder / 'result.json'}: best_sharer is none of the sharers"]
    if problems:
        raise InputError.many(problems)
    path = folder / "evaluations.jsonl"
    found, least = read_form_lines(path, EVALUATED_WEIGHTS), 1 + len(result["sharers"])
    if len(found) < least:
        raise InputError(f"{path}: {len(found)} lines, expected the base and {least - 1} sharers first")
    return found


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
