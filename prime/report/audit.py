"""What an audit found, as files and a table."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime.attack.audit import SIDES, Audit, audit
from prime.attack.audit_settings import AuditSettings
from prime.attack.scoring import ATTACKS, NEEDS_REFERENCES
from prime.attack.statistics import roc_curve
from prime.report.leakage import FPR_TEXTS
from prime.report.tables import Estimate, aligned, interval_text
from prime.runs.files import write_json, write_text
from prime.settings import recorded

SHOWN = ("adapter", "base")


def audited(settings: AuditSettings) -> str:
    """Audit, write, and tell."""
    folder = Path(settings.output_dir)
    return audit_table(write_audit(folder, settings, audit(settings)), folder)


def write_audit(folder: Path, settings: AuditSettings, found: Audit) -> dict[str, Any]:
    """audit_scores.csv, audit.json, audit_roc.json and its figure; returns the content of audit.json."""
    write_text(folder / "audit_scores.csv", scores_text(found))
    sides = found.units.is_member
    summary = {
        "settings": recorded(settings),
        "members": int(sides.sum()),
        "non_members": int((~sides).sum()),
        "unit": found.units.name,
        "units": {side: found.units.count(mask) for side, mask in zip(SIDES, (sides, ~sides), strict=True)},
        "attacks": found.summaries(settings.seed),
    }
    write_json(folder / "audit.json", summary)
    write_roc(folder, found)
    return summary


def scores_text(found: Audit) -> str:
    """A row per record, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(found.scores)
    writer.writerow(["file", "line", "user", "member", *names, *(f"base_{name}" for name in names)])
    for place, (pair, is_member) in enumerate(zip(found.pairs, found.units.is_member, strict=True)):
        scores = [float(of_model[name][place]) for of_model in (found.scores, found.blind) for name in names]
        writer.writerow([SIDES[not is_member], pair.line, pair.user, int(is_member), *map(repr, scores)])
    return text.getvalue()


def write_roc(folder: Path, found: Audit) -> None:
    sides = found.units.is_member
    curves: list[dict[str, Any]] = []
    panels: dict[str, dict] = {}
    for model, scores in zip(SHOWN, (found.scores, found.blind), strict=True):
        for name, values in scores.items():
            rates = [rate.round(6).tolist() for rate in roc_curve(values[sides], values[~sides])]
            curves.append({"attack": name, "set": "audit", "model": model, "fpr": rates[0], "tpr": rates[1]})
            panels.setdefault(model, {})[name] = rates
    write_json(folder / "audit_roc.json", {"curves": curves})
    from prime.report import plots  # matplotlib takes half a second to load, and comes last

    plots.save(plots.roc_panels(panels), folder / "audit_roc")


def audit_table(summary: Mapping[str, Any], folder: Path) -> str:
    """A line per attack: AUROC on the adapter and on the base, rates on the adapter; what the reader has to know."""
    rows = [["attack", "AUROC", "base", *(f"TPR at {rate}" for rate in FPR_TEXTS.values())]]
    for name in ATTACKS:
        models = summary["attacks"].get(name, dict.fromkeys(SHOWN))
        areas = [_told(models[model] and models[model]["auroc"]) for model in SHOWN]
        rates = models["adapter"]["tpr_at_fpr"] if models["adapter"] else {}
        rows.append([name, *areas, *(_told(rates.get(fpr)) for fpr in FPR_TEXTS)])
    missing = [name for name in NEEDS_REFERENCES if name not in summary["attacks"]]
    units = " and ".join(f"{summary['units'][side]} of {side}" for side in SIDES)
    lines = [
        "",
        f"{summary['members']} members, {summary['non_members']} non-members. Brackets: 95 % intervals from "
        f"resampling by {summary['unit']} ({units}).",
        "base: the same attack on the base model; above 0.5 it sees that the two sets differ.",
        "n/a: too few non-members to show that rate, or one score for all records"
        + "".join(f", or ({name}) no --references" for name in missing)
        + ".",
        f"Scores of every record: {folder / 'audit_scores.csv'}",
    ]
    return aligned(rows) + "\n".join(lines)


def _told(estimate: Estimate | None) -> str:
    return "n/a" if estimate is None else interval_text(estimate)
