"""What the report's figures have in common: a drawing with the sentence that says what to see in it, names, marks.

Every function in this folder that is called draw_* draws plain data and returns (figure, sentence). The numbers of a
sentence are computed from what is drawn. Markers, lines and written values tell things apart before colour does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prime.report.tables import Estimate
from prime.users.metrics import METRICS

Drawn = tuple[Figure, str]

WIDTH = 4.6  # inches: legible where a telephone shows it whole

# --- text ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _known_characters() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def plain(text: str, limit: int = 16) -> str:
    """A name as matplotlib may draw it: no formulas, no line ends, no character the font lacks, not too long."""
    text = "".join(c if ord(c) in _known_characters() else "?" for c in " ".join(text.split()))
    return (text if len(text) <= limit else text[: limit - 1] + "…").replace("$", r"\$")


def people(n: int, of: int | None = None) -> str:
    """"1 user", "3 of 24 users"."""
    total = n if of is None else of
    return f"{n} {'' if of is None else f'of {of} '}user{'' if total == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """"a, b and c"."""
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def direction(metric: str) -> str:
    return "higher is better" if METRICS[metric].higher_is_better else "lower is better"


def sign(metric: str) -> int:
    """1 where a higher value is better, -1 where a lower one is."""
    return 1 if METRICS[metric].higher_is_better else -1


# --- marks -----------------------------------------------------------------------------------------


def mark_interval(axes: Axes, value: Estimate, place: float, **style: Any) -> None:
    """A dot with its interval on a horizontal line."""
    axes.hlines(place, value["low"], value["high"], color=style.get("color"), linewidth=1.2)
    axes.plot([value["mean"]], [place], linestyle="none", **style)


def mark_cross(axes: Axes, x: Estimate, y: Estimate, colour: str, marker: str, label: str, size: int = 6) -> None:
    """A point with its intervals both ways."""
    axes.hlines(y["mean"], x["low"], x["high"], color=colour, linewidth=0.8)
    axes.vlines(x["mean"], y["low"], y["high"], color=colour, linewidth=0.8)
    axes.plot([x["mean"]], [y["mean"]], marker, color=colour, markersize=size, label=label)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names on the vertical axis, the first on top."""
    axes.set_yticks(range(len(names)), [plain(name, 24) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", linewidth=0.4, color="#dddddd")


def label_axes(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
