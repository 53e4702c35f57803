"""A summary as tables of text: what postprocess.py prints, and summary.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime.report.methods import REFERENCE, place
from prime.report.predictions import Cell
from prime.report.summary import LEAKAGE, metric_names, partial_methods
from prime.report.tables import interval_text, markdown
from prime.runs.files import write_json, write_text
from prime.users.metrics import METRICS

LEAKAGE_TITLES = dict(zip(
    LEAKAGE, ("AUROC", "AUROC, blind", "controlled AUROC", "controlled, blind"), strict=True
))  # fmt: skip
CONTROLLED_NOTE = "controlled: the same attack, records that the sharers trained on against their held-out ones."


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, and the same as two tables in summary.md."""
    write_json(folder / "summary.json", summary)
    tables = f"{markdown(table_rows(summary))}\n\n{markdown(method_rows(summary))}"
    write_text(folder / "summary.md", f"# {summary['task']}\n\n{tables}\n\n{notes(summary)}\n")


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and body: method, setting, metrics with intervals, and the comparison with prime."""
    metrics = metric_names(summary)
    header = ["method", "k", "profile", *metrics, f"{metrics[0]} - {REFERENCE}'s", "better/equal/worse"]
    pairs = {Cell(pair["method"], pair["k"], pair["profile"]): pair for pair in summary["paired"]}
    body = []
    for row in summary["rows"]:
        pair = pairs.get(Cell(row["method"], row["k"], row["profile"]))
        counts = f"{pair['better']}/{pair['equal']}/{pair['worse']}" if pair else "-"
        values = [interval_text(row[metric]) for metric in metrics]
        difference = interval_text(pair[metrics[0]] if pair else None, sign="+")
        profile = "yes" if row["profile"] else "no"
        body.append([row["method"], str(row["k"]), profile, *values, difference, counts])
    return [header, *body]


def method_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and body of what a method has one value of: leakage beside its blind baseline, and the cost of a user."""
    shown = [key for key in LEAKAGE if held_out(summary) or not key.startswith("controlled")]
    header = ["method", *(LEAKAGE_TITLES[key] for key in shown), "seconds/user", "bytes/user", "gradient"]
    body = []
    by_method = {row["method"]: row for row in summary["rows"]}
    for method in sorted(by_method, key=place):
        row = by_method[method]
        leakage = [interval_text(row[key]) for key in shown]
        costs = [_number(row["seconds_per_user"], ".1f"), _number(row["bytes_per_user"], ",.0f")]
        body.append([method, *leakage, *costs, "yes" if row["gradient"] else "no"])
    return [header, *body]


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def held_out(summary: Mapping[str, Any]) -> bool:
    """Whether any method was attacked in the controlled set."""
    return any(row["controlled_auroc"] for row in summary["rows"])


def notes(summary: Mapping[str, Any]) -> str:
    """What the reader has to know beside the tables: directions, intervals, the attack, missing users."""
    metrics = metric_names(summary)
    directions = [f"{'higher' if METRICS[metric].higher_is_better else 'lower'} {metric}" for metric in metrics]
    lines = [
        f"Better: {', '.join(directions)}. Brackets: 95 % intervals from resampling users.",
        f"better/equal/worse: users, by {metrics[0]}, against {REFERENCE}.",
        f"AUROC of attack {summary['auroc_attack']}.",
        *([CONTROLLED_NOTE] if held_out(summary) else []),
        "seconds/user: to search, compose or train, the share of each of those trained together; without predicting. "
        "bytes/user: of the stored adapter.\ngradient: whether the user's own history is trained on.",
    ]
    for method, (present, expected) in partial_methods(summary).items():
        lines.append(f"{method}: partial, {present} of {expected} users.")
    return "\n".join(lines)
