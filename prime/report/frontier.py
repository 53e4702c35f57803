"""The trade between utility and privacy over several penalties: frontier.json, its table and its figure.

A run of `lora_composition_evo.py` with several penalties leaves a run directory for each, `penalty-<p>/`. Each becomes
a point. Beside them stand Per-Pcs, the sharers, their average and the base, where those stages have run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prime.errors import InputError
from prime.report import plots
from prime.report.figures.trade import draw_frontier
from prime.report.methods import METHODS, SHORT_LIST
from prime.report.predictions import Cell, CellPredictions, gather, predictions_of
from prime.report.scores import metric_intervals, stack, user_stats
from prime.report.tables import Estimate, aligned, interval_text
from prime.runs.files import write_json
from prime.runs.forms import (
    FRONTIER_FILE,
    FRONTIER_POINT,
    FRONTIER_SUMMARY,
    PLOTTABLE_INTERVAL,
    form_problems,
    read_form,
)
from prime.runs.penalties import penalty_of, penalty_runs, read_evaluations, shared_evaluations, sharing_text
from prime.runs.run import read_results, read_settings
from prime.users.metrics import METRICS, bootstrap
from prime.users.tasks import Task

ATTACK = "calibrated"
# What a point's label adds to its method's: every sharer's own adapter is attacked once, as it was before any merge.
REMARKS = {"best_sharer": " (AUROC: of all sharers)"}
UNKNOWN = dict.fromkeys(("penalty", "similarity", "auroc", "controlled_auroc"))


def write_frontier(folder: Path, task: Task, golds: Mapping[str, str]) -> dict[str, Any]:
    """Write frontier.json, .png and .svg of the penalty runs in `folder`; returns the content of the first."""
    runs = penalty_runs(folder)
    evaluations = shared_evaluations(runs)  # checks the runs' files, too
    points = [*(penalty_point(run, task, golds) for run in runs), *baseline_points(folder, runs, task, golds)]
    drawing, sentence = draw_frontier(points, task.metrics[0])
    frontier = {
        "task": task.name,
        "metric": task.metrics[0],
        "attack": ATTACK,
        "evaluations": evaluations,
        "points": points,
        "sentence": sentence,
    }
    plots.save(drawing, folder / "frontier")
    write_json(folder / "frontier.json", frontier)
    return frontier


def read_frontier(path: Path, task: Task) -> dict[str, Any]:
    """A frontier.json of the task.

    Raises:
        InputError: it is of another form, or its metric is none of the task's.
    """
    frontier = read_form(path, FRONTIER_FILE)
    metric = frontier["metric"]
    if metric not in task.metrics:
        raise InputError(f"{path}: metric is {metric!r}; {task.name} has {', '.join(task.metrics)}")
    form = [{f"{metric}?": (PLOTTABLE_INTERVAL, None), **FRONTIER_POINT}]
    if problems := form_problems(frontier["points"], form, f"{path}: points"):
        raise InputError.many(problems)
    return frontier


def frontier_table(frontier: Mapping[str, Any]) -> str:
    metric = frontier["metric"]
    better = "higher" if METRICS[metric].higher_is_better else "lower"
    rows = [["", f"{metric} ({better} is better)", "similarity", "AUROC", "AUROC, controlled"]]
    for point in frontier["points"]:
        values = [point.get(key) for key in (metric, "similarity", "auroc", "controlled_auroc")]
        rows.append([point["label"], *map(interval_text, values)])
    return f"{aligned(rows)}\n{sharing_text(frontier['evaluations'])}"


# --- points ----------------------------------------------------------------------------------------


def _point(
    method: str, label: str, predictions: CellPredictions, task: Task, golds: Mapping[str, str], **known: Any
) -> dict[str, Any] | None:
    """A point of the frontier at k = 0 without profile; None where there are no predictions."""
    stats = user_stats(task, predictions.get(Cell(method, 0, False), {}), golds)
    if not stats:
        return None
    scores = metric_intervals(task, stack(stats, list(stats)))
    return {"method": method, "label": label, "users": len(stats), **scores, **UNKNOWN, "settings": {}, **known}


def penalty_point(run: Path, task: Task, golds: Mapping[str, str]) -> dict[str, Any]:
    """What was deployed at one penalty."""
    stage, results = read_settings(run), read_results(run)
    method, penalty = stage["method"], penalty_of(run)
    label = f"penalty {penalty:g}"
    similarity = mean_interval([result["similarity"] for result in results])
    known = {"penalty": penalty, "similarity": similarity, **aurocs(run), "settings": stage["settings"]}
    point = _point(method, label, predictions_of(results), task, golds, **known)
    return point or {"method": method, "label": label, "penalty": penalty}


def baseline_points(
    folder: Path, runs: Sequence[Path], task: Task, golds: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The baselines for the same users: those that the searches predict, and those of the stages beside `folder`."""
    results = read_results(runs[0])
    users = {result["user_id"] for result in results}
    gathered, sources = gather(folder, task)
    predictions = _of_users(gathered | predictions_of(results), users)
    known = {
        **_leakage_of_single_models(runs),
        "per_pcs": _leakage_of_per_pcs(sources["per_pcs"], users) if "per_pcs" in sources else {},
    }
    points = []
    for method in SHORT_LIST:
        label = METHODS[method].label + REMARKS.get(method, "")
        point = _point(method, label, predictions, task, golds, **known.get(method, {}))
        points += [] if point is None else [point]
    return points


