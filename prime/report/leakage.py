"""What the attacks found, as files and a table: mia_results.json, mia_summary.json, mia_roc.json and its figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prime.attack import scoring, statistics
from prime.errors import InputError
from prime.merging.deploy import add_attacks
from prime.report import plots
from prime.report.table import cell_text
from prime.report.tables import aligned
from prime.runs.files import write_json
from prime.runs.forms import MIA_SUMMARY, PAGE_SUMMARY, ROC_CURVES, form_problems, read_form

PUBLISHED_LOSSES = [f"{side}_{what}" for what in ("ids", "num_samples", "loss") for side in ("member", "non_member")]
SET_TITLES = {
    "published": "published: records of sharers and of others",
    "controlled": "controlled: trained and held-out records",
    "user": "user: sharers and others",
}
RATES = {0.1: "10 %", 0.01: "1 %", 0.001: "0.1 %"}


def write_attacks(
    exp_dir: Path, method: str, users: Sequence[Mapping], sharers: Sequence[Mapping], seed: int
) -> dict[str, Any]:
    """mia_results.json in the published shape, keyed "{user_id}-{index}", mia_summary.json and the ROC; the summary.

    `sharers` is empty where their own adapters were left out. Each user's own part also goes into the cards of the
    user's adapters.
    """
    losses = {f"{u['user_id']}-{u['index']}": {key: u[key] for key in PUBLISHED_LOSSES} for u in users}
    write_json(exp_dir / "mia_results.json", losses)
    summary = summarise(method, users, sharers, seed)
    write_json(exp_dir / "mia_summary.json", summary)
    write_roc(exp_dir, method, users, sharers)
    add_attacks(exp_dir, summary["per_user"])
    return summary


def summarise(method: str, users: Sequence[Mapping], sharers: Sequence[Mapping], seed: int) -> dict[str, Any]:
    """The content of mia_summary.json. `attacks` are those of the published set; a set that nobody has is left out."""
    parts = [
        {name: found for name in scoring.SETS if (found := statistics.set_summary(part, name, seed=seed))["users"]}
        for part in (users, sharers)
    ]
    of_users, of_sharers = ({"attacks": sets.get("published", {}).get("attacks", {}), "sets": sets} for sets in parts)
    return {
        "method": method,
        "users": len(users),
        "on_base": sum(user["on_base"] for user in users),
        **of_users,
        "per_user": {user["user_id"]: statistics.user_aurocs(user) for user in users},
        "sharers": {"users": len(sharers), **of_sharers},
    }


def read_attacks(path: Path) -> dict[str, Any]:
    """mia_summary.json, with all that a report shows of it."""
    summary = read_form(path, MIA_SUMMARY)
    problems = form_problems(summary, PAGE_SUMMARY, f"{path}: the file")
    published = scoring.PUBLISHED_ATTACK
    if not problems:
        sets = [*summary.get("sets", {}).values(), *summary["sharers"].get("sets", {}).values()]
        problems = [f"{path}: a set without the attack {published}" for one in sets if published not in one["attacks"]]
    if problems:
        raise InputError.many(problems)
    return summary


# -- the ROC --------------------------------------------------------------------------------------------------------


def write_roc(exp_dir: Path, method: str, users: Sequence[Mapping], sharers: Sequence[Mapping]) -> None:
    """mia_roc.json, and mia_roc.png and .svg: every attack on the deployed adapters, a panel for each set."""
    models = (("deployed", users, "scores"), ("base", users, "blind"), ("sharers", sharers, "scores"))
    curves: list[dict[str, Any]] = [
        {"attack": attack, "set": name, "model": model, "fpr": rounded(fpr), "tpr": rounded(tpr)}
        for model, results, key in models
        for name in scoring.SETS
        for attack, (fpr, tpr) in pooled_rocs(results, key, name).items()
    ]
    write_json(exp_dir / "mia_roc.json", {"method": method, "curves": curves})
    deployed = [curve for curve in curves if curve["model"] == "deployed"]
    panels = {
        SET_TITLES[name]: {c["attack"]: (c["fpr"], c["tpr"]) for c in deployed if c["set"] == name}
        for name in scoring.SETS
    }
    plots.save(plots.roc({title: lines for title, lines in panels.items() if lines}), exp_dir / "mia_roc")


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The curves of mia_roc.json."""
    curves = read_form(path, ROC_CURVES)["curves"]
    uneven = [i for i, curve in enumerate(curves) if len(curve["fpr"]) != len(curve["tpr"])]
    if uneven:
        raise InputError.many([f"{path}: curves[{i}]: not as many true positive rates as false ones" for i in uneven])
    return curves


