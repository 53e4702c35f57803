"""Figures of utility: scores by method, users' gains over a baseline, and both across tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from prime.report.figures.parts import (
    WIDTH,
    Drawn,
    direction,
    label_axes,
    listed,
    mark_interval,
    name_rows,
    people,
    plain,
    sign,
)
from prime.report.plots import COLOURS, figure
from prime.report.scores import gain_of_reference
from prime.report.tables import Estimate, interval_text
from prime.users.metrics import METRICS


def draw_scores(rows: Sequence[Mapping[str, Any]], metric: str, ours: str) -> Drawn:
    """A metric with its interval for each method of one setting: rows of summary.json."""
    made, axes = figure(WIDTH, 0.9 + 0.26 * len(rows))
    for place, row in enumerate(rows):
        colour, marker, size = (COLOURS[5], "D", 6) if row["method"] == ours else (COLOURS[0], "o", 5)
        mark_interval(axes, row[metric], place, markersize=size, color=colour, marker=marker)
    name_rows(axes, [row["method"] for row in rows])
    label_axes(axes, f"{metric} ({direction(metric)}), 95 % interval")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return made, scores_sentence(rows, metric, ours)


def scores_sentence(rows: Sequence[Mapping[str, Any]], metric: str, ours: str) -> str:
    """Which row is best, and how many rows `ours` is ahead of."""
    values = {row["method"]: sign(metric) * row[metric]["mean"] for row in rows}  # higher is better
    best = max(rows, key=lambda row: (values[row["method"]], row["method"] == ours))
    if len(set(values.values())) == 1 < len(rows):
        return f"All rows are alike: {metric} {interval_text(best[metric])}."
    sentence = f"Best is {best['method']} with {metric} {interval_text(best[metric])}"
    reference = next((row for row in rows if row["method"] == ours), None)
    if reference is None:
        return f"{sentence}."
    if best is not reference:
        sentence += f"; {ours} has {interval_text(reference[metric])}"
    behind = [value for value in values.values() if value < values[ours]]
    return f"{sentence}. {ours} is ahead of {len(behind)} of the {len(rows) - 1} other rows."


def draw_pairs(gains: Sequence[float], pair: Mapping[str, Any], metric: str, ours: str) -> Drawn:
    """Each user's gain of `ours` over a baseline, sorted; above 0 `ours` is better.

    Args:
        gains: [u], in the metric's direction.
        pair: the entry of summary.json's `paired` for that baseline (baseline minus `ours`).
    """
    baseline, gain = pair["method"], np.sort(np.asarray(gains))[::-1]
    tie = np.isclose(gain, 0, atol=1e-9)
    made, axes = figure(WIDTH, 2.5)
    places = np.arange(1, len(gain) + 1)
    axes.axhline(0, color=COLOURS[0], linewidth=0.8)
    for mask, marker, colour, name in (
        (~tie & (gain > 0), "^", COLOURS[4], f"{ours} better"), (tie, "o", COLOURS[7], "equal"),
        (~tie & (gain < 0), "v", COLOURS[5], f"{ours} worse"),
    ):  # fmt: skip
        axes.vlines(places[mask], 0, gain[mask], color=colour, linewidth=1)
        axes.plot(places[mask], gain[mask], marker, color=colour, markersize=4, label=f"{name}: {mask.sum()}")
    higher = METRICS[metric].higher_is_better
    sides = (ours, baseline) if higher else (baseline, ours)
    label_axes(axes, "test users, sorted", f"{metric}\n{plain(sides[0])} − {plain(sides[1])}")
    axes.set_xlim(0.2, len(gain) + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="best", frameon=False, fontsize=8)
    return made, pair_sentence(pair, metric, ours)


def holds_zero(value: Estimate) -> bool:
    return value["low"] <= 0 <= value["high"]


def pair_sentence(pair: Mapping[str, Any], metric: str, ours: str) -> str:
    """An entry of summary.json's `paired` (baseline minus `ours`), told from the side of `ours`."""
    gain, users = gain_of_reference(pair, metric), pair["better"] + pair["equal"] + pair["worse"]
    verdict = "holds 0: no difference is shown" if holds_zero(gain) else "leaves out 0"
    return (
        f"Against {pair['method']}, {ours} is better for {people(pair['worse'], users)}, as good for {pair['equal']}, "
        f"worse for {pair['better']}; over all of them it gains {interval_text(gain, '+')} in {metric} "
        f"({direction(metric)}), an interval that {verdict}."
    )


def draw_tasks(pairs_by_task: Mapping[str, Mapping[str, Any]], baseline: str, ours: str) -> Drawn:
    """Shares of users better, equal and worse off with `ours` than with a baseline, a bar per task.

    `pairs_by_task` holds entries of summary.json's `paired` (baseline minus `ours`).
    """
    made, axes = figure(WIDTH, 1.2 + 0.34 * len(pairs_by_task))
    totals = {name: pair["better"] + pair["equal"] + pair["worse"] for name, pair in pairs_by_task.items()}
    left = np.zeros(len(totals))
    for key, name, colour, hatch in (
        ("worse", f"{ours} better", COLOURS[2], ""), ("equal", "equal", "#eeeeee", ""),
        ("better", f"{ours} worse", COLOURS[1], "////"),
    ):  # fmt: skip
        share = np.array([pair[key] / totals[task] for task, pair in pairs_by_task.items()])
        axes.barh(range(len(totals)), share, left=left, color=colour, hatch=hatch, edgecolor=COLOURS[0], linewidth=0.6,
                  height=0.62, label=name)  # fmt: skip
        left = left + share
    name_rows(axes, list(totals))
    axes.set_xlim(0, 1)
    label_axes(axes, f"share of test users, {ours} against {baseline}")
    made.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=3)
    ahead = [task for task, pair in pairs_by_task.items() if pair["worse"] > pair["better"]]
    where = f"in {len(ahead)} of {len(totals)} tasks" + (f" ({listed(ahead)})" if ahead else "")
    return made, f"More users are better off with {ours} than with {baseline} {where}."
