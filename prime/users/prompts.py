"""All texts a model reads: records of a user's history, task-training records, and test prompts.

As published, history fields are cut to 768 words and retrieved items to 368, only the last 50 items count,
and the second record of an item retrieves one earlier item by BM25. The wording is ours. A file given by
`--prompt_path` replaces it: JSON, `{task: {key: template}}` with the keys of `KEYS`.

Templates are plain `str.format` strings, checked when loaded. `prompt`, `full_prompt` and
`retrieval_query_wokey` hold positional `{}`; the others hold names of item fields. Nothing else is a field:
no attribute, index, conversion or format, so a template reaches nothing but those texts. Literal braces are
written `{{` and `}}`.
"""

from __future__ import annotations

import os
import random
import string
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prime.errors import InputError
from prime.runs.files import read_json
from prime.users.data import Query, User
from prime.users.retrieval import top_k
from prime.users.tasks import MOVIE_TAGS, NEWS_CATEGORIES, Task, extract

RECORD_WORDS = 768  # published cut of a history item's fields
RETRIEVED_WORDS = 368  # published cut of a retrieved item's fields
RECENT_K = 50  # published number of history items used
RECORD_K = 1  # items retrieved for training records

Templates = Mapping[str, str]
KEYS = (
    "prompt", "full_prompt", "retrieval_history", "retrieval_query", "retrieval_query_wokey",
    "OPPU_input", "OPPU_full",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A training or membership text: loss is over `target` (with its leading space) and EOS."""

    id: str
    input: str
    target: str
    held_out: bool = False  # nothing trains on it


@dataclass(frozen=True)
class Prompt:
    """A test question as the model reads it; `id` is the query's."""

    id: str
    text: str


def _same(intro: str, name: str, field: str, answer: str, target: str) -> dict[str, str]:
    """Templates of a task whose history asks the same question as its test."""
    ask = f"{intro}{name}: {{}} {answer}:"
    learn = f"{intro}{name}: {{{field}}} {answer}:"
    return {
        "prompt": ask,
        "full_prompt": ask + " {}",
        "retrieval_history": f"{name}: {{{field}}} {answer}: {{{target}}}\n",
        "retrieval_query": f"{{{field}}}",
        "retrieval_query_wokey": "{}",
        "OPPU_input": learn,
        "OPPU_full": f"{learn} {{{target}}}",
    }


_CITATION = "Which reference does this paper cite, [1] or [2]?\nPaper: {} [1]: {} [2]: {} Reference:"
_TWEET = "Say this in a tweet of your own.\nText: {} Tweet:"

TEMPLATES: dict[str, dict[str, str]] = {
    "citation": {
        "prompt": _CITATION,
        "full_prompt": _CITATION + " {}",
        "retrieval_history": "Paper: {title} Reference: {citation}\n",
        "retrieval_query": "{title}",
        "retrieval_query_wokey": "{}",
        "OPPU_input": "Which reference does this paper cite?\nPaper: {title} Reference:",
        "OPPU_full": "Which reference does this paper cite?\nPaper: {title} Reference: {citation}",
    },
    "movie_tagging": _same(
        f"Choose the tag that fits the movie: {', '.join(MOVIE_TAGS)}.\n",
        "Movie", "description", "Tag", "tag",
    ),
    "news_categorize": _same(
        f"Choose the category of the article: {', '.join(NEWS_CATEGORIES)}.\n",
        "Article", "text", "Category", "category",
    ),
    "product_rating": _same("Guess the score of the review, 1 to 5.\n", "Review", "text", "Score", "score"),
    "news_headline": _same("Write the headline of the article.\n", "Article", "text", "Headline", "title"),
    "scholarly_title": _same("Write the title of the paper.\n", "Abstract", "abstract", "Title", "title"),
    "tweet_paraphrase": {
        "prompt": _TWEET,
        "full_prompt": _TWEET + " {}",
        "retrieval_history": "Tweet: {text}\n",
        "retrieval_query": "{text}",
        "retrieval_query_wokey": "{}",
        "OPPU_input": "Tweet:",
        "OPPU_full": "Tweet: {text}",
    },
}  # fmt: skip


def load_templates(path: str | os.PathLike[str] | None, task: Task) -> dict[str, str]:
    """The task's templates: ours, or those of a file in the published schema, checked."""
    if path is None:
        return dict(TEMPLATES[task.name])
    table = read_json(path)
    rows = table.get(task.name) if isinstance(table, dict) else None
    if not isinstance(rows, dict):
        raise InputError(f"{path}: no templates for task '{task.name}'")
    problems = template_problems(rows, task)
    if problems:
        raise InputError.many([f"{path}: task '{task.name}': {problem}" for problem in problems])
    return {key: rows[key] for key in KEYS}


def template_problems(rows: Mapping[str, Any], task: Task) -> list[str]:
    """What is wrong with a task's templates, a line each."""
    problems = []
    for key in KEYS:
        problems += key_problems(rows, key, task)
    return problems or _prefix_problems(rows)


def key_problems(rows: Mapping[str, Any], key: str, task: Task) -> list[str]:
    """What is wrong with one template of a task."""
    if key not in rows:
        return [f"key '{key}': missing"]
    if not isinstance(rows[key], str):
        return [f"key '{key}': not a text"]
    return [f"key '{key}': {problem}" for problem in _field_problems(rows[key], key, task)]


def _field_problems(template: str, key: str, task: Task) -> list[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return [f"{error} (a literal brace is written {{{{ or }}}})"]
    # field name, conversion and format as written; a part without a field has the name None
    fields = [(name, conversion, spec) for _, name, spec, conversion in parts if name is not None]
    problems = [
        f"field '{{{name}}}': conversions and formats are not allowed"
        for name, conversion, spec in fields
        if conversion or spec
    ]
    names = [name for name, _, _ in fields]
    number = _positional(task).get(key)
    allowed = ("",) if number is not None else task.fields
    told = "only {}" if number is not None else "only " + ", ".join(f"{{{name}}}" for name in task.fields)
    problems += [f"field '{{{name}}}': not allowed, {told}" for name in names if name not in allowed]
    if number is not None and not problems and len(names) != number:
        problems.append(f"field '{{}}': found {len(names)} times, expected {number}")
    return problems


def _positional(task: Task) -> dict[str, int]:
    """The keys with positional fields, and how many."""
    parts = task.query_parts
    return {"prompt": parts, "full_prompt": parts + 1, "retrieval_query_wokey": 1, "profile": 1}


def _prefix_problems(rows: Mapping[str, Any]) -> list[str]:
    """A target is what the full template adds, so it has to begin with the other one and add something."""
    return [
        f"key '{full}': must begin with '{start}' and add the answer"
        for start, full in (("prompt", "full_prompt"), ("OPPU_input", "OPPU_full"))
        if not rows[full].startswith(rows[start]) or rows[full] == rows[start]
    ]


def history_records(
    user: User,
    task: Task,
    templates: Templates,
    profile_text: str | None,
    recent_k: int = RECENT_K,
    held_out: Container[int] = (),
    quoting: bool = True,
) -> list[Record]:
    """Records of the user's last `recent_k` items (0: all), oldest first.

    Each item gives `u{user}-{item}`. In `task.paired` tasks each but the first also gives
    `u{user}-{item}-k1-p`, whose input begins with the profile (an empty one if `profile_text` is None) and
    the nearest earlier item of the window. Without `quoting` these are left out: each record then tells of its
    own item alone, as differential privacy by items needs (`prime.bank.dp`).

    `held_out` are positions in the user's history whose records are marked so. No record, of either kind, retrieves
    a held-out item: what is trained on then shows none, and records of both kinds are made alike.
    """
    if recent_k < 0:
        raise ValueError(f"recent_k is {recent_k}, expected 0 (all) or more")
    window = user.profile[-recent_k:] if recent_k else user.profile
    first = len(user.profile) - len(window)
    earlier: list[str] = []  # what may be retrieved
    records = []
    for place, (item, text) in enumerate(zip(window, history_texts(window, templates), strict=True), first):
        out = place in held_out
        fields = _cut(item, RECORD_WORDS)
        start, target = _split(templates, "OPPU_input", "OPPU_full", fields)
        records.append(Record(f"u{user.user_id}-{item['id']}", start, target, out))
        if quoting and task.paired and earlier:
            retrieved = _retrieve(templates["retrieval_query"].format(**fields), earlier, RECORD_K)
            start = _prefix(profile_text or "", retrieved) + start
            records.append(Record(f"u{user.user_id}-{item['id']}-k{RECORD_K}-p", start, target, out))
        earlier += [] if out else [text]
    return records


def query_records(
    user: User, task: Task, templates: Templates, others: Sequence[Mapping[str, str]], dice: random.Random,
    recent_k: int = RECENT_K,
) -> list[Record]:  # fmt: skip
    """The user's last `recent_k` items (0: all) asked as test queries without history, `u{user}-{item}-q`.

    Where a query offers two references (citation), the wrong one is what the paper nearest by title (BM25) among
    `others`, items of other users, cites; dice place the right one.

    Raises:
        InputError: a task whose items hold answers without questions, or nothing to take a wrong reference from.
    """
    if not task.source:
        raise InputError(f"{task.name}: a history holds answers without questions, it cannot be asked as test queries")
    records = []
    for item in user.profile[-recent_k:] if recent_k else user.profile:
        parts, gold = _as_query(_cut(item, RECORD_WORDS), task, others, dice)
        text = templates["prompt"].format(*parts)
        target = templates["full_prompt"].format(*parts, gold)[len(text) :]
        records.append(Record(f"u{user.user_id}-{item['id']}-q", text, target))
    return records


def _as_query(
    fields: Mapping[str, str], task: Task, others: Sequence[Mapping[str, str]], dice: random.Random
) -> tuple[tuple[str, ...], str]:
    """What a query about an item shows, and its answer: the item's target, or the label of the right of two options."""
    source, target = fields[task.source], fields[task.target]
    if task.query_parts == 1 or task.labels is None:
        return (source,), target
    near = (others[place] for place in top_k(source, [other[task.source] for other in others], len(others)))
    wrong = next((_cut(other, RECORD_WORDS)[task.target] for other in near if other[task.target] != target), None)
    if wrong is None:
        raise InputError(f"{task.name}: no items of other users to take wrong references from")
    right = dice.randrange(2)
    options = (wrong, target) if right else (target, wrong)
    return (source, *options), task.labels[right]


def task_records(user: User, task: Task, templates: Templates, profile_text: str | None) -> list[Record]:
    """Task-training records `u{user}-q{query}`: each query with profile, one retrieved item, and its gold.

    A profile of None is written as an empty one.
    """
    corpus = history_texts(user.profile, templates)
    records = []
    for query in user.queries:
        if query.gold is None:
            raise InputError(f"user {user.user_id}: query {query.id}: no field 'gold', training needs it")
        parts = _query_parts(user, query, task)
        text = templates["prompt"].format(*parts)
        target = templates["full_prompt"].format(*parts, query.gold)[len(text) :]
        retrieved = _retrieve(templates["retrieval_query_wokey"].format(parts[0]), corpus, RECORD_K)
        start = _prefix(profile_text or "", retrieved) + text
        records.append(Record(f"u{user.user_id}-q{query.id}", start, target))
    return records


def test_prompts(user: User, task: Task, templates: Templates, k: int, profile_text: str | None) -> list[Prompt]:
    """The user's queries with `k` retrieved items (0: no history) and the profile (None: none)."""
    corpus = history_texts(user.profile, templates) if k else []
    prompts = []
    for query in user.queries:
        parts = _query_parts(user, query, task)
        retrieved = _retrieve(templates["retrieval_query_wokey"].format(parts[0]), corpus, k)
        text = _prefix(profile_text, retrieved) + templates["prompt"].format(*parts)
        prompts.append(Prompt(query.id, text))
    return prompts


test_prompts.__test__ = False  # type: ignore[attr-defined]  # pytest collects by name, also what a test imports


def _query_parts(user: User, query: Query, task: Task) -> tuple[str, ...]:
    """(article,) or (title, option 1, option 2); an input without its marker is the article."""
    parts = extract(task, query.input)
    if parts is not None:
        return parts
    if task.query_parts == 1:
        return (query.input,)
    raise InputError(f"user {user.user_id}: query {query.id}: no title and two options in its input")


def _prefix(profile_text: str | None, retrieved: Sequence[str]) -> str:
    """Profile and history before a prompt; an absent part (None, nothing retrieved) leaves no header."""
    profile = "" if profile_text is None else f"### User Profile:\n{profile_text}\n\n"
    history = f"### User History:\n{''.join(retrieved)}\n\n" if retrieved else ""
    return profile + history


def _split(templates: Templates, start: str, full: str, fields: Mapping[str, str]) -> tuple[str, str]:
    """The input, and what the full template adds to it."""
    text = templates[start].format(**fields)
    return text, templates[full].format(**fields)[len(text) :]


def _retrieve(query: str, corpus: Sequence[str], k: int) -> list[str]:
    return [corpus[i] for i in top_k(query, corpus, k)]


def history_texts(
    items: Sequence[Mapping[str, str]], templates: Templates, words: int = RETRIEVED_WORDS
) -> list[str]:
    """History items as retrieved, and by default as embedded (`retrieval_history`); fields cut to `words` words."""
    return [templates["retrieval_history"].format(**_cut(item, words)) for item in items]


def _cut(item: Mapping[str, str], words: int) -> dict[str, str]:
    """A copy whose fields hold at most `words` words, with single spaces between them."""
    return {name: " ".join(text.split()[:words]) for name, text in item.items()}
