"""What the attacks found, as files and a table: mia_results.json, mia_summary.json, mia_roc.json and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prime.attack.scoring import PUBLISHED_ATTACK
from prime.attack.sets import SETS, attacks_on, in_set, scores_by_user, set_summary, user_aurocs, white_box_summary
from prime.attack.statistics import roc_curve
from prime.errors import InputError
from prime.report.tables import Estimate, aligned, interval_text
from prime.runs.files import write_json
from prime.runs.forms import MIA_SUMMARY, PAGE_SUMMARY, ROC_CURVES, form_problems, read_form

PUBLISHED_LOSSES = (
    "member_ids", "non_member_ids", "member_num_samples", "non_member_num_samples", "member_loss", "non_member_loss",
)  # fmt: skip
SET_TITLES = {
    "published": "published: records of sharers and of others",
    "controlled": "controlled: trained and held-out records",
    "user": "user: sharers and others",
}
WHITE_BOX = "white-box: trained and held-out records, by what the deployed files fall apart into (docs/privacy.md)"
FPR_TEXTS = {"0.1": "10 %", "0.01": "1 %", "0.001": "0.1 %"}  # keys of a summary's rates, as a reader sees them


def write_attacks(
    exp_dir: Path, method: str, users: Sequence[Mapping], sharers: Sequence[Mapping], seed: int
) -> dict[str, Any]:
    """Write mia_results.json in the published shape (keyed "{user_id}-{index}"), mia_summary.json and the ROC.

    `sharers` is empty where their own adapters were left out. Returns the content of mia_summary.json.
    """
    losses = {}
    for user in users:
        losses[f"{user['user_id']}-{user['index']}"] = {key: user[key] for key in PUBLISHED_LOSSES}
    write_json(exp_dir / "mia_results.json", losses)
    summary = summarise_attacks(method, users, sharers, seed)
    write_json(exp_dir / "mia_summary.json", summary)
    write_roc(exp_dir, method, users, sharers)
    return summary


def summarise_attacks(method: str, users: Sequence[Mapping], sharers: Sequence[Mapping], seed: int) -> dict[str, Any]:
    """The content of mia_summary.json. `attacks` are those of the published set; a set that nobody has is left out."""
    return {
        "method": method,
        "users": len(users),
        "on_base": sum(user["on_base"] for user in users),
        **_sets(users, seed),
        "white_box": white_box_summary(users, seed=seed),
        "per_user": {user["user_id"]: user_aurocs(user) for user in users},
        "sharers": {"users": len(sharers), **_sets(sharers, seed)},
    }


def _sets(results: Sequence[Mapping], seed: int) -> dict[str, Any]:
    summaries = {name: set_summary(results, name, seed=seed) for name in SETS}
    sets = {name: summary for name, summary in summaries.items() if summary["users"]}
    return {"attacks": sets.get("published", {}).get("attacks", {}), "sets": sets}


def read_attacks(path: Path) -> dict[str, Any]:
    """mia_summary.json with all that a report shows of it.

    Raises:
        InputError: naming everything that the file lacks.
    """
    summary = read_form(path, MIA_SUMMARY)
    problems = form_problems(summary, PAGE_SUMMARY, f"{path}: the file")
    if not problems:
        sets = [*summary.get("sets", {}).values(), *summary["sharers"].get("sets", {}).values()]
        without = [summary_of_set for summary_of_set in sets if PUBLISHED_ATTACK not in summary_of_set["attacks"]]
        problems = [f"{path}: a set without the attack {PUBLISHED_ATTACK}"] * len(without)
    if problems:
        raise InputError.many(problems)
    return summary


# --- the ROC ---------------------------------------------------------------------------------------


def write_roc(exp_dir: Path, method: str, users: Sequence[Mapping], sharers: Sequence[Mapping]) -> None:
    """mia_roc.json of every attack, and mia_roc.png and .svg of those on the deployed adapters, a panel per set."""
    curves = [
        *_curves("deployed", users, "scores"), *_curves("base", users, "blind"), *_curves("sharers", sharers, "scores")
    ]  # fmt: skip
    write_json(exp_dir / "mia_roc.json", {"method": method, "curves": curves})
    panels: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]] = {}
    for curve in curves:
        if curve["model"] == "deployed":
            panels.setdefault(SET_TITLES[curve["set"]], {})[curve["attack"]] = (curve["fpr"], curve["tpr"])
    from prime.report import plots  # matplotlib takes half a second to load, and comes last

    plots.save(plots.roc_panels(panels), exp_dir / "mia_roc")


def _curves(model: str, results: Sequence[Mapping], key: str) -> list[dict[str, Any]]:
    """For each set and attack the ROC of all users' records together; none where nobody has the set."""
    curves = []
    for name in SETS:
        users = in_set(results, name)
        for attack in attacks_on(users):
            members, non_members = scores_by_user(users, key, attack, name)
            fpr, tpr = roc_curve(np.concatenate(members), np.concatenate(non_members))
            rates = {"fpr": _rounded(fpr), "tpr": _rounded(tpr)}
            curves.append({"attack": attack, "set": name, "model": model, **rates})
    return curves


