"""What sources of people's public texts have in common: numbers for names, the most active, texts of a length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prime.seeds import derive_seed
from prime.sources.placing import Tally
from prime.sources.timed import Timed

WORDS = 60  # of a text at most, unless told otherwise
SOMEBODY = "somebody"  # in place of a name within a text
LONGEST_NAME = 4  # words
BRACKETS = "()[]{}<>,.;:!?\"'`*_"


@dataclass(frozen=True)
class Limits:
    """How much is taken.

    Args:
        people: those with the most records; 0: all.
        items: of a person, the latest; 0: all.
        words: of a text, see `cut`.
    """

    people: int = 0
    items: int = 0
    words: int = WORDS


def taken(records: Iterable[Timed], limits: Limits, tally: Tally) -> list[Timed]:
    """The latest records of the most active people, their names as numbers; ties go by a hash of the name."""
    histories: dict[str, list[Timed]] = defaultdict(list)
    for record in records:
        histories[record.user].append(record)
    order = sorted(histories, key=lambda name: (derive_seed("pseudonym", name), name))
    numbers = {name: f"p{number:04d}" for number, name in enumerate(order)}
    active = sorted(order, key=lambda name: -len(histories[name]))
    kept: list[Timed] = []
    for name in active[: limits.people or None]:
        own = sorted(histories[name], key=lambda record: record.time)[-limits.items :]
        kept += [record._replace(user=numbers[name], id=f"{numbers[name]}-{i}") for i, record in enumerate(own)]
    tally.counts["records beyond the limits"] += sum(map(len, histories.values())) - len(kept)
    return kept


def cut(text: str, words: int) -> str:
    """At most so many words, up to the end of a sentence where one ends in the second half; single spaces."""
    kept = text.split()[:words]
    if len(kept) < words or len(text.split()) == words:
        return " ".join(kept)
    ends = [place for place in range(words // 2, words) if kept[place].endswith((".", "!", "?"))]
    return " ".join(kept[: ends[-1] + 1] if ends else kept)


def without_names(text: str, names: set[str]) -> str:
    """A text with `SOMEBODY` in place of each full name, the longest first.

    Args:
        names: of two to `LONGEST_NAME` words, in lower case.
    """
    words = text.split()
    written: list[str] = []
    place = 0
    while place < len(words):
        length = _name_length(words[place : place + LONGEST_NAME], names)
        if length:
            first, last = words[place], words[place + length - 1]
            before = first[: len(first) - len(first.lstrip(BRACKETS))]
            written.append(before + SOMEBODY + last[len(last.rstrip(BRACKETS)) :])
        else:
            written.append(words[place])
        place += length or 1
    return " ".join(written)


def _name_length(words: Sequence[str], names: set[str]) -> int:
    """Of how many of the words a name consists with which they begin; 0: of none."""
    for length in range(len(words), 1, -1):
        name = " ".join(words[:length]).strip(BRACKETS).removesuffix("'s").lower()
        if name in names:
            return length
    return 0
