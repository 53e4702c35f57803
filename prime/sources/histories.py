"""The users of official LaMP files: one history and the queries of each.

A history is what all profiles of the user show, without what the user's own queries ask. In the time split it ends
strictly before the earliest query. Citation's items have to tell what the paper cites, which LaMP-1 does not: see
`Citations`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prime.sources.gather import Person
from prime.sources.lamp import Item, Question, Reader, date_key, strictly_before
from prime.users.tasks import Task, extract

# -- what papers cite -----------------------------------------------------------------------------------------------


def same_text(text: str) -> str:
    """A text as titles are compared: case and white space do not count."""
    return " ".join(text.lower().split())


class Citations:
    """What a paper of a history cites (task citation).

    LaMP-1's history items are title and abstract. Known is what an item's own `citation` says; what a table given by
    the user says, {title: cited title}; and, since LaMP's questions ask what a paper cites, the right option of a
    question about that paper, put to another user (a co-author). Answers to test users' questions are never used.
    """

    def __init__(self, table: Mapping[str, str]):
        self.table = {same_text(title): cited for title, cited in table.items()}
        self.asked: dict[str, list[tuple[str, str]]] = defaultdict(list)  # title -> (user, cited title)

    def add_question(self, user_id: str, task: Task, question: Question) -> None:
        title, *options = extract(task, question.input) or ("",)
        if options and question.gold in (task.labels or ()):
            cited = options[(task.labels or ()).index(question.gold)]
            self.asked[same_text(title)].append((user_id, cited))

    def of(self, item: Item, hidden: set[str]) -> str:
        """The cited title, "" where it is not known without the questions of these users."""
        title = same_text(item["title"])
        own = item.get("citation", "").strip() or self.table.get(title, "")
        told = sorted(cited for user, cited in self.asked.get(title, ()) if user not in hidden)
        return own or (told[0] if told else "")


# -- one user -------------------------------------------------------------------------------------------------------


class Histories:
    """Makes users of what was read.

    Args:
        names: ids of the questions in the files written, by their numbers.
        by_time: the history ends strictly before the earliest query (time split).
        citations: None but for citation.
    """

    def __init__(self, reader: Reader, names: Mapping[int, str], by_time: bool, citations: Citations | None):
        self.reader, self.names, self.by_time, self.citations = reader, names, by_time, citations
        self.spool, self.task, self.tally = reader.spool, reader.task, reader.tally

    def user(self, person: Person) -> dict[str, Any]:
        """The user as in the files, history oldest first."""
        questions = self.spool.questions(person.questions)
        first: dict[int, Question] = {}
        for question in questions:
            first.setdefault(question.profile, question)
        shown = {profile: self.spool.members(profile) for profile in first}
        ids = self._ids(first, shown)
        items = {key: self.spool.item(key) for key in ids}
        for what, kept in (
            ("items not surely before the user's first query", self._older(items, questions, shown)),
            ("items that a query of the user asks", self._unasked(items, questions)),
            ("items whose citation is not known", self._cited(items, person)),
        ):
            self.tally.counts[what] += len(items.keys() - kept)
            items = {key: item for key, item in items.items() if key in kept}
        if self.by_time:
            items = dict(sorted(items.items(), key=lambda pair: date_key(pair[1].get("date"))))
        profile = [{"id": ids[key], **item} for key, item in items.items()]
        queries = [{"id": self.names[q.number], "input": self.reader.marked(q), "gold": q.gold} for q in questions]
        return {"user_id": person.user_id, "profile": profile, "query": queries}

    def _ids(self, first: Mapping[int, Question], shown: Mapping[int, list[int]]) -> dict[int, str]:
        """Ids of all items shown, in the order of the history: the longest profile, then what others add.

        Each is the one that the first question showing the item has for it, with a number behind where that is taken.
        """
        known: dict[int, str] = {}
        taken: set[str] = set()
        for profile, question in first.items():
            for key, told in zip(shown[profile], json.loads(question.ids), strict=True):
                if key not in known:
                    known[key] = _free(told or str(len(known)), taken)
        longest = max(shown, key=lambda profile: len(shown[profile]))
        return {key: known[key] for key in dict.fromkeys([*shown[longest], *known])}

    def _older(
        self, items: Mapping[int, Item], questions: Sequence[Question], shown: Mapping[int, list[int]]
    ) -> set[int]:
        """Items that are surely older than every query.

        A dated query comes after items of earlier dates. One without a date comes after what its own profile shows, and
        after all that is older than something there.
        """
        kept = set(items)
        if not self.by_time:
            return kept
        dates = {key: date_key(item.get("date")) for key, item in items.items()}
        for profile, asked in {(question.profile, question.date) for question in questions}:
            own = set(shown[profile])
            newest = max((dates[key] for key in own), default="")
            by_date = {key for key in kept if strictly_before(dates[key], asked or newest)}
            kept = by_date | {key for key in kept & own if not (asked and dates[key])}
        return kept

    def _unasked(self, items: Mapping[int, Item], questions: Sequence[Question]) -> set[int]:
        """Items that are not one of the user's own queries with its answer."""
        asked = {self._sign(extract(self.task, q.input) or (q.input,), q.gold) for q in questions}
        return {
            key
            for key, item in items.items()
            if self._sign((item.get(self.task.source, ""),), item.get(self.task.target, "")) not in asked
        }

    def _sign(self, parts: Sequence[str], answer: str) -> tuple[str, ...]:
        """What a query and the item it was made of have in common: text and answer, of citation the title."""
        if self.task.query_parts > 1:
            return (same_text(parts[0]),)
        return (same_text(parts[0]) if self.task.source else "", same_text(answer))

    def _cited(self, items: Mapping[int, Item], person: Person) -> set[int]:
        if self.citations is None:
            return set(items)
        return {key for key, item in items.items() if self.citations.of(item, {person.user_id})}

    def finished(self, user: dict[str, Any], test: Iterable[str]) -> dict[str, Any]:
        """The user as written: each item with all of the task's fields in their order, empty where LaMP has none.

        What papers cite is filled in; items where only questions to users of the test tell it are left out.
        """
        profile = user["profile"]
        if self.citations is not None:
            hidden = {user["user_id"], *test}
            cited = [{**item, "citation": self.citations.of(item, hidden)} for item in profile]
            profile = [item for item in cited if item["citation"]]
            self.tally.counts["items whose citation only the test tells"] += len(cited) - len(profile)
        names = [*self.task.fields, *(["date"] if any("date" in item for item in profile) else [])]
        return {**user, "profile": [{name: item.get(name, "") for name in names} for item in profile]}


def _free(name: str, taken: set[str]) -> str:
    """`name`, with a number behind it if it is taken."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}.{number}"
    taken.add(found)
    return found
