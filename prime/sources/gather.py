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
from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np

from prime.sources.lamp import Spool, id_order

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

    def join(self, one: int, other: int) -> bool:
        """Make one set of two; False where they are one already, or of two owners."""
        a, b = self.root(one), self.root(other)
        owners = {self.owner[root] for root in (a, b) if root in self.owner}
        if a == b or len(owners) > 1:
            return False
        self.parent[b] = a
        if owners:
            self.owner[a] = owners.pop()
        return True


@dataclass
class Person:
    """One user: id in the files written, and numbers of the questions, in the order of their names."""

    user_id: str
    questions: list[int] = field(default_factory=list)


def question_names(spool: Spool) -> dict[int, str]:
    """Number -> id of each question, in the order of ids; one that train and dev both have gets its part in front."""
    rows = list(spool.rows("SELECT number, part, id FROM question"))
    times = Counter(name for _, _, name in rows)
    named = [(part, id_order(name), number, name) for number, part, name in rows]
    return {
        number: f"{part}-{name}" if times[name] > 1 else name
        for part, _, number, name in sorted(named, key=lambda row: (row[1], row[0]))
    }


def gather(spool: Spool, names: dict[int, str], overlap: float = OVERLAP) -> tuple[list[Person], Counter[str]]:
    """Everybody, and how many questions were gathered by what.

    Persons and their questions come in the order of `names`, whatever the order of the files. A person without
    `user_id` is called `q` and the id of the first question.
    """
    owners = {n: (user, profile) for n, user, profile in spool.rows("SELECT number, user, profile FROM question")}
    sets, first, counts = Sets(), dict[str, int](), Counter[str]()
    for number in names:
        user = owners[number][0]
        if user is not None:
            counts["by user_id"] += 1
            sets.owner.setdefault(number, user)
            sets.join(first.setdefault(user, number), number)
    by_profile: dict[int, list[int]] = defaultdict(list)
    for number in names:
        by_profile[owners[number][1]].append(number)
    if any(user is None for user, _ in owners.values()):
        _join_alike(spool, sets, by_profile, overlap, counts)
    people: dict[int, Person] = {}
    for number, name in names.items():
        root = sets.root(number)
        if root not in people:
            people[root] = Person(sets.owner.get(root) or _made_up(name, first.keys()))
        people[root].questions.append(number)
    return list(people.values()), counts


def _made_up(name: str, given: Container[str]) -> str:
    user_id = f"q{name}"
    while user_id in given:
        user_id = f"q{user_id}"
    return user_id


def _join_alike(
    spool: Spool, sets: Sets, by_profile: dict[int, list[int]], overlap: float, counts: Counter[str]
) -> None:
    """Join questions whose profiles are equal or similar; a profile of two known users tells nothing about others."""
    similar = Similar(spool, overlap)
    owners = {p: {sets.owner.get(sets.root(number)) for number in numbers} for p, numbers in by_profile.items()}
    of_two = {profile for profile, found in owners.items() if len(found - {None}) > 1}
    for profile, numbers in by_profile.items():
        if profile in of_two:
            continue
        if similar.telling(profile):
            counts["by an equal profile"] += sum(sets.join(numbers[0], number) for number in numbers[1:])
        for other in similar.to(profile):
            if other in by_profile and other not in of_two:
                counts["by a similar profile"] += sets.join(numbers[0], by_profile[other][0])


class Similar:
    """Compares profiles by the items they show, in memory: about 50 bytes for each item of a distinct profile."""

    def __init__(self, spool: Spool, overlap: float):
        pairs = np.fromiter(spool.rows("SELECT item, profile FROM member"), dtype=[("item", "i8"), ("profile", "i4")])
        ((profiles,),) = spool.rows("SELECT COUNT(*) FROM profile")  # numbered from 1
        self.overlap, self.needed = overlap, math.log2(max(1, profiles * (profiles - 1) / 2)) - 1e-9
        self.sizes = np.bincount(pairs["profile"], minlength=profiles + 1)
        _, item, self.shown = np.unique(pairs["item"], return_inverse=True, return_counts=True)
        self.bits = np.log2(profiles / self.shown)
        # Profiles in the order of items, items in the order of profiles, and where those of each end.
        self.profiles, self.profile_ends = pairs["profile"][np.argsort(item, kind="stable")], np.cumsum(self.shown)
        self.items, self.item_ends = item[np.argsort(pairs["profile"], kind="stable")], np.cumsum(self.sizes)

    def _items(self, profile: int) -> np.ndarray:
        end = self.item_ends[profile]
        return self.items[end - self.sizes[profile] : end]

    def telling(self, profile: int) -> bool:
        """Whether nobody else shows this profile by chance."""
        own = self._items(profile)
        return len(own) > 0 and float(self.bits[own].sum()) >= self.needed

    def to(self, profile: int) -> list[int]:
        """Other profiles of the same person, the most similar first."""
        own = self._items(profile)
        own = own[self.shown[own] > 1]
        if not len(own):
            return []
        ends = self.profile_ends[own]
        others = np.concatenate([self.profiles[e - n : e] for e, n in zip(ends, self.shown[own], strict=True)])
        bits = np.bincount(others, np.repeat(self.bits[own], self.shown[own]), len(self.sizes))
        both = np.bincount(others, minlength=len(self.sizes))
        both[profile] = 0
        share = both / np.maximum(1, self.sizes[profile] + self.sizes - both)
        alike = np.flatnonzero((both > 0) & (share >= self.overlap) & (bits >= self.needed))
        return alike[np.argsort(-share[alike], kind="stable")].tolist()
