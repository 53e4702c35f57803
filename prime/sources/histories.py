"""The users of official LaMP files: one history and the queries of each.

A history is what all profiles of the user show, without what the user's own queries ask. In the time split it ends
strictly before the earliest query. Items of citation need what the paper cites, which LaMP-1 does not say: see
`Citations`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from prime.sources.gather import Person
from prime.sources.lamp import Reader
from prime.sources.placing import free_name
from prime.sources.spool import Item, Question
from prime.sources.values import date_key, strictly_before
from prime.users.tasks import Task, extract

# -- what papers cite -----------------------------------------------------------------------------------------------


def same_text(text: str) -> str:
    """A text as titles are compared: case and white space do not count."""
    return " ".join(text.lower().split())


class Citations:
    """What a paper of a history cites (task citation).

    LaMP-1's history items are title and abstract. There are three sources of what such a paper cites: an item's own
    field `citation`; a table given by the user, {title: cited title}; and, since LaMP's questions ask what a paper
    cites, the right option of a question about the same paper that was put to another user (a co-author). Answers to
    test users' questions are never used.
    """

    def __init__(self, table: Mapping[str, str]):
        self.table = {same_text(title): cited for title, cited in table.items()}
        self.answers: dict[str, list[tuple[str, str]]] = defaultdict(list)  # title -> (user asked, cited title)

    def add_question(self, user_id: str, task: Task, question: Question) -> None:
        title, *options = extract(task, question.input) or ("",)
        labels = task.labels or ()
        if options and question.gold in labels:
            self.answers[same_text(title)].append((user_id, options[labels.index(question.gold)]))

    def of(self, item: Item, hidden: Container[str]) -> str:
        """The cited title, "" where it is not known without the questions of the `hidden` users."""
        title = same_text(item["title"])
        stated = item.get("citation", "").strip() or self.table.get(title, "")
        answers = [cited for user_id, cited in self.answers.get(title, ()) if user_id not in hidden]
        return stated or min(answers, default="")


# -- one user -------------------------------------------------------------------------------------------------------


class Histories:
    """Makes users of what was read.

    Args:
        names: ids of the questions in the files written, by their numbers.
        by_time: the history ends strictly before the earliest query (time split).
        citations: for the task citation; None for others.
    """

    def __init__(self, reader: Reader, names: Mapping[int, str], by_time: bool, citations: Citations | None):
        self.reader, self.names, self.by_time, self.citations = reader, names, by_time, citations
        self.spool, self.task, self.tally = reader.spool, reader.task, reader.tally

    def user(self, person: Person) -> dict[str, Any]:
        """The user as in the files, history oldest first."""
        questions = self.spool.questions(person.questions)
        profiles = dict.fromkeys(question.profile for question in questions)
        shown = {profile: self.spool.members(profile) for profile in profiles}
        ids = self._ids(questions, shown)
        items = {key: self.spool.item(key) for key in ids}
        for reason, kept in (
            ("items not surely before the user's first query", self._older(items, questions, shown)),
            ("items that a query of the user asks", self._unasked(items, questions)),
            ("items whose citation is not known", self._cited(items, person)),
        ):
            self.tally.counts[reason] += len(items.keys() - kept)
            items = {key: item for key, item in items.items() if key in kept}
        if self.by_time:
            items = dict(sorted(items.items(), key=lambda pair: date_key(pair[1].get("date"))))
        profile = [{"id": ids[key], **item} for key, item in items.items()]
        queries = [{"id": self.names[q.number], "input": self.reader.marked(q), "gold": q.gold} for q in questions]
        return {"user_id": person.user_id, "profile": profile, "query": queries}

    def _ids(self, questions: Sequence[Question], shown: Mapping[int, list[int]]) -> dict[int, str]:
        """Ids of all items shown, in the order of the history: the longest profile, then what others add.

        Each item has the id that the first question showing it gives it, with a number behind where that is taken.

        Args:
            shown: keys of the items of each profile.
        """
        first: dict[int, Question] = {}  # that shows a profile
        for question in questions:
            first.setdefault(question.profile, question)
        ids: dict[int, str] = {}
        taken: set[str] = set()
        for profile, question in first.items():
            for key, official in zip(shown[profile], json.loads(question.ids), strict=True):
                if key not in ids:
                    ids[key] = free_name(official or str(len(ids)), taken)
        longest = max(shown, key=lambda profile: len(shown[profile]))
        return {key: ids[key] for key in dict.fromkeys([*shown[longest], *ids])}

    def _older(
        self, items: Mapping[int, Item], questions: Sequence[Question], shown: Mapping[int, list[int]]
    ) -> set[int]:
        """Items that are surely older than every query.

        A dated query comes after items of earlier dates. One without a date comes after what its own profile shows, and
        after all that is older than something there. What is shown and has no date is older than the query that shows
        it.
        """
        kept = set(items)
        if not self.by_time:
            return kept
        dates = {key: date_key(item.get("date")) for key, item in items.items()}
        for profile, query_date in {(question.profile, question.date) for question in questions}:
            in_profile = set(shown[profile])
            limit = query_date or max((dates[key] for key in in_profile), default="")
            earlier = {key for key in kept if strictly_before(dates[key], limit)}
            kept = earlier | {key for key in kept & in_profile if not (query_date and dates[key])}
        return kept

    def _unasked(self, items: Mapping[int, Item], questions: Sequence[Question]) -> set[int]:
        """Items that are not one of the user's own queries with its answer."""
        asked = {self._signature(extract(self.task, q.input) or (q.input,), q.gold) for q in questions}
        kept = set()
        for key, item in items.items():
            text, answer = item.get(self.task.source, ""), item.get(self.task.target, "")
            if self._signature((text,), answer) not in asked:
                kept.add(key)
        return kept

    def _signature(self, parts: Sequence[str], answer: str) -> tuple[str, ...]:
        """What a query and the item it was made of have in common: text and answer, of citation the title."""
        if self.task.query_parts > 1:
            return (same_text(parts[0]),)
        return (same_text(parts[0]) if self.task.source else "", same_text(answer))

    def _cited(self, items: Mapping[int, Item], person: Person) -> set[int]:
        """Items of which it is known what they cite; all of them but for citation."""
        if self.citations is None:
            return set(items)
        return {key for key, item in items.items() if self.citations.of(item, {person.user_id})}

    def finished(self, user: dict[str, Any], test_ids: Iterable[str]) -> dict[str, Any]:
        """The user as written: each item with all of the task's fields in their order, empty where LaMP has none.

        What papers cite is filled in; items where only questions to users of the test tell it are left out.
        """
        profile = user["profile"]
        if self.citations is not None:
            hidden = {user["user_id"], *test_ids}
            cited = [{**item, "citation": self.citations.of(item, hidden)} for item in profile]
            profile = [item for item in cited if item["citation"]]
            self.tally.counts["items whose citation only the test tells"] += len(cited) - len(profile)
        names = self.task.fields
        if any("date" in item for item in profile):
            names = (*names, "date")
        return {**user, "profile": [_with_fields(item, names) for item in profile]}


def _with_fields(item: Item, names: Iterable[str]) -> Item:
    """The item with exactly these fields, empty where it has none."""
    return {name: item.get(name, "") for name in names}
