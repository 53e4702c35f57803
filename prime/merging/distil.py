"""Sharers who distil before they share: a fresh adapter learns what a sharer answers to public prompts, and only that.

A sharer's own adapter never leaves. It answers prompts of public users, whose own answers nobody looks at, and what is
shared is trained on these answers, so that a record reaches it only through what the sharer says about other people's
texts (knowledge distillation as a defence: Shejwalkar and Houmansadr, AAAI 2021; what still comes through: Jagielski
et al., "Students parrot their teachers", NeurIPS 2023). Answers that quote the history are dropped.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from prime.errors import InputError
from prime.seeds import derive_seed
from prime.users.data import User
from prime.users.prompts import Record, history_records
from prime.users.texts import Texts

WORDS = 4  # of a quotation, at least


def public_records(users: Sequence[User], texts: Texts, count: int, seed: int) -> list[Record]:
    """`count` records of public users' items (0: all), drawn by the run's seed: what every sharer is asked."""
    records: list[Record] = []
    for user in users:
        records += history_records(user, texts.task, texts.templates, None, 0, quoting=False)
    if not records:
        raise InputError("no public user has an item to be asked (--public_prompts)")
    if not count or count >= len(records):
        return records
    places = sorted(random.Random(derive_seed("public prompts", seed)).sample(range(len(records)), count))
    return [records[place] for place in places]


@dataclass(frozen=True)
class Answered:
    """What the fresh adapter learns, and how many answers it does not get."""

    records: list[Record]
    quoting: int
    empty: int

    def told(self) -> dict[str, dict[str, int]]:
        """As result and card say it."""
        return {"distilled": {"answers": len(self.records), "quoting": self.quoting, "empty": self.empty}}


def answered(asked: Sequence[Record], answers: Sequence[str], own: Sequence[Record]) -> Answered:
    """Public records with a sharer's answers in place of their own; without those that quote his targets.

    A quotation is a run of `WORDS` words of his targets that no public record has, in its text or its answer.
    """
    public = runs([record.input for record in asked] + [record.target for record in asked])
    private = runs([record.target for record in own]) - public
    kept, quoting, empty = [], 0, 0
    for record, answer in zip(asked, answers, strict=True):
        if not answer.strip():
            empty += 1
        elif runs([answer]) & private:
            quoting += 1
        else:
            space = record.target[: len(record.target) - len(record.target.lstrip())]
            kept.append(replace(record, target=space + answer.strip()))
    return Answered(kept, quoting, empty)


def runs(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """All runs of `WORDS` words, in lower case."""
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = text.lower().split()
        found |= {tuple(words[place : place + WORDS]) for place in range(len(words) - WORDS + 1)}
    return found
