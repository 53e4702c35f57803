"""A task: what a history item holds, what is learned, how answers are judged, how it is worded.

`prime.users.tasks` reads tasks out of files. Nothing in the toolkit branches on a task's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from prime.users.answers import Choices


@dataclass(frozen=True)
class Task:
    """What a task's file says (docs/extending.md), all of it filled in."""

    name: str
    lamp: str  # the name in files of answers: {"task": "LaMP_2M", ...}
    fields: tuple[str, ...]  # of a history item, id first
    target: str  # the field a history record learns to produce
    metrics: tuple[str, ...]  # at test
    marker: str = ""  # the words in a query's input behind which its text begins; "": all of it is the text
    labels: tuple[str, ...] | None = None  # possible answers at test
    history_metrics: tuple[str, ...] = ()  # in the search
    history_labels: tuple[str, ...] | None = None  # possible answers on history records
    paired: bool = False  # each item but the first gives a second record, with profile and history
    source: str = ""  # the field of a history item that a test query would show; "": items hold only answers
    two_options: bool = False  # a query offers two references, as LaMP-1 words it: see `extract`
    scale: tuple[float, float] | None = None  # answers are numbers: the ends
    ignore_case: bool = False  # of labels
    published_texts: bool = False  # `--texts published`: cut and spaced as published
    # Wording, which runs record apart from the task: see `prime.users.identity`.
    templates: Mapping[str, str] = field(default_factory=dict, metadata={"wording": True})
    profile_prompt: str = field(default="", metadata={"wording": True})  # the question that profiles in words answer
    habit: str = field(default="", metadata={"wording": True})  # the sentence about the commonest answer

    @property
    def query_parts(self) -> int:
        """How many texts `extract` returns: the text, or title and two options."""
        return 3 if self.two_options else 1

    @property
    def choices(self) -> Choices:
        """Possible answers at test."""
        return Choices(self.labels, self.scale, self.ignore_case)

    @property
    def history_choices(self) -> Choices:
        """Possible answers on history records."""
        return Choices(self.history_labels, self.scale, self.ignore_case)

    @property
    def fitness(self) -> str:
        """What a search should ask (`--fitness`): test queries where a history teaches something else (citation)."""
        return "history" if self.history_metrics == self.metrics else "query"

    def content(self) -> dict[str, Any]:
        """What results depend on beside the wording and `--texts`, by name; what is as usual is left out, so that a
        later version may know more of a task.
        """
        found = {}
        for about in fields(self):
            value = getattr(self, about.name)
            if about.name != "published_texts" and not about.metadata and value != about.default:
                found[about.name] = value
        return found


# Titles may hold quotation marks themselves, so each end is anchored on what LaMP writes next to it.
_TITLE = re.compile(r'written the paper with the title "(.*?)", which reference', re.DOTALL)
_BARE_TITLE = re.compile(r'written the paper with the title "(.*?)"', re.DOTALL)
_OPTIONS = re.compile(r'\[1\]: "(.*)"[,;]?\s*\[2\]: "(.*)"', re.DOTALL)


def extract(task: Task, text: str) -> tuple[str, ...] | None:
    """The texts of a query's input: (article,), or (title, option 1, option 2); None if absent."""
    if task.two_options:
        return _extract_citation(text)
    _, marker, article = text.partition(task.marker) if task.marker else ("", "all", text)
    return (article,) if marker else None


def _extract_citation(text: str) -> tuple[str, str, str] | None:
    title = _TITLE.search(text) or _BARE_TITLE.search(text)
    if title is None:
        return None
    options = _OPTIONS.search(text, title.end())
    return (title[1], options[1], options[2]) if options else None
