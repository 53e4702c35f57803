"""All texts a model reads: records of a user's history, records that train the task adapter, and test prompts.

Texts are shown as they are; a retrieved item's fields are cut to 368 words. As published, only the last 50 items count,
and the second record of an item retrieves one earlier item by BM25, which compares words. `--texts published` has users
read with their published cut and spacing (`prime.users.data`). The wording is the task's (`prime.users.templates`).
"""

from __future__ import annotations

import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from prime.errors import InputError
from prime.settings import RECENT_K
from prime.users.data import PUBLISHED_WORDS, Query, User, first_words, spaced
from prime.users.retrieval import top_k
from prime.users.task import Task, extract
from prime.users.templates import Templates

RETRIEVED_WORDS = 368  # published cut of a retrieved item's fields
RECORD_K = 1  # items retrieved for training records


@dataclass(frozen=True)
class Record:
    """A text to train on or to attack. The loss is over `target`, with its leading space, and EOS."""

    id: str
    input: str
    target: str
    held_out: bool = False  # nothing trains on it
    position: int = field(default=0, compare=False)  # of its item in the user's history


@dataclass(frozen=True)
class Prompt:
    """A test question as the model reads it; `id` is the query's."""

    id: str
    text: str


# -- records of a history -------------------------------------------------------------------------------------------


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

    Each item gives `u{user}-{item}`. In `task.paired` tasks each item but the first also gives `u{user}-{item}-k1-p`,
    whose input begins with the profile (an empty one if `profile_text` is None) and the nearest earlier item.

    Args:
        held_out: positions in the user's history; records of these items are marked. No record of any item
            retrieves one of them, so that training sees none of them and all records are made alike.
        quoting: whether there are records that show an earlier item. Differential privacy by items
            (`prime.bank.dp`) needs each record to tell of its own item alone.
    """
    window = user.recent(recent_k)
    first = len(user.profile) - len(window)
    earlier: list[Shown] = []  # what later records may retrieve
    records = []
    for position, (item, shown) in enumerate(zip(window, _corpus(window, templates), strict=True), first):
        name, is_held_out = f"u{user.user_id}-{item['id']}", position in held_out
        text = templates["OPPU_input"].format(**item)
        target = templates["OPPU_full"].format(**item)[len(text) :]
        records.append(Record(name, text, target, is_held_out, position))
        if quoting and task.paired and earlier:
            query = templates["retrieval_query"].format(**_spaced(item, PUBLISHED_WORDS))
            retrieved = _retrieve(query, earlier, RECORD_K)
            context = _context(profile_text or "", retrieved)
            records.append(Record(f"{name}-k{RECORD_K}-p", context + text, target, is_held_out, position))
        if not is_held_out:
            earlier.append(shown)
    return records


def history_texts(items: Sequence[Mapping[str, str]], templates: Templates, words: int = RETRIEVED_WORDS) -> list[str]:
    """History items as they are shown when retrieved, and by default embedded; fields are cut to `words` words."""
    return [templates["retrieval_history"].format(**_cut(item, words)) for item in items]


class Shown(NamedTuple):
    """A history item as a prompt shows it, and as BM25 compares it: with single spaces."""

    text: str
    words: str


def _corpus(items: Sequence[Mapping[str, str]], templates: Templates) -> list[Shown]:
    compared = [templates["retrieval_history"].format(**_spaced(item, RETRIEVED_WORDS)) for item in items]
    return [Shown(*pair) for pair in zip(history_texts(items, templates), compared, strict=True)]


# -- a history asked as test queries --------------------------------------------------------------------------------


def query_records(
    user: User,
    task: Task,
    templates: Templates,
    others: Sequence[Mapping[str, str]],
    rng: random.Random,
    recent_k: int = RECENT_K,
) -> list[Record]:
    """The user's last `recent_k` items (0: all) asked as test queries without history, `u{user}-{item}-q`.

    Args:
        others: items of other users. Where a query offers two references (citation), the wrong one is what the paper
            nearest by title (BM25) among them cites.
        rng: places the right reference.

    Raises:
        InputError: a task whose items hold answers without questions, or no wrong reference among `others`.
    """
    if not task.source:
        raise InputError(f"{task.name}: a history holds answers without questions, it cannot be asked as test queries")
    records = []
    for item in user.recent(recent_k):
        parts, gold = _as_query(item, task, others, rng)
        records.append(_query_record(f"u{user.user_id}-{item['id']}-q", templates, parts, gold))
    return records


def _as_query(
    fields: Mapping[str, str], task: Task, others: Sequence[Mapping[str, str]], rng: random.Random
) -> tuple[tuple[str, ...], str]:
    """What a query about an item shows, and its answer: the item's target, or the label of the right reference."""
    source, target = fields[task.source], fields[task.target]
    if task.query_parts == 1 or task.labels is None:
        return (source,), target
    wrong = _wrong_reference(source, target, task, others)
    place = rng.randrange(2)
    options = (wrong, target) if place else (target, wrong)
    return (source, *options), task.labels[place]


