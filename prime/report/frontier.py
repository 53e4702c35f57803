"""The trade between utility and privacy over several penalties: frontier.json, its table and its figure.

A run of `lora_composition_evo.py` with several penalties leaves a run directory for each, `penalty-<p>/`. Each becomes
a point, with Per-Pcs, the sharers, their average and the base beside it where those stages have run.
"""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prime.errors import InputError
from prime.report import figures, plots
from prime.report import table as report
from prime.report.methods import METHODS, SHORT_LIST
from prime.report.table import Cell
from prime.report.tables import aligned
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

Interval = dict[str, float]


def write_frontier(folder: Path, task: Task, golds: Mapping[str, str]) -> dict[str, Any]:
    """frontier.json and frontier.png and .svg of the penalty runs in `folder`; the content of the former."""
    runs = penalty_runs(folder)
    found: dict[str, Any] = {
        "task": task.name,
        "metric": task.metrics[0],
        "attack": ATTACK,
        "evaluations": shared_evaluations(runs),
        "points": [*(penalty_point(run, task, golds) for run in runs), *points_beside(folder, runs, task, golds)],
    }
    made, sentence = figures.frontier(found["points"], task.metrics[0])
    plots.save(made, folder / "frontier")
    found["sentence"] = sentence
    write_json(folder / "frontier.json", found)
    return found


def read_frontier(path: Path, task: Task) -> dict[str, Any]:
    """A frontier.json of the task."""
    found = read_form(path, FRONTIER_FILE)
    metric = found["metric"]
    if metric not in task.metrics:
        raise InputError(f"{path}: metric is {metric!r}; {task.name} has {', '.join(task.metrics)}")
    form = [{f"{metric}?": (PLOTTABLE_INTERVAL, None), **FRONTIER_POINT}]
    if problems := form_problems(found["points"], form, f"{path}: points"):
        raise InputError.many(problems)
    return found


# --- points ----------------------------------------------------------------------------------------


def point(
    method: str, label: str, predictions: report.Predictions, task: Task, golds: Mapping[str, str], **told: Any
) -> dict[str, Any] | None:
    """A point of the frontier at k = 0 without profile; None where there are no predictions."""
    stats = report.user_stats(task, predictions.get(Cell(method, 0, False), {}), golds)
    if not stats:
        return None
    scores = report.scores(task, report.stack(stats, list(stats)))
    unknown = dict.fromkeys(("penalty", "similarity", "auroc", "controlled_auroc"))
    return {"method": method, "label": label, "users": len(stats), **scores, **unknown, "settings": {}, **told}


def penalty_point(run: Path, task: Task, golds: Mapping[str, str]) -> dict[str, Any]:
    """What was deployed at one penalty."""
    stage, results = read_settings(run), read_results(run)
    method, penalty = stage["method"], penalty_of(run)
    found = point(
        method, f"penalty {penalty:g}", report.predictions_of(results), task, golds, penalty=penalty,
        similarity=mean_of([result["similarity"] for result in results]), **aurocs(run), settings=stage["settings"],
    )  # fmt: skip
    return found or {"method": method, "label": f"penalty {penalty:g}", "penalty": penalty}


def points_beside(folder: Path, runs: Sequence[Path], task: Task, golds: Mapping[str, str]) -> list[dict[str, Any]]:
    """The baselines for the same users: those that the searches predict, and those of the stages beside `folder`."""
    results = read_results(runs[0])
    searched = {result["user_id"] for result in results}
    gathered, sources = report.gather(folder, task)
    predictions = {
        cell: {user: samples for user, samples in by_user.items() if user in searched}
        for cell, by_user in (gathered | report.predictions_of(results)).items()
    }
    known = known_points(runs[0])
    blind, sharers = (first([aurocs(run, part) for run in runs]) for part in ("blind", "sharers"))
    told: dict[str, dict[str, Any]] = {
        "base": {},  # not attacked: the blind baseline is the task-adapted base's
        "task_lora": {**blind, "similarity": known["task_lora"]},
        "best_sharer": {**sharers, "similarity": known["best_sharer"]},
        "uniform": {},
        "per_pcs": per_pcs(sources["per_pcs"], searched) if "per_pcs" in sources else {},
    }
    labels = {name: METHODS[name].label + REMARKS.get(name, "") for name in SHORT_LIST}
    points = [point(name, label, predictions, task, golds, **told[name]) for name, label in labels.items()]
    return [one for one in points if one is not None]


def per_pcs(folder: Path, users: Container[str]) -> dict[str, Any]:
    found = [result for result in read_results(folder) if result["user_id"] in users and "similarity" in result]
    return {**aurocs(folder), "similarity": mean_of([result["similarity"] for result in found])}


def known_points(run: Path) -> dict[str, Interval | None]:
    """Similarity of what every search evaluates first: the task-adapted base, and the best single sharer."""
    base, best = [], []
    for result in read_results(run):
        lines = read_evaluations(run, result)
        base.append(lines[0]["similarity"])
        best.append(lines[1 + result["sharers"].index(result["best_sharer"])]["similarity"])
    return {"task_lora": mean_of(base), "best_sharer": mean_of(best)}


def aurocs(run: Path, part: str = "") -> dict[str, Interval | None]:
    """AUROC of both sets on what a run deployed; part "sharers": on the unmerged sharers, "blind": on the base."""
    path = run / "mia_summary.json"
    summary = read_form(path, FRONTIER_SUMMARY) if path.is_file() else {}
    sets = (summary.get("sharers", {}) if part == "sharers" else summary).get("sets", {})
    key = "blind_auroc" if part == "blind" else "auroc"
    names = {"auroc": "published", "controlled_auroc": "controlled"}
    return {told: sets.get(name, {}).get("attacks", {}).get(ATTACK, {}).get(key) for told, name in names.items()}


def first(found: Sequence[dict[str, Interval | None]]) -> dict[str, Interval | None]:
    """The first that is known; the penalties share sharers and base."""
    return next((one for one in found if one["auroc"]), found[0])


def mean_of(values: Sequence[float]) -> Interval | None:
    """Mean over users with the interval from resampling them."""
    if not values:
        return None
    rows = np.array([[value, 1.0] for value in values])
    three = bootstrap(rows, lambda sums: sums[..., 0] / sums[..., 1])
    return dict(zip(("mean", "low", "high"), map(float, three), strict=True))


# --- the table -------------------------------------------------------------------------------------


def frontier_table(found: Mapping[str, Any]) -> str:
    metric = found["metric"]
    better = "higher" if METRICS[metric].higher_is_better else "lower"
    header = ["", f"{metric} ({better} is better)", "similarity", "AUROC", "AUROC, controlled"]
    body = [
        [one["label"], *(report.cell_text(one.get(key)) for key in (metric, "similarity", "auroc", "controlled_auroc"))]
        for one in found["points"]
    ]
    return f"{aligned([header, *body])}\n{sharing_text(found['evaluations'])}"
