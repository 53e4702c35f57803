"""The sections "Table" and "User by user": scores by method, and what each user gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prime.report.figures.parts import sign
from prime.report.figures.utility import draw_pairs, draw_scores
from prime.report.found import weights_text
from prime.report.methods import REFERENCE
from prime.report.sections.content import Content
from prime.report.summary import leading
from prime.report.web import Shown, show


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
    """What each compared user gains by PriME over a baseline, in the metric's direction."""
    ours, theirs = content.user_scores(REFERENCE), content.user_scores(baseline)
    both = [user for user in content.compared(ours) if user in ours and user in theirs]
    return [sign(content.metric) * (ours[user] - theirs[user]) for user in both]


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
        rows.append([user, *values, result.get("deployed", "-"), weights_text(result)])
    return {"header": ["user", *methods, "deployed", "sharers and weights"], "rows": rows}
