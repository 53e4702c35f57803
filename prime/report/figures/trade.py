"""Figures of the trade between utility and leakage: by method, and over the penalties of a frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from prime.report.figures.parts import WIDTH, Drawn, direction, label_axes, listed, mark_cross, plain, sign
from prime.report.plots import COLOURS, MARKERS, figure, shared_legend, side_by_side
from prime.report.tables import excess

Point = Mapping[str, Any]  # of frontier.json

# What a point of a frontier may trade utility for.
TRADED_TITLES = {
    "auroc": "AUROC, sharers from other anchors",
    "controlled_auroc": "AUROC, trained from held-out records",
    "similarity": "similarity to the sharers",
}

# --- by method -------------------------------------------------------------------------------------


def draw_trade(rows: Sequence[Mapping[str, Any]], metric: str, ours: str) -> Drawn:
    """Utility against leakage: rows of summary.json that have an AUROC."""
    made, axes = figure(WIDTH, 3.4)
    for place, row in enumerate(rows):
        size, colour, marker = 8 if row["method"] == ours else 6, COLOURS[place % 8], MARKERS[place % 8]
        mark_cross(axes, row["auroc"], row[metric], colour, marker, plain(row["method"]), size)
    label_axes(axes, "AUROC of the published attack (left: less leakage)", f"{metric} ({direction(metric)})")
    made.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return made, trade_sentence(rows, metric, ours)


def trade_sentence(rows: Sequence[Mapping[str, Any]], metric: str, ours: str) -> str:
    """The row of most utility, that of least leakage (by how far its AUROC lies above its blind baseline), and where
    `ours` lies.
    """
    best = max(rows, key=lambda row: sign(metric) * row[metric]["mean"])
    least = min(rows, key=lambda row: excess(row["auroc"], row["blind_auroc"]))
    reference = next((row for row in rows if row["method"] == ours), best)
    if len({(row[metric]["mean"], row["auroc"]["mean"]) for row in rows}) == 1 < len(rows):
        return f"All are alike: {_row_text(reference, metric)}."
    ends = f"Best utility: {_row_text(best, metric)}; least leakage: {_row_text(least, metric)}"
    return ends + ("." if reference in (best, least) else f"; {_row_text(reference, metric)} lies between.")


def _row_text(row: Mapping[str, Any], metric: str) -> str:
    above = "" if row["blind_auroc"] is None else f", {excess(row['auroc'], row['blind_auroc']):+.3f} above blind"
    return f"{row['method']} ({metric} {row[metric]['mean']:.3f}, AUROC {row['auroc']['mean']:.3f}{above})"


# --- by penalty ------------------------------------------------------------------------------------


def draw_frontier(points: Sequence[Point], metric: str) -> Drawn:
    """Utility against leakage and against similarity: points of frontier.json, those of the penalties joined."""
    titles = {key: title for key, title in TRADED_TITLES.items() if _measured(points, key)}
    panels = max(1, len(titles))
    made, axes = side_by_side(panels)
    baselines = [point for point in points if point["penalty"] is None]
    penalties = [point for point in points if point["penalty"] is not None]
    for panel, (key, title) in zip(axes, titles.items(), strict=False):
        for place, point in enumerate(baselines, 1):
            if point.get(key):
                label = plain(point["label"], 28)
                mark_cross(panel, point[key], point[metric], COLOURS[place % 8], MARKERS[place % 8], label)
        _draw_penalties(panel, _measured(penalties, key), key, metric)
        label_axes(panel, title)
    axes[0].set_ylabel(f"{metric} ({direction(metric)})")
    shared_legend(made, axes, fontsize=8, ncols=1 + panels)  # the longest names fit beside each other
    return made, frontier_sentence(points, metric)


def _measured(points: Sequence[Point], key: str) -> list[Point]:
    return [point for point in points if point.get(key)]


def _draw_penalties(axes: Axes, points: Sequence[Point], key: str, metric: str) -> None:
    """The points of the penalties, joined, each with its penalty beside it."""
    penalties: dict[tuple[float, float], list[str]] = {}  # at each place
    for point in points:
        mark_cross(axes, point[key], point[metric], COLOURS[0], MARKERS[0], "merged, by penalty")
        penalties.setdefault((point[key]["mean"], point[metric]["mean"]), []).append(f"{point['penalty']:g}")
    for place, texts in penalties.items():
        axes.annotate(", ".join(texts), place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    xs, ys = [point[key]["mean"] for point in points], [point[metric]["mean"] for point in points]
    axes.plot(xs, ys, color=COLOURS[7], linewidth=0.8, zorder=0)


def frontier_sentence(points: Sequence[Point], metric: str) -> str:
    """From the lowest to the highest penalty: what it costs and what it buys."""
    penalties = [point for point in points if point["penalty"] is not None]
    lowest, highest = penalties[0], penalties[-1]
    keys = [metric, *(key for key in TRADED_TITLES if lowest.get(key) and highest.get(key))]
    titles = {metric: metric} | TRADED_TITLES
    ends = f"From penalty {lowest['penalty']:g} to {highest['penalty']:g}"
    if all(_alike(penalties, key) for key in keys):
        values = [f"{titles[key]} {lowest[key]['mean']:.3f}" for key in keys]
        return f"{ends} nothing changes: {listed(values)}."
    changes = [f"{titles[key]} {lowest[key]['mean']:.3f} to {highest[key]['mean']:.3f}" for key in keys]
    return f"{ends}: {listed(changes)}."


def _alike(points: Sequence[Point], key: str) -> bool:
    return all(point.get(key) == points[0][key] for point in points)
