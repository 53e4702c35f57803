"""Figures as PNG and SVG: one style, readable without colour, the same bytes for the same numbers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

os.environ["MPLBACKEND"] = "Agg"  # as in prime.cli
import matplotlib

matplotlib.use("Agg")  # where matplotlib was there before
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prime.runs.files import replacing

# Told apart by marker and line before colour; Okabe and Ito's colours, safe for colour-blind readers.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: Any = {"svg.hashsalt": "prime", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams.update(STYLE)

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # label -> false and true positive rates


def figure(width: float = 5.0, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure of one pair of axes, sizes in inches."""
    made, axes = plt.subplots(figsize=(width, height), layout="constrained")
    return made, cast(Axes, axes)


def side_by_side(n: int, width: float = 3.2, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure of n pairs of axes side by side, sizes of one in inches; they share the vertical axis."""
    with plt.rc_context(STYLE):
        made, axes = plt.subplots(
            1, n, figsize=(0.6 + width * n, height), layout="constrained", sharey=True, squeeze=False
        )
    return made, list(axes[0])


def save(made: Figure, stem: Path) -> list[Path]:
    """Write <stem>.png and <stem>.svg and close the figure; returns the paths. No date goes into the files."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
        with replacing(path) as temporary:
            made.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)
        made.set_layout_engine("none")  # the places found for the first file serve the second
    plt.close(made)
    return paths


def shared_legend(made: Figure, axes: Sequence[Axes], fontsize: int, ncols: int) -> None:
    """One legend below all panels; a label that several of them have stands in it once."""
    handles = {}
    for panel in axes:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles[label] = line
    made.legend(
        handles.values(), handles.keys(), loc="outside lower center", frameon=False, fontsize=fontsize, ncols=ncols
    )


def roc_panels(panels: Mapping[str, Curves], lowest: float = 1e-3) -> Figure:
    """ROC curves on log scales, a panel for each title; dotted: guessing.

    `lowest` is where the axes begin: the lowest false positive rate of interest.
    """
    made, axes = side_by_side(len(panels))
    places: dict[str, int] = {}  # of a label, the same in all panels
    for curves in panels.values():
        for label in curves:
            places.setdefault(label, len(places))
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        panel.plot([lowest, 1], [lowest, 1], color="#999999", linestyle=":", linewidth=1)
        for label, (fpr, tpr) in curves.items():
            place = places[label]
            marks: Any = {"marker": MARKERS[place % 8], "markersize": 3.5, "markevery": (0.02 * (place % 8), 0.16)}
            panel.plot(fpr, tpr, COLOURS[place % 7], linestyle=LINES[place % 4], linewidth=1.2, label=label, **marks)
        panel.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1))
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("false positive rate")
    axes[0].set_ylabel("true positive rate")
    shared_legend(made, axes, fontsize=7, ncols=3 * len(axes))
    return made
