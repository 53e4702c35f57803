"""The sections "Table" and "User by user": scores by method, and what each user gains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prime.report.figures.parts import sign
from prime.report.figures.utility import draw_pairs, draw_scores
from prime.report.methods import REFERENCE
from prime.report.sections.content import Content
from prime.report.summary import leading
from prime.report.summary_table import table_rows
from prime.report.web import Shown, show


def setting_name(k: int, profile: bool) -> str:
    return f"k = {k}, {'with' if profile else 'without'} the textual profile"


def score_tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of summary.json, a part for each test setting, the first setting first."""
    header, *body = table_rows(summary)
    parts: dict[tuple[int, bool], list[list[str]]] = {}
    for row, (method, _, _, *values) in zip(summary["rows"], body, strict=True):
        parts.setdefault((row["k"], row["profile"]), []).append([method, *values])
    titles = [header[0], *header[3:]]
    return [{"name": setting_name(*key), "header": titles, "rows": rows} for key, rows in parts.items()]


def score_figures(content: Content, folder: Path) -> list[Shown]:
    """A figure for each metric: all methods at the first test setting."""
    rows, shown = leading(content.summary), []
    for metric in content.task.metrics:
        drawn = draw_scores(rows, metric, REFERENCE)
        shown.append(show(folder, f"scores-{metric}", f"{metric} by method", drawn))
    return shown


def pair_figures(content: Content, folder: Path) -> list[Shown]:
    """A figure for each baseline: PriME against it, user by user, at the first test setting."""
    first, shown = leading(content.summary)[0], []
    for pair in content.summary["paired"]:
        if (pair["k"], pair["profile"]) == (first["k"], first["profile"]):
            drawn = draw_pairs(gains(content, pair["method"]), pair, content.metric, REFERENCE)
            title = f"{REFERENCE} against {pair['method']}, user by user"
            shown.append(show(folder, f"paired-{pair['method']}", title, drawn))
    return shown


def gains(content: Content, baseline: str) -> list[float]:
    """What each user gains by PriME over a baseline, in the metric's direction; users that both answered."""
    ours, theirs = content.user_scores(REFERENCE), content.user_scores(baseline)
    return [sign(content.metric) * (ours[user] - theirs[user]) for user in ours if user in theirs]


def user_table(content: Content) -> dict[str, Any]:
    """Each user's score by method, and what was deployed."""
    methods = [row["method"] for row in leading(content.summary)]
    scores = [content.user_scores(method) for method in methods]
    results = {result["user_id"]: result for result in content.reference_results()}
    users: dict[str, None] = {}  # in the order in which the methods name them
    for by_user in scores:
        users |= dict.fromkeys(by_user)
    rows = []
    for user in users:
        values = [f"{by_user[user]:.3f}" if user in by_user else "-" for by_user in scores]
        result = results.get(user, {})
        rows.append([user, *values, result.get("deployed", "-"), _weights_text(result)])
    return {"header": ["user", *methods, "deployed", "sharers and weights"], "rows": rows}


def _weights_text(result: Mapping[str, Any]) -> str:
    parts = zip(result.get("sharers", []), result.get("weights", []), strict=False)
    return ", ".join(f"{sharer}: {float(np.mean(weight)):+.2f}" for sharer, weight in parts) or "-"
