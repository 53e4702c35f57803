"""summary.json, the one table of a run: scores, leakage and the cost of a user, a row per method and test setting."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prime.attack.scoring import PUBLISHED_ATTACK
from prime.report.methods import BLIND_ROWS, METHODS, PERSONALISING, REFERENCE
from prime.report.predictions import Cell, CellPredictions, setting_of
from prime.report.remarks import remarks
from prime.report.scores import metric_intervals, outside_share, paired_comparison, stack, user_stats
from prime.runs.forms import MIA_SUMMARY, read_form
from prime.runs.run import read_results, read_settings, user_dirname
from prime.users.metrics import METRICS
from prime.users.tasks import Task

# What a row says of the published attack; the controlled experiment is there where something was held out.
LEAKAGE = ("auroc", "blind_auroc", "controlled_auroc", "controlled_blind_auroc")


def build_summary(
    task: Task,
    predictions: CellPredictions,
    golds: Mapping[str, str],
    about: Mapping[str, dict[str, Any]],
    expected: Sequence[str],
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        about: what all rows of a method share, see `about_methods`.
        expected: ids of all test users; other users are left out. Rows of one test setting are of the same users.
    """
    stats = {cell: user_stats(task, by_user, golds) for cell, by_user in predictions.items()}
    rows: list[dict[str, Any]] = []
    paired: list[dict[str, Any]] = []
    present: dict[str, int] = {}
    compared = users_in_common(stats, expected)
    for cell, by_user in stats.items():
        present_users = [user for user in expected if user in by_user]
        if not present_users:
            continue
        present[cell.method] = min(present.get(cell.method, len(expected)), len(present_users))
        users = compared[setting_of(cell)] or present_users
        rows.append(cell._asdict() | metric_intervals(task, stack(by_user, users)) | about[cell.method])
        if task.choices.limited:
            rows[-1]["outside"] = outside_share(task, predictions[cell], users)
        reference = stats.get(Cell(REFERENCE, cell.k, cell.profile), {})
        common = [user for user in users if user in reference]
        if common and cell.method != REFERENCE:
            paired.append(cell._asdict() | paired_comparison(task, stack(by_user, common), stack(reference, common)))
    if not any(row.get("outside", {}).get("mean") for row in rows):  # the column is there where it tells something
        for row in rows:
            row.pop("outside", None)
    return {
        "task": task.name,
        "rows": rows,
        "paired": paired,
        "auroc_attack": f"{PUBLISHED_ATTACK} (published: summed token loss), pooled over users; "
        f"rows {' and '.join(BLIND_ROWS)} are the blind baseline: the same attack on the task-adapted base. "
        "oppu merges nobody: its members are each user's own records, its non-members the other users'",
        "users": {method: {"present": n, "expected": len(expected)} for method, n in present.items()},
        "compared": compared,
        "remarks": remarks(task, predictions, golds, rows),
    }


def users_in_common(stats: Mapping[Cell, Collection[str]], expected: Sequence[str]) -> dict[str, list[str]]:
    """By test setting, the users whom all of its rows have, so that every row is of the same ones. Where the rows have
    nobody in common the list is empty, and each row is of its own users.
    """
    common: dict[str, set[str]] = {}
    for cell, by_user in stats.items():
        if users := set(by_user) & set(expected):
            common[setting_of(cell)] = common.get(setting_of(cell), users) & users
    return {setting: [user for user in expected if user in users] for setting, users in common.items()}


# --- what all rows of a method share ---------------------------------------------------------------


def about_methods(sources: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Each method's leakage, what a user costs, and whether the user's history is trained on."""
    attacks = attack_results(sources)
    about: dict[str, dict[str, Any]] = {}
    for method, folder in sources.items():
        results = read_results(folder)
        leakage = attacks.get(method, {})
        about[method] = {
            **{key: leakage.get(key) for key in LEAKAGE},
            "seconds_per_user": seconds_per_user(method, results),
            "bytes_per_user": bytes_per_user(method, folder, results),
            "gradient": method in METHODS and METHODS[method].gradients,
        }
    return about


def attack_results(sources: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """AUROC of the published attack and its blind baseline for each attacked method, in the published and the
    controlled set (`prime.attack.sets`). The base rows are blind themselves.
    """
    by_method: dict[str, dict[str, Any]] = {}
    for method in sorted(sources, key=lambda name: name != REFERENCE):  # prime's blind baseline, if there
        path = sources[method] / "mia_summary.json"
        if not path.is_file():
            continue
        summary = read_form(path, MIA_SUMMARY)
        attack = summary["attacks"].get(PUBLISHED_ATTACK)
        if summary["method"] != method or attack is None:
            continue
        controlled = summary.get("sets", {}).get("controlled", {}).get("attacks", {}).get(PUBLISHED_ATTACK, {})
        values = (attack["auroc"], attack["blind_auroc"], controlled.get("auroc"), controlled.get("blind_auroc"))
        by_method[method] = dict(zip(LEAKAGE, values, strict=True))
        for row in BLIND_ROWS:
            blind = {"auroc": attack["blind_auroc"], "controlled_auroc": controlled.get("blind_auroc")}
            by_method.setdefault(row, blind)
    return by_method


def seconds_per_user(method: str, results: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean seconds that personalising a user took; None where a result does not record them."""
    known = METHODS.get(method)
    parts = known.seconds if known else PERSONALISING
    needed = set(parts) if known and known.comes_with_search else {"predict"}
    recorded = [result.get("seconds", {}) for result in results]
    if not all(seconds.keys() >= needed for seconds in recorded):
        return None
    return float(np.mean([_total(seconds, parts) for seconds in recorded]))


def _total(seconds: Mapping[str, float], parts: Sequence[str]) -> float:
    return sum(seconds.get(part, 0.0) for part in parts)


def bytes_per_user(method: str, folder: Path, results: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean size of what is stored for a user: an adapter, or nothing where the base is deployed.

    None for a method that only comes along with another's run, which stores nothing of it.
    """
    known = METHODS.get(method)
    if known and known.comes_with_search and read_settings(folder)["method"] != method:
        return None
    users = [folder / "users" / user_dirname(result["user_id"]) for result in results]
    files = [user / "adapter" / "adapter_model.safetensors" for user in users]
    return float(np.mean([file.stat().st_size if file.is_file() else 0 for file in files]))


# --- reading a summary -----------------------------------------------------------------------------


def leading(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of the first test setting: k = 0 without profile."""
    first = summary["rows"][0]
    return [row for row in summary["rows"] if (row["k"], row["profile"]) == (first["k"], first["profile"])]


def metric_names(summary: Mapping[str, Any]) -> list[str]:
    return [metric for metric in METRICS if metric in summary["rows"][0]]


def not_attacked(summary: Mapping[str, Any]) -> list[str]:
    """Methods with a run of their own, which merge or train and whose attack is not there."""
    own = [row["method"] for row in leading(summary) if row["auroc"] is None and row["bytes_per_user"] is not None]
    return [method for method in own if method not in METHODS or METHODS[method].members != "none"]


def any_outside(summary: Mapping[str, Any]) -> bool:
    """Whether some answers are no label, or no number on the scale."""
    return "outside" in summary["rows"][0]


def partial_methods(summary: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Methods that lack test users: how many they have, and how many there are."""
    counts = {method: (n["present"], n["expected"]) for method, n in summary["users"].items()}
    return {method: (present, expected) for method, (present, expected) in counts.items() if present < expected}
