"""The page across tasks: <output>/report.html, from the summaries of the tasks' runs in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime.attack import scoring
from prime.report import figures
from prime.report import table as report
from prime.report.methods import REFERENCE, SHORTEST_LIST, place
from prime.report.table import Cell, leading
from prime.report.web import Shown, render, show
from prime.runs.files import read_json, write_text
from prime.users import metrics

OURS = REFERENCE


def task_summaries(output: Path) -> dict[str, dict[str, Any]]:
    """summary.json of every folder in `output` that is named after its task, by name."""
    found = {}
    for path in sorted(output.glob("*/summary.json")):
        summary = read_json(path)
        if isinstance(summary, dict) and summary.get("task") == path.parent.name and summary.get("rows"):
            found[path.parent.name] = summary
    return found


def task_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Tasks by methods: the first metric at k = 0 without profile, then PriME's leakage."""
    present = {row["method"] for summary in summaries.values() for row in leading(summary)}
    methods = sorted(present, key=place)
    rows = [["task", "metric", *methods, f"AUROC of {OURS}", "blind baseline"]]
    for task, summary in summaries.items():
        own = {row["method"]: row for row in leading(summary)}
        name = report.metric_names(summary)[0]
        better = "higher" if metrics.METRICS[name].higher_is_better else "lower"
        cells = [report.cell_text(own[m][name]) if m in own else "-" for m in methods]
        ours = own.get(OURS, {})
        leaked = [report.cell_text(ours.get(key)) for key in ("auroc", "blind_auroc")]
        rows.append([task, f"{name} ({better} is better)", *cells, *leaked])
    return rows


def tasks_figures(summaries: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Shown]:
    shown = []
    for baseline in SHORTEST_LIST:
        wanted = Cell(baseline, 0, False)
        found = {task: pair for task, summary in summaries.items() for pair in summary["paired"]
                 if Cell(pair["method"], pair["k"], pair["profile"]) == wanted}  # fmt: skip
        if found:
            drawn = figures.tasks_paired(found, baseline, OURS)
            shown.append(show(folder, f"tasks-{baseline}", f"{OURS} against {baseline}, by task", drawn))
    attacked = [
        (task, row["auroc"], row["blind_auroc"]) for task, summary in summaries.items() for row in leading(summary)
        if row["method"] == OURS and row["auroc"] and row["blind_auroc"]
    ]  # fmt: skip
    if attacked:
        drawn = figures.leakage(attacked, scoring.PUBLISHED_ATTACK)
        shown.append(show(folder, "tasks-leakage", f"Leakage of {OURS}, by task", drawn))
    return shown


def write_tasks_page(output: Path) -> Path:
    """<output>/report.html from the summaries of the tasks in it."""
    summaries = task_summaries(output)
    path = output / "report.html"
    partial_tasks = [
        f"{task}: {method} has {n['present']} of {n['expected']} users." for task, summary in summaries.items()
        for method, n in summary["users"].items() if n["present"] < n["expected"]
    ]  # fmt: skip
    write_text(path, render(
        "tasks.html", table_rows=task_rows(summaries), figures=tasks_figures(summaries, output / "figures"),
        partial=partial_tasks, links=[task for task in summaries if (output / task / "report.html").is_file()],
    ))  # fmt: skip
    return path
