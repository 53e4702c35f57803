"""Single values of official LaMP files: texts, ids and dates as they may be written, as texts that can be compared."""

from __future__ import annotations

import re
from typing import Any

_DATE = re.compile(r"\d{1,13}(?:[-/.T: ]\d{1,2})*")


def text_of(value: Any) -> str:
    """A text or number as a text that any file can hold; everything else is the empty text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def id_of(value: Any) -> str:
    """An id, integer or text, as a text; empty where there is none."""
    return "" if isinstance(value, bool | float) else text_of(value).strip()


def id_order(name: str) -> tuple[int, int, str]:
    """A key that sorts ids as people count: 2 before 10, numbers before words."""
    number = int(name) if name.isascii() and name.isdigit() and len(name) < 19 else -1
    return (number < 0, number, name)


def date_key(value: Any) -> str:
    """A date (`2012-05-03`, a year, a time stamp) as a text that sorts by time; empty where there is none."""
    match = _DATE.match(text_of(value).strip())
    return "-".join(f"{int(digits):013d}" for digits in re.findall(r"\d+", match[0])) if match else ""


def strictly_before(date: str, other: str) -> bool:
    """Whether a date key is surely earlier than another: a year alone is not before a day of the same year."""
    parts, other_parts = date.split("-"), other.split("-")
    shared = min(len(parts), len(other_parts))
    return bool(date and other) and parts[:shared] < other_parts[:shared]
