"""The table of tasks: LaMP as processed by the Per-Pcs authors (six tasks, and news categorisation).

A task's row says which fields its history items have, which of them is learned, which metrics judge it, and how the
text of a test query is found in LaMP's question. Nothing else in the toolkit branches on a task's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from prime.errors import InputError


@dataclass(frozen=True)
class Task:
    """One row of the table."""

    name: str
    lamp: str  # the name in LaMP's files: {"task": "LaMP_2M", ...}
    fields: tuple[str, ...]  # of a history item, id first
    target: str  # the field a history record learns to produce
    metrics: tuple[str, ...]  # at test
    marker: str  # the words in a query's input behind which its article begins; "" for citation, see `extract`
    labels: tuple[str, ...] | None = None  # possible answers at test
    history_metrics: tuple[str, ...] = ()  # in the search
    history_labels: tuple[str, ...] | None = None  # possible answers on history records
    paired: bool = False  # each item but the first gives a second record, with profile and history
    source: str = ""  # the field of a history item that a test query would show; "": items hold only answers
    published_texts: bool = False  # `--texts published`: cut and spaced as published

    @property
    def query_parts(self) -> int:
        """How many texts `extract` returns: the article, or title and two options."""
        return 1 if self.marker else 3


MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
    "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip
NEWS_CATEGORIES = (
    "food & drink", "sports", "education", "parents", "religion", "travel", "business", "crime",
    "science & technology", "culture & arts", "entertainment", "politics", "women", "style & beauty",
    "healthy living",
)  # fmt: skip
SCORES = ("1", "2", "3", "4", "5")

CHOICE = ("accuracy", "f1")
ERROR = ("MAE", "RMSE")
TEXT = ("rouge-1", "rouge-L")

_ROWS = (
    Task(
        "citation", "LaMP_1", ("id", "title", "abstract", "citation"), "citation", CHOICE, "",
        labels=("[1]", "[2]"), history_metrics=TEXT,  # history: title -> cited title, a text
        source="title",
    ),
    Task(
        "movie_tagging", "LaMP_2M", ("id", "description", "tag"), "tag", CHOICE, "] description: ",
        labels=MOVIE_TAGS, history_metrics=CHOICE, history_labels=MOVIE_TAGS, paired=True,
        source="description",
    ),
    Task(
        "news_categorize", "LaMP_2N", ("id", "text", "title", "category"), "category", CHOICE, "] article: ",
        labels=NEWS_CATEGORIES, history_metrics=CHOICE, history_labels=NEWS_CATEGORIES, source="text",
    ),
    Task(
        "product_rating", "LaMP_3", ("id", "text", "score"), "score", ERROR,
        "without further explanation. review: ", labels=SCORES, history_metrics=ERROR, history_labels=SCORES,
        paired=True, source="text",
    ),
    Task(
        "news_headline", "LaMP_4", ("id", "text", "title"), "title", TEXT,
        "Generate a headline for the following article: ", history_metrics=TEXT, paired=True, source="text",
    ),
    Task(
        "scholarly_title", "LaMP_5", ("id", "title", "abstract"), "title", TEXT,
        "Generate a title for the following abstract of a paper: ", history_metrics=TEXT, paired=True,
        source="abstract",
    ),
    Task(
        "tweet_paraphrase", "LaMP_7", ("id", "text"), "text", TEXT,
        "Paraphrase the following tweet without any explanation before or after it: ", history_metrics=TEXT,
    ),
)  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}

# Titles may hold quotation marks themselves, so each end is anchored on what LaMP writes next to it.
_TITLE = re.compile(r'written the paper with the title "(.*?)", which reference', re.DOTALL)
_BARE_TITLE = re.compile(r'written the paper with the title "(.*?)"', re.DOTALL)
_OPTIONS = re.compile(r'\[1\]: "(.*)"[,;]?\s*\[2\]: "(.*)"', re.DOTALL)


def get_task(name: str, texts: str = "faithful") -> Task:
    """The task called `name`, its texts as they are or `published`; InputError where there is none."""
    if name not in TASKS:
        raise InputError(f"unknown task '{name}', choose from: {', '.join(TASKS)}")
    return replace(TASKS[name], published_texts=True) if texts == "published" else TASKS[name]


def extract(task: Task, text: str) -> tuple[str, ...] | None:
    """The texts of a query's input: (article,), or (title, option 1, option 2); None if absent."""
    if not task.marker:
        return _extract_citation(text)
    _, marker, article = text.partition(task.marker)
    return (article,) if marker else None


def _extract_citation(text: str) -> tuple[str, str, str] | None:
    title = _TITLE.search(text) or _BARE_TITLE.search(text)
    if title is None:
        return None
    options = _OPTIONS.search(text, title.end())
    return (title[1], options[1], options[2]) if options else None
