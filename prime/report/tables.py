"""Tables of text: aligned columns for the terminal, Markdown for files, and an interval in a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Estimate = Mapping[str, float]  # a `prime.users.metrics.Interval` as JSON holds it: mean, low, high


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width, a rule under the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body = (_padded(row, widths) for row in rows)
    rule = "-" * max(map(len, [header, *body]))
    return "\n".join([header, rule, *body])


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def excess(auroc: Estimate, blind: Estimate | None) -> float:
    """How far an AUROC lies above its blind baseline: what a method gives away. 0 for what is the baseline itself."""
    return 0.0 if blind is None else auroc["mean"] - blind["mean"]


def interval_text(estimate: Estimate | None, sign: str = "") -> str:
    """`0.667 [0.500, 0.792]`, or `-` where nothing was measured; sign "+" for differences."""
    if estimate is None:
        return "-"
    return f"{estimate['mean']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"