def pooled_rocs(results: Sequence[Mapping], key: str, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By attack the ROC of all users' records together; empty where nobody has the set."""
    users = statistics.in_set(results, name)
    found = {}
    for attack in statistics.attacks_on(users) if users else ():
        pairs = [statistics.set_scores(user, key, attack, name) for user in users]
        members, others = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        found[attack] = statistics.roc(members, others)
    return found


def rounded(rates: np.ndarray) -> list[float]:
    return [round(float(rate), 6) for rate in rates]


# -- the table ------------------------------------------------------------------------------------------------------


def attack_table(summary: Mapping[str, Any]) -> str:
    """A table per set and attacked adapters, a line per attack; every figure beside its blind baseline."""
    parts = {summary["method"]: summary["sets"], "sharers, unmerged": summary["sharers"]["sets"]}
    tables = [
        f"{SET_TITLES[name]} | attacked: {attacked} ({told(sets[name])})\n{aligned(set_rows(sets[name]))}"
        for name in scoring.SETS
        for attacked, sets in parts.items()
        if name in sets
    ]
    return "\n\n".join([*tables, notes(summary)])


def told(found: Mapping[str, Any]) -> str:
    return f"{found['members']} members, {found['non_members']} non-members of {found['users']} users"


def set_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and body of one set: AUROC and true positive rates of each attack, with its blind baseline behind them."""
    rows = [["attack", "AUROC", "blind", *(f"TPR at {rate} / blind" for rate in RATES.values())]]
    for attack, own in found["attacks"].items():
        rates = [rate_text(own["tpr_at_fpr"][str(fpr)], own["blind_tpr_at_fpr"][str(fpr)]) for fpr in RATES]
        rows.append([attack, cell_text(own["auroc"]), cell_text(own["blind_auroc"]), *rates])
    return rows


def figures(found: Mapping[str, Any]) -> list[str]:
    """AUROC and true positive rates of an attack, each with its blind baseline and both intervals behind it."""
    pairs = [(found["auroc"], found["blind_auroc"])]
    pairs += [(found["tpr_at_fpr"][str(fpr)], found["blind_tpr_at_fpr"][str(fpr)]) for fpr in RATES]
    return [cell for own, blind in pairs for cell in ("n/a" if one is None else cell_text(one) for one in (own, blind))]


def rate_text(own: Mapping[str, float] | None, blind: Mapping[str, float] | None) -> str:
    """A rate with its interval, and the blind one without."""
    return "n/a" if own is None or blind is None else f"{cell_text(own)} / {blind['mean']:.3f}"


def notes(summary: Mapping[str, Any]) -> str:
    """What the reader has to know beside the tables."""
    lines = [
        f"{summary['users']} users ({summary['on_base']} deployed the base), {summary['sharers']['users']} sharers. "
        "blind: the same attack on the task-adapted base, before any merge.",
        "Brackets: 95 % intervals from resampling users. TPR at x %: members caught where x % of non-members are "
        "called members;",
        "n/a: too few non-members to show that rate.",
    ]
    if "controlled" not in summary["sets"]:
        lines.append("controlled: none, nothing was held out (--holdout of the stage that trained the adapters).")
    return "\n".join(lines)
