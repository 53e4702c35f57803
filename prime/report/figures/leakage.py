"""Figures of leakage: AUROC beside its blind baseline, and ROC curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prime.attack.scoring import PUBLISHED_ATTACK
from prime.report import plots
from prime.report.figures.parts import WIDTH, Drawn, label_axes, mark_interval, name_rows, plain
from prime.report.plots import COLOURS, figure
from prime.report.tables import Estimate, excess, interval_text


def draw_leakage(attacked: Sequence[tuple[str, Estimate, Estimate]], attack: str) -> Drawn:
    """AUROC of one attack on (name, AUROC, its blind baseline) each."""
    made, axes = figure(WIDTH, 1.3 + 0.3 * len(attacked))
    for place, (_, auroc, blind) in enumerate(attacked):
        label = {} if place else {"label": "blind: on the base, before any merge"}
        mark_interval(axes, blind, place + 0.14, marker="o", color=COLOURS[7], markersize=5, mfc="white", **label)
        label = {} if place else {"label": "on what is deployed"}
        mark_interval(axes, auroc, place - 0.1, marker="D", color=COLOURS[5], markersize=5, **label)
    axes.axvline(0.5, color=COLOURS[0], linestyle=":", linewidth=1)
    name_rows(axes, [name for name, _, _ in attacked])
    label_axes(axes, f"AUROC of attack {plain(attack)} (0.5: a guess), 95 % interval")
    made.legend(loc="outside upper left", frameon=False, fontsize=8)
    return made, leakage_sentence(attacked)


def leakage_sentence(attacked: Sequence[tuple[str, Estimate, Estimate]]) -> str:
    """Who leaks most, and least: by how far an AUROC lies above its blind baseline."""
    ranked = sorted(attacked, key=lambda entry: excess(entry[1], entry[2]))
    (name, worst, blind), least = ranked[-1], ranked[0]
    beside = f"AUROC {interval_text(worst)} where the base gives {blind['mean']:.3f} ({excess(worst, blind):+.3f})"
    tail = "" if len(attacked) == 1 else f"; least leaks {least[0]}, {excess(*least[1:]):+.3f} above its own baseline"
    return (
        f"Most leaks {name}: {beside}{tail}. "
        "An AUROC at its blind baseline tells nothing about who shared."
    )


def draw_roc(curves: plots.Curves, tpr_at_fpr: Mapping[str, Mapping[str, Any]], attacked: str) -> Drawn:
    """ROC curves on log scales.

    Args:
        curves: by attack.
        tpr_at_fpr: {attack: {false positive rate: true positive rate with its interval, None with too few
            non-members}}.
        attacked: whose adapters.
    """
    made = plots.roc_panels({"": curves})
    made.set_size_inches(WIDTH, 4.3)
    return made, roc_sentence(tpr_at_fpr, attacked)


def roc_sentence(tpr_at_fpr: Mapping[str, Mapping[str, Any]], attacked: str) -> str:
    """How many members the published attack catches at a low rate of false alarms, and the best one."""
    fpr = "0.01" if all(rates["0.01"] for rates in tpr_at_fpr.values()) else "0.1"
    caught = {attack: rates[fpr]["mean"] for attack, rates in tpr_at_fpr.items() if rates[fpr]}
    if not caught:
        return f"{attacked}: there are too few non-members to tell a rate."
    best = max(caught, key=lambda attack: caught[attack])
    published = f"the published attack catches {caught[PUBLISHED_ATTACK]:.1%} of the members"
    most = "" if best == PUBLISHED_ATTACK else f", attack {best} most, {caught[best]:.1%}"
    where = f"where {float(fpr):.0%} of non-members are called members"
    return f"{attacked}: {where}, {published}{most} (a guess: {float(fpr):.0%}, the dotted line)."
