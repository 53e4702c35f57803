"""Which questions of official LaMP files are of one person: by `user_id` where there is one, else by their profiles.

Without ids, two questions are of one person when their profiles

- hold mostly the same items: |both| / |either| of at least `overlap` (Jaccard), and
- share more than chance explains: were the K profiles drawn independently, fewer than one pair among all of them would
  share such items. An item shown by n profiles counts log2(K / n) bits; a pair needs log2(K (K - 1) / 2).

Whole profiles are compared, because single items prove nothing: co-authors share papers, many people gave a well-known
film the same tag, and a short review is written twice. The same profile word for word has to pass the second test, too:
two people may each show nothing but the same well-known film.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import numpy as np

from prime.sources.spool import Spool
from prime.sources.values import id_order

OVERLAP = 0.5


class Sets:
    """Disjoint sets of numbers (union-find); a set may have an owner, and sets of two owners never become one."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.owner: dict[int, str] = {}  # of a set, by its root

    def root(self, number: int) -> int:
        top = number
        while (above := self.parent.get(top, top)) != top:
            top = above
        while number != top:
            self.parent[number], number = top, self.parent.get(number, number)
        return top

    def join(self, number: int, other: int) -> bool:
        """Make one set of two; False where they are one already, or of two owners."""
        root, other_root = self.root(number), self.root(other)
        owners = {self.owner[top] for top in (root, other_root) if top in self.owner}
        if root == other_root or len(owners) > 1:
            return False
        self.parent[other_root] = root
        if owners:
            self.owner[root] = owners.pop()
        return True


@dataclass
class Person:
    """One user: id in the files written, and numbers of the questions, in the order of their names."""

    user_id: str
    questions: list[int] = field(default_factory=list)


def question_names(spool: Spool) -> dict[int, str]:
    """Number -> id of each question, in the order of ids; one that train and dev both have gets its part in front."""
    rows = list(spool.rows("SELECT number, part, id FROM question"))
    times = Counter(question_id for _, _, question_id in rows)
    names = {}
    for number, part, question_id in sorted(rows, key=lambda row: (id_order(row[2]), row[1])):
        names[number] = f"{part}-{question_id}" if times[question_id] > 1 else question_id
    return names


def gather(spool: Spool, names: dict[int, str], overlap: float = OVERLAP) -> tuple[list[Person], Counter[str]]:
    """Everybody, and how many questions were gathered by what.

    Persons and their questions come in the order of `names`, whatever the order of the files. A person without
    `user_id` is called `q` and the id of the first question.
    """
    asked_by, by_profile = _users_and_profiles(spool, names)
    sets, counts = Sets(), Counter[str]()
    first: dict[str, int] = {}  # question of each known user
    for number in names:
        user = asked_by[number]
        if user is not None:
            counts["by user_id"] += 1
            sets.owner.setdefault(number, user)
            sets.join(first.setdefault(user, number), number)
    if None in asked_by.values():
        _join_alike(spool, sets, by_profile, overlap, counts)
    people: dict[int, Person] = {}
    for number, name in names.items():
        root = sets.root(number)
        if root not in people:
            people[root] = Person(sets.owner.get(root) or _new_id(name, first.keys()))
        people[root].questions.append(number)
    return list(people.values()), counts


def _users_and_profiles(spool: Spool, names: dict[int, str]) -> tuple[dict[int, str | None], dict[int, list[int]]]:
    """The `user_id` of each question, and the questions that show each profile, in the order of `names`."""
    asked_by: dict[int, str | None] = {}
    profiles: dict[int, int] = {}
    for number, user, profile in spool.rows("SELECT number, user, profile FROM question"):
        asked_by[number], profiles[number] = user, profile
    by_profile: dict[int, list[int]] = defaultdict(list)
    for number in names:
        by_profile[profiles[number]].append(number)
    return asked_by, by_profile


def _new_id(name: str, taken: Container[str]) -> str:
    user_id = f"q{name}"
    while user_id in taken:
        user_id = f"q{user_id}"
    return user_id


def _join_alike(
    spool: Spool, sets: Sets, by_profile: dict[int, list[int]], overlap: float, counts: Counter[str]
) -> None:
    """Join questions whose profiles are equal or similar; a profile of two known users tells nothing about others."""
    similarity = Similarity(spool, overlap)
    ambiguous = {profile for profile, numbers in by_profile.items() if len(_owners(sets, numbers)) > 1}
    for profile, numbers in by_profile.items():
        if profile in ambiguous:
            continue
        if similarity.distinctive(profile):
            counts["by an equal profile"] += sum(sets.join(numbers[0], number) for number in numbers[1:])
        for other in similarity.matches(profile):
            if other in by_profile and other not in ambiguous:
                counts["by a similar profile"] += sets.join(numbers[0], by_profile[other][0])


def _owners(sets: Sets, numbers: Iterable[int]) -> set[str]:
    """The known users who asked these questions."""
    return {sets.owner[root] for root in map(sets.root, numbers) if root in sets.owner}


class Similarity:
    """Compares profiles by the items they show, in memory: about 50 bytes for each item of a distinct profile."""

    def __init__(self, spool: Spool, overlap: float):
        shown = np.fromiter(spool.rows("SELECT item, profile FROM member"), dtype=[("item", "i8"), ("profile", "i4")])
        ((profiles,),) = spool.rows("SELECT COUNT(*) FROM profile")  # numbered from 1
        self.overlap = overlap
        self.needed_bits = math.log2(max(1, profiles * (profiles - 1) / 2)) - 1e-9
        self.sizes = np.bincount(shown["profile"], minlength=profiles + 1)  # items of each profile
        _, item, self.times = np.unique(shown["item"], return_inverse=True, return_counts=True)  # profiles of each item
        self.bits = np.log2(profiles / self.times)  # of each item
        # The profiles of an item lie side by side, and so do the items of a profile; the ends say where.
        self.profiles = shown["profile"][np.argsort(item, kind="stable")]
        self.profile_ends = np.cumsum(self.times)
        self.items = item[np.argsort(shown["profile"], kind="stable")]
        self.item_ends = np.cumsum(self.sizes)

    def _items(self, profile: int) -> np.ndarray:
        end = self.item_ends[profile]
        return self.items[end - self.sizes[profile] : end]

    def distinctive(self, profile: int) -> bool:
        """Whether nobody else shows this profile by chance."""
        items = self._items(profile)
        return len(items) > 0 and float(self.bits[items].sum()) >= self.needed_bits

    def matches(self, profile: int) -> list[int]:
        """Other profiles of the same person, the most similar first."""
        items = self._items(profile)
        items = items[self.times[items] > 1]  # those that other profiles show, too
        if not len(items):
            return []
        times, ends = self.times[items], self.profile_ends[items]
        showing = np.concatenate([self.profiles[end - n : end] for end, n in zip(ends, times, strict=True)])
        shared_bits = np.bincount(showing, np.repeat(self.bits[items], times), len(self.sizes))
        shared_items = np.bincount(showing, minlength=len(self.sizes))
        shared_items[profile] = 0
        jaccard = shared_items / np.maximum(1, self.sizes[profile] + self.sizes - shared_items)
        enough = (shared_items > 0) & (jaccard >= self.overlap) & (shared_bits >= self.needed_bits)
        same_person = np.flatnonzero(enough)
        return same_person[np.argsort(-jaccard[same_person], kind="stable")].tolist()