def _rounded(rates: np.ndarray) -> list[float]:
    return [round(float(rate), 6) for rate in rates]


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The curves of mia_roc.json. Raises InputError where a curve has not as many true as false positive rates."""
    curves = read_form(path, ROC_CURVES)["curves"]
    uneven = [i for i, curve in enumerate(curves) if len(curve["fpr"]) != len(curve["tpr"])]
    if uneven:
        raise InputError.many([f"{path}: curves[{i}]: not as many true positive rates as false ones" for i in uneven])
    return curves


# --- the table -------------------------------------------------------------------------------------


def attack_table(summary: Mapping[str, Any]) -> str:
    """What the files fall apart into, then a table for each set and attacked adapters, a line per attack, the strongest
    first, every figure beside its blind baseline.
    """
    white_box = summary.get("white_box", {})
    tables = [f"{WHITE_BOX}\n{aligned(white_box_rows(white_box))}"] if white_box else []
    for name, title in SET_TITLES.items():
        for attacked, sets in ((summary["method"], summary["sets"]), ("sharers, unmerged", summary["sharers"]["sets"])):
            if name in sets:
                counts = "{members} members, {non_members} non-members of {users} users".format(**sets[name])
                tables.append(f"{title} | attacked: {attacked} ({counts})\n{aligned(set_rows(sets[name]))}")
    return "\n\n".join([*tables, notes(summary)])


def white_box_rows(white_box: Mapping[str, Any]) -> list[list[str]]:
    """Header and a line for each kind of pieces, the most telling first: the strongest attack, and that on the file."""
    rows = [["pieces", "of", "cosine, whole", "attack", "AUROC", "same attack, whole", "difference"]]
    for kind, found in sorted(white_box.items(), key=_telling):
        row = [kind, f"{found['files']} files", f"{found['cosine']:.3f}, {found['cosine_of_whole']:.3f}"]
        for attack, summary in list(found["attacks"].items())[:1]:
            names = ("auroc", "blind_auroc", "auroc_above_blind")
            row += [attack, *(interval_text(summary[name]) for name in names)]
        rows.append(row + ["n/a"] * (len(rows[0]) - len(row)))
    return rows


def _telling(item: tuple[str, Mapping[str, Any]]) -> tuple[float, float]:
    found = item[1]
    aurocs = [summary["auroc"]["mean"] for summary in found["attacks"].values()]
    return -max(aurocs, default=0.0), -found["cosine"]


def set_rows(set_summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and body of one set: AUROC and true positive rates of each attack, each followed by its blind baseline."""
    two_way = all("auroc_users_and_sharers" in summary for summary in set_summary["attacks"].values())
    drawn = ["and sharers drawn"] if two_way else []
    rows = [["attack", "AUROC", *drawn, "blind", *(f"TPR at {rate} / blind" for rate in FPR_TEXTS.values())]]
    for attack, summary in set_summary["attacks"].items():
        rates = [_rate_text(summary["tpr_at_fpr"][fpr], summary["blind_tpr_at_fpr"][fpr]) for fpr in FPR_TEXTS]
        both = [interval_text(summary["auroc_users_and_sharers"])] if two_way else []
        rows.append([attack, interval_text(summary["auroc"]), *both, interval_text(summary["blind_auroc"]), *rates])
    return rows


def _rate_text(attacked: Estimate | None, blind: Estimate | None) -> str:
    """A rate with its interval, and the blind one without."""
    return "n/a" if attacked is None or blind is None else f"{interval_text(attacked)} / {blind['mean']:.3f}"


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
