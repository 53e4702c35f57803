"""Figures of the search: how the best loss falls, and the weights that were found.

Letters: `u` users, `e` evaluations, `n` sharers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from prime.report.figures.parts import WIDTH, Drawn, label_axes, listed, people, plain
from prime.report.plots import COLOURS, figure

Evaluations = Sequence[Mapping[str, Any]]  # of one user, the lines of evaluations.jsonl, the base first

NUMBERED_USERS = 40  # a heat map of more rows or columns leaves out the numbers in its cells
NUMBERED_SHARERS = 5
ORIGINS = {
    "search": "a candidate of the search", "start": "its starting point", "sharer": "a single sharer",
    "base": "the base",
}  # fmt: skip

# --- losses ----------------------------------------------------------------------------------------


def usable_losses(evaluations: Evaluations, search_only: bool) -> np.ndarray:
    """[e] losses; infinite where a candidate cannot win, as single sharers under search_only."""
    losses = np.array([line["loss"] for line in evaluations], dtype=float)
    sharers = np.array([line["origin"] == "sharer" for line in evaluations])
    return np.where(search_only & sharers, np.inf, losses)


def best_so_far(losses: np.ndarray) -> np.ndarray:
    """[e] least loss until each evaluation, minus that of the first, the base."""
    return np.minimum.accumulate(losses) - losses[0]


def winners_text(searches: Sequence[Evaluations], losses: Sequence[np.ndarray]) -> str:
    """Where the deployed candidates came from: "the base for 3 and a single sharer for 21"."""
    counts: Counter[str] = Counter()
    for evaluations, usable in zip(searches, losses, strict=True):
        counts[evaluations[int(np.argmin(usable))]["origin"]] += 1
    return listed([f"{text} for {counts[origin]}" for origin, text in ORIGINS.items() if counts[origin]])


def draw_traces(searches: Sequence[Evaluations], search_only: bool) -> Drawn:
    """Best loss by evaluation, one line a user, the median thick. search_only: single sharers cannot win."""
    losses = [usable_losses(evaluations, search_only) for evaluations in searches]
    runs = [best_so_far(usable) for usable in losses]
    length = max(map(len, runs))
    padded = np.stack([np.append(run, np.full(length + 1 - len(run), run[-1])) for run in runs])
    places = np.append(np.arange(1, length + 1), length + 0.5)  # the last step is seen as a line
    made, axes = figure(WIDTH, 3.1)
    axes.plot(places, padded.T, color=COLOURS[7], linewidth=0.7, alpha=0.8, drawstyle="steps-post")
    axes.plot([], [], color=COLOURS[7], linewidth=0.7, label="a user")
    median = np.median(padded, axis=0)
    axes.plot(places, median, color=COLOURS[4], linewidth=2.2, drawstyle="steps-post", label="median of users")
    origins = [line["origin"] for line in max(searches, key=len)]
    begins = next((place for place, origin in enumerate(origins) if origin in ("start", "search")), None)
    if begins is not None:
        axes.axvline(begins + 0.5, color=COLOURS[0], linestyle=":", linewidth=1.2, label="the search begins")
    label_axes(axes, "candidates evaluated", "best loss so far − loss of the base\n(lower is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    made.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=3)
    quarter = max(1, length // 4)
    late = int(np.sum(padded[:, -1] < padded[:, length - 1 - quarter] - 1e-12)) if length > quarter else 0
    return made, (
        f"In the median the best loss ends {abs(median[-1]):.3f} below the base's. Of {people(len(runs))}, what is "
        f"deployed is {winners_text(searches, losses)}. The last {quarter} of {length} evaluations still improved "
        f"{people(late, len(runs))}."
    )


# --- weights ---------------------------------------------------------------------------------------


def sharer_weights(results: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[u, n] weights by rank of similarity, NaN beyond a user's sharers; of several weights of a sharer, their mean."""
    width = max(len(result["sharers"]) for result in results)
    table = np.full((len(results), width), np.nan)
    for row, result in zip(table, results, strict=True):
        for place, weight in enumerate(result.get("weights", [])):
            row[place] = np.mean(weight)
    return table


def draw_weights(results: Sequence[Mapping[str, Any]]) -> Drawn:
    """Heat map of each user's weights: columns are the user's sharers, most similar first."""
    table = sharer_weights(results)
    users, width = table.shape
    numbered = users <= NUMBERED_USERS and width <= NUMBERED_SHARERS
    made, axes = figure(WIDTH, max(2.2, 1.1 + users * (0.19 if numbered else 0.07)))
    edge = max(1.0, float(np.nanmax(np.abs(table)))) if np.isfinite(table).any() else 1.0
    image = axes.imshow(table, cmap="cividis", vmin=-edge, vmax=edge, aspect="auto", interpolation="nearest")
    made.colorbar(image, ax=axes, label="weight (dark: negative)")
    axes.set_xticks(range(width) if width <= 12 else range(0, width, 5))
    axes.set_xticklabels([str(int(place) + 1) for place in axes.get_xticks()])
    axes.set_yticks(range(users) if numbered else [])
    if numbered:
        axes.set_yticklabels([plain(result["user_id"], 10) for result in results], fontsize=7)
        _write_cells(axes, table, results, edge)
    label_axes(axes, "sharers of the user, most similar first", "test user" + ("" if numbered else f"s ({users})"))
    return made, weights_sentence(table)


def _write_cells(axes: Axes, table: np.ndarray, results: Sequence[Mapping[str, Any]], edge: float) -> None:
    """The weight in each cell, light on dark, and the sharer's id where there is room."""
    room = 48 // table.shape[1] - 7  # characters beside the weight
    for row, result in enumerate(results):
        for column, sharer in enumerate(result["sharers"]):
            if np.isfinite(value := table[row, column]):
                text = (f"{plain(sharer, room)}: " if room > 3 else "") + f"{value:+.2f}"
                colour = "white" if value < -0.05 * edge else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour, in_layout=False)


def weights_sentence(table: np.ndarray) -> str:
    """Of `sharer_weights` [u, n]: who leads, how many are negative, what they add up to."""
    merged = table[np.nansum(np.abs(table), axis=1) > 0]  # the others deploy the base
    if not len(merged):
        return f"Nobody's adapter is merged: all of {people(len(table))} deploy the base."
    used = table[np.isfinite(table)]
    first = np.argmax(np.nan_to_num(np.abs(merged)), axis=1) == 0
    return (
        f"Of {people(len(merged))} who merge, {int(first.sum())} give the most similar sharer the weight largest in "
        f"size; {np.mean(used < 0):.0%} of all weights are negative; a user's weights add up to "
        f"{np.median(np.nansum(merged, axis=1)):.2f} in the median."
    )
