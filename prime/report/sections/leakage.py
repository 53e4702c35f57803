"""The section "Leakage": utility against leakage, then for each set of members and non-members figures and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime.attack.scoring import PUBLISHED_ATTACK
from prime.attack.sets import SETS
from prime.report.figures.leakage import draw_leakage, draw_roc
from prime.report.figures.trade import TRADED_TITLES, draw_frontier, draw_trade
from prime.report.frontier import read_frontier
from prime.report.leakage import FPR_TEXTS, SET_TITLES, read_attacks, read_curves
from prime.report.methods import REFERENCE, place
from prime.report.sections.content import Content
from prime.report.summary import leading
from prime.report.tables import excess, interval_text
from prime.report.web import Shown, show

Attacks = Mapping[str, Mapping[str, Any]]  # attack -> its summary (`prime.attack.statistics.attack_summary`)

# --- what was attacked -----------------------------------------------------------------------------


def read_attacked(sources: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """mia_summary.json of every attacked method, in the order of the table."""
    summaries = {}
    for method in sorted(sources, key=place):
        path = sources[method] / "mia_summary.json"
        if path.is_file() and (summary := read_attacks(path))["method"] == method:
            summaries[method] = summary
    return summaries


def attacked_sets(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Attacks]]:
    """Attacks by set and by what was attacked: each method, then the sharers' own adapters before any merge."""
    parts = list(summaries.items())
    of_sharers = [summary["sharers"] for summary in summaries.values() if summary["sharers"]["attacks"]]
    parts += [("sharers, unmerged", part) for part in of_sharers[:1]]
    sets: dict[str, dict[str, Attacks]] = {}
    for attacked, part in parts:
        for name, set_summary in part.get("sets", {}).items():
            sets.setdefault(name, {})[attacked] = set_summary["attacks"]
    return {name: sets[name] for name in SETS if name in sets}


# --- tables ----------------------------------------------------------------------------------------


def leakage_parts(content: Content, summaries: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Of each set of members and non-members: its figures, its table in short and in full."""
    parts = []
    for name, attacked in attacked_sets(summaries).items():
        figures = [set_figure(name, attacked, folder), *roc_figures(content, name, attacked, folder)]
        short, full = leakage_table(strongest(attacked)), leakage_table(attacked)
        parts.append({"name": name, "title": SET_TITLES[name], "figures": figures, "short": short, "table": full})
    return parts


def leakage_table(attacked: Mapping[str, Attacks]) -> list[list[str]]:
    """A row for each attack on each method of a set: AUROC and true positive rates, each beside its blind baseline."""
    header = ["attacked", "attack", "AUROC", "blind baseline"]
    for rate in FPR_TEXTS.values():
        header += [f"TPR at {rate} FPR", "blind"]
    rows = [header]
    for who, attacks in attacked.items():
        rows += [[who, attack, *estimate_cells(summary)] for attack, summary in attacks.items()]
    return rows


def estimate_cells(summary: Mapping[str, Any]) -> list[str]:
    """AUROC and true positive rates of one attack, each followed by its blind baseline, all with intervals."""
    estimates = [summary["auroc"], summary["blind_auroc"]]
    for fpr in FPR_TEXTS:
        estimates += [summary["tpr_at_fpr"][fpr], summary["blind_tpr_at_fpr"][fpr]]
    return ["n/a" if estimate is None else interval_text(estimate) for estimate in estimates]


def strongest(attacked: Mapping[str, Attacks]) -> dict[str, Attacks]:
    """Of each method the published attack, and the one whose AUROC lies farthest above its blind baseline."""
    short: dict[str, Attacks] = {}
    for who, attacks in attacked.items():
        above = {attack: excess(summary["auroc"], summary["blind_auroc"]) for attack, summary in attacks.items()}
        best = max(above, key=above.__getitem__)
        short[who] = {attack: attacks[attack] for attack in (PUBLISHED_ATTACK, best)}
    return short


# --- figures ---------------------------------------------------------------------------------------


def set_figure(name: str, attacked: Mapping[str, Attacks], folder: Path) -> Shown:
    published = [(who, attacks[PUBLISHED_ATTACK]) for who, attacks in attacked.items()]
    rows = [(who, attack["auroc"], attack["blind_auroc"]) for who, attack in published]
    drawn = draw_leakage(rows, PUBLISHED_ATTACK)
    return show(folder, f"leakage-{name}", f"The published attack, {name} set", drawn)


def roc_figures(content: Content, name: str, attacked: Mapping[str, Attacks], folder: Path) -> list[Shown]:
    """ROC curves of all attacks on PriME in one set, or on the first attacked method where PriME is not."""
    method = REFERENCE if REFERENCE in attacked else next(iter(attacked))
    path = content.sources.get(method, content.root) / "mia_roc.json"
    if not path.is_file():
        return []
    curves = {}
    for curve in read_curves(path):
        if (curve["set"], curve["model"]) == (name, "deployed"):
            curves[curve["attack"]] = (curve["fpr"], curve["tpr"])
    rates = {attack: summary["tpr_at_fpr"] for attack, summary in attacked[method].items()}
    return [show(folder, f"roc-{name}", f"ROC of all attacks on {method}, {name} set", draw_roc(curves, rates, method))]


def trade_figures(content: Content, folder: Path) -> list[Shown]:
    """Utility against leakage of the attacked methods, where there are several."""
    attacked = [row for row in leading(content.summary) if row["auroc"]]
    if len(attacked) < 2:
        return []
    return [show(folder, "utility-leakage", "Utility against leakage", draw_trade(attacked, content.metric, REFERENCE))]


def frontier_figures(content: Content, folder: Path) -> list[Shown]:
    """Utility against each kind of leakage over the penalties, of every stage folder that holds several."""
    shown = []
    for path in sorted(content.root.glob("*/frontier.json")):
        frontier = read_frontier(path, content.task)
        points = [point for point in frontier["points"] if point.get(frontier["metric"])]
        for key, title in TRADED_TITLES.items():
            measured = [point for point in points if point["penalty"] is not None and point.get(key)]
            if len(measured) < 2:
                continue
            of_key = [{**point, **dict.fromkeys(TRADED_TITLES), key: point.get(key)} for point in points]
            stem = f"frontier-{path.parent.name}-{key.replace('_', '-')}"
            drawn = draw_frontier(of_key, frontier["metric"])
            shown.append(show(folder, stem, f"Penalties of {path.parent.name}: {title}", drawn))
    return shown