def _of_users(predictions: CellPredictions, users: set[str]) -> CellPredictions:
    kept: CellPredictions = {}
    for cell, by_user in predictions.items():
        kept[cell] = {user: samples for user, samples in by_user.items() if user in users}
    return kept


# --- leakage ---------------------------------------------------------------------------------------


def aurocs(run: Path, part: str = "") -> dict[str, Estimate | None]:
    """AUROC of both sets on what a run deployed; part "sharers": on the unmerged sharers, "blind": on the base."""
    path = run / "mia_summary.json"
    summary = read_form(path, FRONTIER_SUMMARY) if path.is_file() else {}
    sets = (summary.get("sharers", {}) if part == "sharers" else summary).get("sets", {})
    value = "blind_auroc" if part == "blind" else "auroc"
    keys = {"auroc": "published", "controlled_auroc": "controlled"}
    return {key: sets.get(name, {}).get("attacks", {}).get(ATTACK, {}).get(value) for key, name in keys.items()}


def _first_known(runs: Sequence[Path], part: str) -> dict[str, Estimate | None]:
    """`aurocs` of the first run that was attacked; the penalties share sharers and base."""
    by_run = [aurocs(run, part) for run in runs]
    return next((values for values in by_run if values["auroc"]), by_run[0])


def _leakage_of_single_models(runs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Of the task-adapted base and the best single sharer, which every search evaluates first.

    The untouched base is not attacked: the blind baseline is the task-adapted one's.
    """
    base, best = [], []
    for result in read_results(runs[0]):
        lines = read_evaluations(runs[0], result)
        base.append(lines[0]["similarity"])
        best.append(lines[1 + result["sharers"].index(result["best_sharer"])]["similarity"])
    return {
        "task_lora": {**_first_known(runs, "blind"), "similarity": mean_interval(base)},
        "best_sharer": {**_first_known(runs, "sharers"), "similarity": mean_interval(best)},
    }


def _leakage_of_per_pcs(folder: Path, users: set[str]) -> dict[str, Any]:
    results = [result for result in read_results(folder) if result["user_id"] in users and "similarity" in result]
    return {**aurocs(folder), "similarity": mean_interval([result["similarity"] for result in results])}


def mean_interval(values: Sequence[float]) -> Estimate | None:
    """Mean over users with the interval from resampling them; None without users."""
    if not values:
        return None
    rows = np.array([[value, 1.0] for value in values])
    return bootstrap(rows, lambda sums: sums[..., 0] / sums[..., 1])._asdict()
