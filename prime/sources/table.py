"""A table of one's own to the files of data/README.md, and to a task made for it."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.sources.placing import Tally
from prime.sources.rows import read_rows
from prime.sources.timed import Timed
from prime.sources.values import text_of
from prime.users.answers import number

LABELS = 50  # different answers that auto takes for labels, at most
OFTEN = 10  # times that each is given then, on average
YEARS = range(1000, 3000)  # numbers that are years, not seconds
MILLISECONDS = 1e11  # from here on a number counts those: in seconds it is the year 5138


# -- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Names of the columns; without `time` a person's rows are in the order of time already."""

    user: str
    input: str
    target: str
    time: str | None = None
    id: str | None = None

    def named(self) -> list[str]:
        return [name for name in (self.user, self.input, self.target, self.time, self.id) if name is not None]


def read_records(path: Path, columns: Columns, time_format: str | None, tally: Tally) -> list[Timed]:
    """The records of a table.

    Raises:
        InputError: as `read_rows`; most times cannot be read.
    """
    records: list[Timed] = []
    unread: list[str] = []
    for place, (where, row) in enumerate(read_rows(path, columns.named(), tally)):
        time: float | None = float(place)
        if columns.time is not None:
            time = time_of(row.get(columns.time), time_format)
        if time is None:
            value = text_of(row.get(columns.time or "")) or "nothing"
            unread.append(f"{value[:40]!r} in {where}")
            tally.add("rows whose time cannot be read", unread[-1])
            continue
        name = text_of(row.get(columns.id)).strip() if columns.id else where
        texts = [text_of(row.get(column)) for column in (columns.user, columns.input, columns.target)]
        records.append(Timed(texts[0], time, texts[1], texts[2], name.replace(" ", "")))
    if len(unread) > len(records):
        raise InputError(
            f"{path}: column '{columns.time}': {len(unread)} of {len(unread) + len(records)} times cannot be read, "
            f"{unread[0]} for one; give --time_format, e.g. %d/%m/%Y, or no --time where rows are in the order of time"
        )
    return records


def time_of(value: Any, time_format: str | None = None) -> float | None:
    """Seconds, of a date (ISO 8601, or by `time_format`), of a year, or of seconds or milliseconds; else None."""
    if isinstance(value, datetime):
        return _seconds(value)
    text = str(value.isoformat() if hasattr(value, "isoformat") else text_of(value)).strip()
    try:
        if time_format is not None:
            return _seconds(datetime.strptime(text, time_format))
        return _amount(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else _seconds(_date(text))
    except (ValueError, OverflowError, TypeError):
        return None


def _amount(text: str) -> float:
    if re.fullmatch(r"(19|20)\d\d[01]\d[0-3]\d", text):
        return _seconds(datetime.fromisoformat(text))
    value = float(text)
    if value in YEARS:
        return _seconds(datetime(int(value), 1, 1))
    return value / 1000 if abs(value) >= MILLISECONDS else value


def _date(text: str) -> datetime:
    """`2024-01-05`, `2024/1/5 10:00`, `2024-01-05T10:00:00Z`, `2024-01-05 10:00:00 +0100`, or as mail has it."""
    if text[:3].isalpha():
        return parsedate_to_datetime(text)
    parts = re.fullmatch(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(.*)", text)
    if parts is None:
        raise ValueError(text)
    clock = re.sub(r" (?=[+-]\d)", "", parts[4]).replace(" UTC", "Z")
    return datetime.fromisoformat(f"{parts[1]}-{int(parts[2]):02}-{int(parts[3]):02}{clock}")


def _seconds(date: datetime) -> float:
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


# -- a task for them ------------------------------------------------------------------------------------------------


def field_name(column: str, otherwise: str) -> str:
    """A column's name as that of a field: `Review Text` is `review_text`."""
    name = re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")[:60]
    return name if name[:1].isalpha() and name != "id" else f"{otherwise}_{name}".rstrip("_")


def make_task(name: str, columns: Columns, answers: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a task's file. `answers`: its `labels` and `ignore_case`, its `scale`, or nothing."""
    source, target = field_name(columns.input, "text"), field_name(columns.target, "answer")
    if source == target:
        target = f"{target}_answer"
    return {"name": name, "input": source, "target": target, **answers}


def given_answers(labels: str | None, scale: str | None) -> dict[str, Any]:
    """`rock,folk` or `0,10` of the command line as a task's file has them; empty where neither is given."""
    if labels and scale:
        raise InputError("--labels and --scale: answers are one or the other")
    if labels:
        return {"labels": [label.strip() for label in labels.split(",") if label.strip()]}
    ends = [number(part) for part in (scale or "").split(",")]
    if scale and (None in ends or len(ends) not in (2, 3)):
        raise InputError(f"--scale {scale}: expected LOWEST,HIGHEST such as 0,10, or with a step 0,10,0.5")
    return {"scale": [int(end) if end.is_integer() else end for end in ends if end is not None]} if scale else {}


def answers_of(kind: str, targets: Iterable[str]) -> dict[str, Any]:
    """What is possible, found in the answers themselves: numbers on a scale, labels, or any text (`kind`: auto).

    Raises:
        InputError: there is nothing of this kind in them.
    """
    given = [target.strip() for target in targets if target.strip()]
    counts = Counter(given)
    numbers = [number(text) for text in counts]
    if kind in ("auto", "numbers") and len(counts) > 1 and None not in numbers:
        return {"scale": _scale([value for value in numbers if value is not None])}
    if kind == "numbers":
        odd = next((text for text, value in zip(counts, numbers, strict=True) if value is None), "one number alone")
        raise InputError(f"--answers numbers: found {odd[:80]!r}; give --scale LOWEST,HIGHEST to leave such rows out")
    short = 1 < len(counts) <= LABELS and len(given) >= OFTEN * len(counts) and max(map(len, counts)) <= 60
    return _labels(counts) if kind == "labels" or (kind == "auto" and short) else {}


def _scale(values: Sequence[float]) -> list[float]:
    """The lowest, the highest and, unless it is 1, the step: a power of ten, or a half of it, that all are on."""
    low, high = min(values), max(values)
    for step in (1, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001):
        if all(math.isclose((value - low) / step, round((value - low) / step), abs_tol=1e-6) for value in values):
            break
    ends: list[float] = [int(end) if end.is_integer() else end for end in (low, high)]
    return ends if step == 1 else [*ends, step]


def _labels(counts: Mapping[str, int]) -> dict[str, Any]:
    """The labels, the most frequent first; those that differ in case alone are one, as it is written most often."""
    ranked = sorted(counts, key=lambda text: (-counts[text], text))
    spelt: dict[str, str] = {}
    for text in ranked:
        spelt.setdefault(text.casefold(), text)
    answers: dict[str, Any] = {"labels": list(spelt.values())}
    return answers | ({"ignore_case": True} if len(spelt) < len(ranked) else {})


def doubtful_labels(labels: Sequence[str], targets: Iterable[str]) -> list[str]:
    """Rare labels that look like a frequent one, misspelt."""
    counts = Counter(target.strip().casefold() for target in targets)
    frequent = [label.casefold() for label in labels if counts[label.casefold()] >= OFTEN]
    found = []
    for label in labels:
        times = counts[label.casefold()]
        others = [name for name in frequent if counts[name] > 10 * times]
        near = difflib.get_close_matches(label.casefold(), others, 1, 0.7)
        if near:
            found.append(f"{label} ({times} times) like {near[0]} ({counts[near[0]]})")
    return found

