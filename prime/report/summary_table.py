"""A summary as tables of text: what postprocess.py prints, and summary.md."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime.report.methods import REFERENCE, place
from prime.report.predictions import Cell
from prime.report.scores import gain_of_reference
from prime.report.summary import LEAKAGE, any_outside, leading, metric_names, not_attacked, partial_methods
from prime.report.tables import Estimate, aligned, interval_text, markdown
from prime.runs.files import write_json, write_text
from prime.users.metrics import METRICS

LEAKAGE_TITLES = dict(zip(
    LEAKAGE, ("AUROC", "AUROC, blind", "controlled AUROC", "controlled, blind"), strict=True
))  # fmt: skip
OUTSIDE_NOTE = "outside: the share of answers that are none of the labels, or no number on the scale."
CONTROLLED_NOTE = "controlled: the same attack, records that the sharers trained on against their held-out ones."


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, and the same as tables in summary.md: the first test setting, leakage and costs, then the rest."""
    write_json(folder / "summary.json", summary)
    header, *body = table_rows(summary)
    first, rest = body[: len(leading(summary))], body[len(leading(summary)) :]
    parts = [f"# {summary['task']}", markdown([header, *first]), markdown(method_rows(summary)), notes(summary)]
    if rest:
        parts += ["## Other test settings", markdown([header, *rest])]
    write_text(folder / "summary.md", "\n\n".join(parts) + "\n")


def printed(summary: Mapping[str, Any], width: int = 110) -> str:
    """What a terminal shows: the first test setting, leakage and costs, the notes."""
    first = score_tables(summary)[0]
    rows = aligned([first["header"], *first["rows"]])
    lines = [textwrap.fill(line, width) for line in notes(summary).splitlines()]
    title = f"{summary['task']}, {first['name']}"
    return "\n\n".join([title, rows, aligned(method_rows(summary, short=True)), "\n".join(lines)])


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


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and body: method, setting, metrics with intervals, and what prime gains over the row."""
    metrics = metric_names(summary)
    outside = ["outside"] * any_outside(summary)
    header = ["method", "k", "profile", *metrics, *outside, f"{REFERENCE}'s gain", "better/equal/worse"]
    pairs = {Cell(pair["method"], pair["k"], pair["profile"]): pair for pair in summary["paired"]}
    body = []
    for row in summary["rows"]:
        pair = pairs.get(Cell(row["method"], row["k"], row["profile"]))
        counts = f"{pair['worse']}/{pair['equal']}/{pair['better']}" if pair else "-"
        values = [interval_text(row[metric]) for metric in metrics]
        values += [f"{row[share]['mean']:.3f}" for share in outside]
        gain = interval_text(gain_of_reference(pair, metrics[0]) if pair else None, sign="+")
        profile = "yes" if row["profile"] else "no"
        body.append([row["method"], str(row["k"]), profile, *values, gain, counts])
    return [header, *body]


def method_rows(summary: Mapping[str, Any], short: bool = False) -> list[list[str]]:
    """Header and body of what a method has one value of: leakage beside its blind baseline, and the cost of a user.

    short: of the first test setting's methods; the blind baseline in the cell of its AUROC, without its interval.
    """
    shown = [key for key in LEAKAGE if held_out(summary) or not key.startswith("controlled")]
    titles = [LEAKAGE_TITLES[key] for key in shown]
    if short:
        titles = [f"{title} (blind)" for title in titles[::2]]
    header = ["method", *titles, "seconds/user", "bytes/user", "gradient"]
    body = []
    by_method = {row["method"]: row for row in (leading(summary) if short else summary["rows"])}
    for method in sorted(by_method, key=place):
        row = by_method[method]
        leakage = [interval_text(row[key]) for key in shown]
        if short:
            leakage = [_with_blind(row[key], row[blind]) for key, blind in zip(shown[::2], shown[1::2], strict=True)]
        costs = [_number(row["seconds_per_user"], ".1f"), _number(row["bytes_per_user"], ",.0f")]
        body.append([method, *leakage, *costs, "yes" if row["gradient"] else "no"])
    return [header, *body]


def _with_blind(auroc: Estimate | None, blind: Estimate | None) -> str:
    return interval_text(auroc) + (f" ({blind['mean']:.3f})" if blind else "")


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
        *summary["remarks"],
        f"Better: {', '.join(directions)}. Brackets: 95 % intervals from resampling users.",
        f"{REFERENCE}'s gain: how much better its {metrics[0]} is; better/equal/worse: users, with {REFERENCE}.",
        *([OUTSIDE_NOTE] if any_outside(summary) else []),
        f"AUROC of attack {summary['auroc_attack']}.",
        *([CONTROLLED_NOTE] if held_out(summary) else []),
        "seconds/user: to search, compose or train, the share of each of those trained together; without predicting. "
        "bytes/user: of the stored adapter.\ngradient: whether the user's own history is trained on.",
    ]
    if missing := not_attacked(summary):
        lines.append(f"not attacked: {', '.join(missing)} (mia.py --exp_dir of their folders).")
    return "\n".join([*lines, *missing_users(summary)])


def missing_users(summary: Mapping[str, Any]) -> list[str]:
    """Methods that lack users, and of whom the rows are then; nothing where all are there."""
    partial, compared = partial_methods(summary), list(summary["compared"].values())[0]
    lines = [f"{method}: partial, {present} of {expected} users." for method, (present, expected) in partial.items()]
    if lines and compared:
        lines.append(f"Every row is of the {len(compared)} users that all rows have; leakage and costs are not.")
    elif lines:
        lines.append("The rows have no user in common, so each is of its own users: do not compare them.")
    return lines