def _wrong_reference(source: str, right: str, task: Task, others: Sequence[Mapping[str, str]]) -> str:
    """The reference of the nearest of `others` that is not the right one."""
    query = spaced(source, PUBLISHED_WORDS)
    for place in top_k(query, [other[task.source] for other in others], len(others)):
        if others[place][task.target] != right:
            return others[place][task.target]
    raise InputError(f"{task.name}: no items of other users to take wrong references from")


# -- queries --------------------------------------------------------------------------------------------------------


def task_records(user: User, task: Task, templates: Templates, profile_text: str | None) -> list[Record]:
    """Records `u{user}-q{query}` that train the task adapter: each query with profile, one retrieved item and gold.

    A profile of None is written as an empty one. As published (`task.published_texts`) articles have the published cut
    and spacing here, and not in test prompts.

    Raises:
        InputError: a query without gold, or in citation without its options.
    """
    corpus = _corpus(user.profile, templates)
    records = []
    for query in user.queries:
        if query.gold is None:
            raise InputError(f"user {user.user_id}: query {query.id}: no field 'gold', training needs it")
        parts = _query_parts(user, query, task)
        if task.published_texts and task.query_parts == 1:
            parts = (spaced(parts[0], PUBLISHED_WORDS),)
        retrieved = _retrieve(_query_words(templates, parts, task), corpus, RECORD_K)
        bare = _query_record(f"u{user.user_id}-q{query.id}", templates, parts, query.gold)
        records.append(replace(bare, input=_context(profile_text or "", retrieved) + bare.input))
    return records


def test_prompts(user: User, task: Task, templates: Templates, k: int, profile_text: str | None) -> list[Prompt]:
    """The user's queries with `k` retrieved items (0: no history) and the profile (None: none)."""
    corpus = _corpus(user.profile, templates) if k else []
    prompts = []
    for query in user.queries:
        parts = _query_parts(user, query, task)
        retrieved = _retrieve(_query_words(templates, parts, task), corpus, k)
        prompts.append(Prompt(query.id, _context(profile_text, retrieved) + templates["prompt"].format(*parts)))
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


def _query_record(name: str, templates: Templates, parts: Sequence[str], gold: str) -> Record:
    """A query without history; the target is what the full template adds to it."""
    text = templates["prompt"].format(*parts)
    return Record(name, text, templates["full_prompt"].format(*parts, gold)[len(text) :])


# -- parts of a text ------------------------------------------------------------------------------------------------


def _context(profile_text: str | None, retrieved: Sequence[str]) -> str:
    """Profile and history in front of a question; an absent part (None, nothing retrieved) leaves no header."""
    profile = "" if profile_text is None else f"### User Profile:\n{profile_text}\n\n"
    history = f"### User History:\n{''.join(retrieved)}\n\n" if retrieved else ""
    return profile + history


def _query_words(templates: Templates, parts: Sequence[str], task: Task) -> str:
    """What a test query is compared by; as published with its own spacing."""
    query = templates["retrieval_query_wokey"].format(parts[0])
    return query if task.published_texts else spaced(query)


def _retrieve(query: str, corpus: Sequence[Shown], k: int) -> list[str]:
    return [corpus[i].text for i in top_k(query, [shown.words for shown in corpus], k)]


def _cut(item: Mapping[str, str], words: int) -> dict[str, str]:
    """A copy whose fields hold at most `words` words, as they are spaced."""
    return {name: first_words(text, words) for name, text in item.items()}


def _spaced(item: Mapping[str, str], words: int) -> dict[str, str]:
    """The same with single spaces between words."""
    return {name: spaced(text, words) for name, text in item.items()}
