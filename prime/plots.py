"""Figures as PNG and SVG: one style, readable without colour, the same bytes for the same numbers."""

from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor asked for
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prime.runs import replacing

# Told apart by marker and line before colour; Okabe and Ito's colours, safe for colour-blind readers.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: Any = {"svg.hashsalt": "prime", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams.update(STYLE)


def figure(width: float = 5.0, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure of one pair of axes, sizes in inches."""
    made, axes = plt.subplots(figsize=(width, height), layout="constrained")
    return made, cast(Axes, axes)


def save(made: Figure, stem: Path) -> list[Path]:
    """Write <stem>.png and <stem>.svg and close the figure; returns the paths. No date goes into the files."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
        with replacing(path) as temporary:
            made.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)
        made.set_layout_engine("none")  # the places found for the first file serve the second
    plt.close(made)
    return paths
