"""The figures of a report, each with the one sentence that says what to see in it.

Every function draws plain data and returns (figure, sentence). The numbers of a sentence are computed from what is
drawn. Markers, lines and written values tell things apart before colour does. Letters: `u` users, `e` evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prime.attack.scoring import PUBLISHED_ATTACK
from prime.report import plots
from prime.report.plots import COLOURS, MARKERS, figure, side_by_side
from prime.users.metrics import METRICS

Drawn = tuple[Figure, str]
Interval = Mapping[str, float]

WIDTH = 4.6  # inches: legible where a telephone shows it whole
NUMBERED_USERS = 40  # a heat map of more rows or columns leaves out the numbers in its cells
NUMBERED_SHARERS = 5


# --- text ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _known_characters() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def plain(text: str, limit: int = 16) -> str:
    """A name as matplotlib may draw it: no formulas, no line ends, no character the font lacks, not too long."""
    text = "".join(c if ord(c) in _known_characters() else "?" for c in " ".join(text.split()))
    return (text if len(text) <= limit else text[: limit - 1] + "…").replace("$", r"\$")


def value_text(value: Interval, sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def holds_zero(value: Interval) -> bool:
    return value["low"] <= 0 <= value["high"]


def people(n: int, of: int | None = None) -> str:
    """"1 user", "3 of 24 users"."""
    total = n if of is None else of
    return f"{n} {'' if of is None else f'of {of} '}user{'' if total == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """"a, b and c"."""
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


# --- parts of drawings -----------------------------------------------------------------------------


def _interval(axes: Axes, value: Interval, place: float, **style: Any) -> None:
    """A dot with its interval on a horizontal line."""
    axes.hlines(place, value["low"], value["high"], color=style.get("color"), linewidth=1.2)
    axes.plot([value["mean"]], [place], linestyle="none", **style)


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Names on the vertical axis, the first on top."""
    axes.set_yticks(range(len(names)), [plain(name, 24) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", linewidth=0.4, color="#dddddd")


def _better(metric: str) -> str:
    return "higher is better" if METRICS[metric].higher_is_better else "lower is better"


def _label(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _cross(axes: Axes, x: Interval, y: Interval, colour: str, marker: str, label: str, size: int = 6) -> None:
    """A point with its intervals both ways."""
    axes.hlines(y["mean"], x["low"], x["high"], color=colour, linewidth=0.8)
    axes.vlines(x["mean"], y["low"], y["high"], color=colour, linewidth=0.8)
    axes.plot([x["mean"]], [y["mean"]], marker, color=colour, markersize=size, label=label)


# --- utility ---------------------------------------------------------------------------------------


def scores(rows: Sequence[Mapping[str, Any]], metric: str, ours: str) -> Drawn:
    """A metric with its interval for each method of one setting: rows of summary.json."""
    made, axes = figure(WIDTH, 0.9 + 0.26 * len(rows))
    for place, row in enumerate(rows):
        own = row["method"] == ours
        style = {"color": COLOURS[5] if own else COLOURS[0], "marker": "D" if own else "o"}
        _interval(axes, row[metric], place, markersize=6 if own else 5, **style)
    _names(axes, [row["method"] for row in rows])
    _label(axes, f"{metric} ({_better(metric)}), 95 % interval")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    sign = 1 if METRICS[metric].higher_is_better else -1
    best = max(rows, key=lambda row: (sign * row[metric]["mean"], row["method"] == ours))
    if len({row[metric]["mean"] for row in rows}) == 1 < len(rows):
        return made, f"All rows are alike: {metric} {value_text(best[metric])}."
    sentence = f"Best is {best['method']} with {metric} {value_text(best[metric])}"
    reference = next((row for row in rows if row["method"] == ours), None)
    if reference is None:
        return made, f"{sentence}."
    behind = [r["method"] for r in rows if sign * r[metric]["mean"] < sign * reference[metric]["mean"]]
    own_text = "" if best is reference else f"; {ours} has {value_text(reference[metric])}"
    return made, f"{sentence}{own_text}. {ours} is ahead of {len(behind)} of the {len(rows) - 1} other rows."


def pairs(gains: Sequence[float], pair: Mapping[str, Any], metric: str, ours: str) -> Drawn:
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
    _label(axes, "test users, sorted", f"{metric}\n{plain(sides[0])} − {plain(sides[1])}")
    axes.set_xlim(0.2, len(gain) + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="best", frameon=False, fontsize=8)
    return made, pair_sentence(pair, metric, ours)


def pair_sentence(pair: Mapping[str, Any], metric: str, ours: str) -> str:
    """An entry of summary.json's `paired` (baseline minus `ours`) told from the side of `ours`."""
    found, users = pair[metric], pair["better"] + pair["equal"] + pair["worse"]
    flipped = {"mean": 0 - found["mean"], "low": 0 - found["high"], "high": 0 - found["low"]}  # 0 - 0 is no -0
    verdict = "holds 0: no difference is shown" if holds_zero(flipped) else "leaves out 0"
    return (
        f"Against {pair['method']}, {ours} is better for {people(pair['worse'], users)}, as good for {pair['equal']}, "
        f"worse for {pair['better']}; over all of them its {metric} ({_better(metric)}) differs by "
        f"{value_text(flipped, '+')}, an interval that {verdict}."
    )


# --- the search ------------------------------------------------------------------------------------


def best_so_far(losses: Sequence[float], eligible: Sequence[bool]) -> np.ndarray:
    """[e] least loss of the eligible candidates until each evaluation, minus that of the first, the base."""
    usable = np.where(eligible, losses, np.inf)
    return np.minimum.accumulate(usable) - losses[0]


def _winners(searches: Sequence[Sequence[Mapping[str, Any]]], search_only: bool) -> dict[str, int]:
    told = {"search": "a candidate of the search", "start": "its starting point", "sharer": "a single sharer",
            "base": "the base"}  # fmt: skip
    counts = dict.fromkeys(told, 0)
    for evaluations in searches:
        usable = [one for one in evaluations if not (search_only and one["origin"] == "sharer")]
        counts[min(usable, key=lambda one: one["loss"])["origin"]] += 1
    return {told[origin]: n for origin, n in counts.items() if n}


def traces(searches: Sequence[Sequence[Mapping[str, Any]]], search_only: bool) -> Drawn:
    """Best loss by evaluation, one line a user, the median thick.

    Args:
        searches: of each user the lines of evaluations.jsonl, the base first.
        search_only: single sharers cannot win.
    """
    runs = [
        best_so_far([one["loss"] for one in found], [not (search_only and one["origin"] == "sharer") for one in found])
        for found in searches
    ]
    length = max(map(len, runs))
    padded = np.stack([np.append(run, np.full(length + 1 - len(run), run[-1])) for run in runs])
    places = np.append(np.arange(1, length + 1), length + 0.5)  # the last step is seen as a line
    made, axes = figure(WIDTH, 3.1)
    axes.plot(places, padded.T, color=COLOURS[7], linewidth=0.7, alpha=0.8, drawstyle="steps-post")
    axes.plot([], [], color=COLOURS[7], linewidth=0.7, label="a user")
    median = np.median(padded, axis=0)
    axes.plot(places, median, color=COLOURS[4], linewidth=2.2, drawstyle="steps-post", label="median of users")
    longest = max(searches, key=len)
    begins = next((i for i, one in enumerate(longest) if one["origin"] in ("start", "search")), None)
    if begins is not None:
        axes.axvline(begins + 0.5, color=COLOURS[0], linestyle=":", linewidth=1.2, label="the search begins")
    _label(axes, "candidates evaluated", "best loss so far − loss of the base\n(lower is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    made.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=3)
    quarter = max(1, length // 4)
    late = int(np.sum(padded[:, -1] < padded[:, length - 1 - quarter] - 1e-12)) if length > quarter else 0
    won = listed([f"{what} for {n}" for what, n in _winners(searches, search_only).items()])
    return made, (
        f"In the median the best loss ends {abs(median[-1]):.3f} below the base's. Of {people(len(runs))}, what is "
        f"deployed is {won}. The last {quarter} of {length} evaluations still improved {people(late, len(runs))}."
    )


def sharer_weights(results: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[u, n] weights by rank of similarity, NaN beyond a user's sharers; of several weights of a sharer, their mean."""
    width = max(len(result["sharers"]) for result in results)
    table = np.full((len(results), width), np.nan)
    for row, result in zip(table, results, strict=True):
        for place, weight in enumerate(result.get("weights", [])):
            row[place] = np.mean(weight)
    return table


def weights(results: Sequence[Mapping[str, Any]]) -> Drawn:
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
        _cells(axes, table, results, edge)
    _label(axes, "sharers of the user, most similar first", "test user" + ("" if numbered else f"s ({users})"))
    used = table[np.isfinite(table)]
    merged = table[np.nansum(np.abs(table), axis=1) > 0]  # the others deploy the base
    if not len(merged):
        return made, f"Nobody's adapter is merged: all of {people(users)} deploy the base."
    first = np.argmax(np.nan_to_num(np.abs(merged)), axis=1) == 0
    return made, (
        f"Of {people(len(merged))} who merge, {int(first.sum())} give the most similar sharer the weight largest in "
        f"size; {np.mean(used < 0):.0%} of all weights are negative; a user's weights add up to "
        f"{np.median(np.nansum(merged, axis=1)):.2f} in the median."
    )


def _cells(axes: Axes, table: np.ndarray, results: Sequence[Mapping[str, Any]], edge: float) -> None:
    """The weight in each cell, light on dark, and the sharer's id where there is room."""
    room = 48 // table.shape[1] - 7  # characters beside the weight
    for row, result in enumerate(results):
        for column, sharer in enumerate(result["sharers"]):
            if np.isfinite(value := table[row, column]):
                text = (f"{plain(sharer, room)}: " if room > 3 else "") + f"{value:+.2f}"
                colour = "white" if value < -0.05 * edge else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour, in_layout=False)


# --- leakage ---------------------------------------------------------------------------------------


def leakage(attacked: Sequence[tuple[str, Interval, Interval]], attack: str) -> Drawn:
    """AUROC of one attack on (name, AUROC, its blind baseline) each."""
    made, axes = figure(WIDTH, 1.3 + 0.3 * len(attacked))
    for place, (_, found, blind) in enumerate(attacked):
        label = {} if place else {"label": "blind: on the base, before any merge"}
        _interval(axes, blind, place + 0.14, marker="o", color=COLOURS[7], markersize=5, mfc="white", **label)
        label = {} if place else {"label": "on what is deployed"}
        _interval(axes, found, place - 0.1, marker="D", color=COLOURS[5], markersize=5, **label)
    axes.axvline(0.5, color=COLOURS[0], linestyle=":", linewidth=1)
    _names(axes, [name for name, _, _ in attacked])
    _label(axes, f"AUROC of attack {plain(attack)} (0.5: a guess), 95 % interval")
    made.legend(loc="outside upper left", frameon=False, fontsize=8)
    name, worst, blind = max(attacked, key=lambda one: one[1]["mean"])
    least = min(attacked, key=lambda one: one[1]["mean"])
    tail = "" if len(attacked) == 1 else f"; least leaks {least[0]}, {value_text(least[1])}"
    return made, (
        f"Most leaks {name}: AUROC {value_text(worst)} where the base gives {blind['mean']:.3f}{tail}. "
        "An AUROC at its blind baseline tells nothing about who shared."
    )


def trade(rows: Sequence[Mapping[str, Any]], metric: str, ours: str) -> Drawn:
    """Utility against leakage: rows of summary.json that have an AUROC."""
    made, axes = figure(WIDTH, 3.4)
    for place, row in enumerate(rows):
        size, colour, marker = 8 if row["method"] == ours else 6, COLOURS[place % 8], MARKERS[place % 8]
        _cross(axes, row["auroc"], row[metric], colour, marker, plain(row["method"]), size)
    _label(axes, "AUROC of the published attack (left: less leakage)", f"{metric} ({_better(metric)})")
    made.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    sign = 1 if METRICS[metric].higher_is_better else -1
    best = max(rows, key=lambda row: sign * row[metric]["mean"])
    least = min(rows, key=lambda row: row["auroc"]["mean"])
    own = next((row for row in rows if row["method"] == ours), best)

    def told(row: Mapping[str, Any]) -> str:
        return f"{row['method']} ({metric} {row[metric]['mean']:.3f}, AUROC {row['auroc']['mean']:.3f})"

    if len({(row[metric]["mean"], row["auroc"]["mean"]) for row in rows}) == 1 < len(rows):
        return made, f"All are alike: {told(own)}."
    ends = f"Best utility: {told(best)}; least leakage: {told(least)}"
    return made, ends + ("." if own in (best, least) else f"; {told(own)} lies between.")


def roc(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    caught: Mapping[str, Mapping[str, Any]],
    attacked: str,
) -> Drawn:
    """ROC curves on log scales.

    Args:
        curves: {attack: (false positive rates, true positive rates)}.
        caught: {attack: {false positive rate: true positive rate with its interval, None with too few non-members}}.
    """
    made = plots.roc({"": curves})
    made.set_size_inches(WIDTH, 4.3)
    rate = "0.01" if all(of["0.01"] for of in caught.values()) else "0.1"
    found = {attack: of[rate]["mean"] for attack, of in caught.items() if of[rate]}
    if not found:
        return made, f"{attacked}: there are too few non-members to tell a rate."
    best = max(found, key=lambda name: found[name])
    told = f"the published attack catches {found[PUBLISHED_ATTACK]:.1%} of the members"
    if best != PUBLISHED_ATTACK:
        told += f", attack {best} most, {found[best]:.1%}"
    at = f"where {float(rate):.0%} of non-members are called members"
    return made, f"{attacked}: {at}, {told} (a guess: {float(rate):.0%}, the dotted line)."


TRADED = {
    "auroc": "AUROC, sharers from other anchors",
    "controlled_auroc": "AUROC, trained from held-out records",
    "similarity": "similarity to the sharers",
}


def frontier(points: Sequence[Mapping[str, Any]], metric: str) -> Drawn:
    """Utility against leakage and against similarity: points of frontier.json, those of the penalties joined."""
    shown = {key: title for key, title in TRADED.items() if any(one.get(key) for one in points)}
    made, axes = side_by_side(max(1, len(shown)))
    beside = [one["label"] for one in points if one["penalty"] is None]
    for panel, (key, title) in zip(axes, shown.items(), strict=False):
        for one in (one for one in points if one.get(key) and one["penalty"] is None):
            place = 1 + beside.index(one["label"])
            _cross(panel, one[key], one[metric], COLOURS[place % 8], MARKERS[place % 8], plain(one["label"], 28))
        _penalties(panel, [one for one in points if one.get(key) and one["penalty"] is not None], key, metric)
        _label(panel, title)
    axes[0].set_ylabel(f"{metric} ({_better(metric)})")
    pairs = [pair for panel in axes for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    known = {label: handle for handle, label in pairs}
    columns = 1 + max(1, len(shown))  # the longest names fit beside each other
    made.legend(known.values(), known.keys(), loc="outside lower center", frameon=False, fontsize=8, ncols=columns)
    return made, frontier_sentence(points, metric)


def _penalties(axes: Axes, points: Sequence[Mapping[str, Any]], key: str, metric: str) -> None:
    """The points of the penalties, joined, each with its number beside it."""
    places: dict[tuple[float, float], list[str]] = {}
    for one in points:
        _cross(axes, one[key], one[metric], COLOURS[0], MARKERS[0], "merged, by penalty")
        places.setdefault((one[key]["mean"], one[metric]["mean"]), []).append(f"{one['penalty']:g}")
    for place, penalties in places.items():
        axes.annotate(", ".join(penalties), place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    xs, ys = ([one[name]["mean"] for one in points] for name in (key, metric))
    axes.plot(xs, ys, color=COLOURS[7], linewidth=0.8, zorder=0)


def frontier_sentence(points: Sequence[Mapping[str, Any]], metric: str) -> str:
    """From the lowest to the highest penalty: what it costs and what it buys."""
    own = [one for one in points if one["penalty"] is not None]
    keys = [metric, *(key for key in TRADED if own[0].get(key) and own[-1].get(key))]
    titles = {metric: metric} | TRADED
    ends = f"From penalty {own[0]['penalty']:g} to {own[-1]['penalty']:g}"
    if all(one.get(key) == own[0][key] for one in own for key in keys):
        alike = [f"{titles[key]} {own[0][key]['mean']:.3f}" for key in keys]
        return f"{ends} nothing changes: {listed(alike)}."
    told = [f"{titles[key]} {own[0][key]['mean']:.3f} to {own[-1][key]['mean']:.3f}" for key in keys]
    return f"{ends}: {listed(told)}."


# --- across tasks ----------------------------------------------------------------------------------


def tasks_paired(pairs_by_task: Mapping[str, Mapping[str, Any]], baseline: str, ours: str) -> Drawn:
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
    _names(axes, list(totals))
    axes.set_xlim(0, 1)
    _label(axes, f"share of test users, {ours} against {baseline}")
    made.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=3)
    ahead = [task for task, pair in pairs_by_task.items() if pair["worse"] > pair["better"]]
    told = f"in {len(ahead)} of {len(totals)} tasks" + (f" ({listed(ahead)})" if ahead else "")
    return made, f"More users are better off with {ours} than with {baseline} {told}."
