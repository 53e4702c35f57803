"""The page across tasks: <output>/report.html, from the summaries of the tasks' runs in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime.attack.scoring import PUBLISHED_ATTACK
from prime.report.figures.leakage import draw_leakage
from prime.report.figures.parts import direction
from prime.report.figures.utility import draw_tasks
from prime.report.methods import REFERENCE, SHORTEST_LIST, place
from prime.report.predictions import Cell
from prime.report.summary import leading, metric_names, partial_methods
from prime.report.tables import interval_text
from prime.report.web import Shown, render, show
from prime.runs.files import read_json, write_text

Summaries = Mapping[str, Mapping[str, Any]]  # task -> content of its summary.json


def task_summaries(output: Path) -> dict[str, dict[str, Any]]:
    """summary.json of every folder in `output` that is named after its task, by name."""
    summaries = {}
    for path in sorted(output.glob("*/summary.json")):
        summary = read_json(path)
        if isinstance(summary, dict) and summary.get("task") == path.parent.name and summary.get("rows"):
            summaries[path.parent.name] = summary
    return summaries


def rows_by_method(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rows at k = 0 without profile."""
    return {row["method"]: row for row in leading(summary)}


def task_rows(summaries: Summaries) -> list[list[str]]:
    """Tasks by methods: the first metric at k = 0 without profile, then PriME's leakage."""
    by_task = {task: rows_by_method(summary) for task, summary in summaries.items()}
    methods = sorted(set().union(*by_task.values()), key=place)
    table = [["task", "metric", *methods, f"AUROC of {REFERENCE}", "blind baseline"]]
    for task, rows in by_task.items():
        metric = metric_names(summaries[task])[0]
        values = [interval_text(rows[method][metric]) if method in rows else "-" for method in methods]
        reference = rows.get(REFERENCE, {})
        leakage = [interval_text(reference.get(key)) for key in ("auroc", "blind_auroc")]
        table.append([task, f"{metric} ({direction(metric)})", *values, *leakage])
    return table


def tasks_figures(summaries: Summaries, folder: Path) -> list[Shown]:
    shown = []
    for baseline in SHORTEST_LIST:
        if pairs := pairs_with(summaries, baseline):
            drawn = draw_tasks(pairs, baseline, REFERENCE)
            shown.append(show(folder, f"tasks-{baseline}", f"{REFERENCE} against {baseline}, by task", drawn))
    attacked = []
    for task, summary in summaries.items():
        reference = rows_by_method(summary).get(REFERENCE)
        if reference and reference["auroc"] and reference["blind_auroc"]:
            attacked.append((task, reference["auroc"], reference["blind_auroc"]))
    if attacked:
        drawn = draw_leakage(attacked, PUBLISHED_ATTACK)
        shown.append(show(folder, "tasks-leakage", f"Leakage of {REFERENCE}, by task", drawn))
    return shown


def pairs_with(summaries: Summaries, baseline: str) -> dict[str, Mapping[str, Any]]:
    """The comparison with a baseline at k = 0 without profile, of the tasks that have it."""
    wanted = Cell(baseline, 0, False)
    pairs = {}
    for task, summary in summaries.items():
        for pair in summary["paired"]:
            if Cell(pair["method"], pair["k"], pair["profile"]) == wanted:
                pairs[task] = pair
    return pairs


def write_tasks_page(output: Path) -> Path:
    """<output>/report.html from the summaries of the tasks in it."""
    summaries = task_summaries(output)
    partial_tasks = []
    for task, summary in summaries.items():
        for method, (present, expected) in partial_methods(summary).items():
            partial_tasks.append(f"{task}: {method} has {present} of {expected} users.")
    page = render(
        "tasks.html",
        table_rows=task_rows(summaries),
        figures=tasks_figures(summaries, output / "figures"),
        partial=partial_tasks,
        links=[task for task in summaries if (output / task / "report.html").is_file()],
    )
    path = output / "report.html"
    write_text(path, page)
    return path
