"""Turns official LaMP files into the files of data/README.md: who goes where, what is written, and the report of it.

Reading is in `lamp.py`, telling people apart in `gather.py`, their histories in `histories.py`; `spool.py` keeps on
disk what was read.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.runs.files import write_json
from prime.seeds import derive_seed
from prime.sources.gather import OVERLAP, Person, gather, question_names
from prime.sources.histories import Citations, Histories
from prime.sources.lamp import UNUSABLE, Reader, find_parts
from prime.sources.placing import FILES, REPORT, Tally, placing, write_users
from prime.sources.spool import Spool, StoredUsers
from prime.users.data import LABEL_FILE
from prime.users.tasks import Task

# The test users and the reserve's tenth are the Per-Pcs authors' choice, the other shares ours.
TEST_USERS, BASE_SHARE, RESERVE_SHARE = 100, 0.4, 0.1

Bar = Callable[[int, str, str], AbstractContextManager[Any]]  # (total, what, unit), see `prime.runs.progress.bar`


# -- who goes where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Sizes of the files: users of the test, and shares of the others in base and reserve; the rest are candidates."""

    test_users: int = TEST_USERS
    base: float = BASE_SHARE
    reserve: float = RESERVE_SHARE


def share_out(lengths: Mapping[str, int], shares: Shares, seed: int) -> dict[str, list[str]]:
    """User ids of each file, a function of ids, lengths and seed: the order of users plays no part.

    The test users are those with the longest histories (published), longest first; the others are dealt out in the
    order of a hash of (seed, id).

    Raises:
        InputError: too few users.
    """
    order = sorted(lengths, key=lambda user_id: (derive_seed("prepare", seed, user_id), user_id))
    test = sorted(order, key=lambda user_id: -lengths[user_id])[: shares.test_users]
    chosen = set(test)
    others = [user_id for user_id in order if user_id not in chosen]
    base, reserve = round(len(others) * shares.base), round(len(others) * shares.reserve)
    if not test or not base or base + reserve >= len(others):
        raise InputError(
            f"{len(lengths)} users with history and query cannot be parted into {shares.test_users} for the test and "
            f"shares of {shares.base:g} base, {shares.reserve:g} reserve and the rest candidates "
            "(--test_users, --base_share, --reserve_share)"
        )
    return {
        "base": others[:base],
        "candidates": others[base + reserve :],
        "reserve": others[base : base + reserve],
        "test": test,
    }


# -- the whole conversion -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the files depend on, beside what is read: the options of prepare_data.py."""

    split: str = "auto"
    shares: Shares = Shares()
    min_items: int = 1
    overlap: float = OVERLAP
    seed: int = 0


def prepare(
    task: Task, source: Path, target: Path, options: Options, cited: Mapping[str, str], bar: Bar
) -> dict[str, Any]:
    """Make the files of `target` from the official ones in `source`, and return the report, which is written last.

    Args:
        cited: for the task citation: title -> cited title, beside what LaMP says.

    Raises:
        InputError: wrong input, or a target that holds files of another origin; nothing is changed then.
    """
    with placing(target) as folder:
        try:
            return _convert(task, find_parts(source), folder, options, cited, bar)
        except sqlite3.OperationalError as error:
            raise InputError(f"{folder}: {error}; it needs as much room as the files it reads") from None


def _convert(
    task: Task,
    parts: Mapping[str, tuple[Path, Path]],
    folder: Path,
    options: Options,
    cited: Mapping[str, str],
    bar: Bar,
) -> dict[str, Any]:
    """Make all files within `folder`, synced to disk."""
    sizes = {str(path): path.stat().st_size for path in chain.from_iterable(parts.values())}
    with closing(Spool(folder)) as spool, closing(StoredUsers(folder / "users.jsonl")) as users:
        reader = Reader(task, spool)
        with bar(sum(sizes[str(questions)] for questions, _ in parts.values()), "reading", "B") as progress:
            for part, (questions, outputs) in parts.items():
                reader.read(part, questions, outputs, progress.update)
        histories, summary = _make_users(reader, users, options, cited, bar)
        ids = share_out(users.lengths, options.shares, options.seed)
        files = {}
        for kind, name in FILES.items():
            finished = (histories.finished(users.read(user_id), ids["test"]) for user_id in ids[kind])
            files[name] = write_users(folder / name, finished, task)
        golds: list[dict[str, str]] = []
        for user_id in ids["test"]:
            golds += [{"id": query["id"], "output": query["gold"]} for query in users.read(user_id)["query"]]
    write_json(folder / LABEL_FILE, {"task": task.lamp, "golds": golds})
    counts = {kind: number for kind, number in reader.tally.counts.items() if number}
    report = {"task": task.name, **summary, "files": files, "counts": counts, "named": reader.tally.named}
    report |= {"options": asdict(options), "read": sizes}
    write_json(folder / REPORT, report)
    return report


def _make_users(
    reader: Reader, users: StoredUsers, options: Options, cited: Mapping[str, str], bar: Bar
) -> tuple[Histories, dict[str, Any]]:
    """Store everybody with a history; for the report, the split and how questions were gathered."""
    by_time = ordered_by_time(options.split, reader.tally)
    names = question_names(reader.spool)
    people, gathered = gather(reader.spool, names, options.overlap)
    citations = _known_citations(reader, people, cited) if reader.task.query_parts > 1 else None
    histories = Histories(reader, names, by_time, citations)
    with bar(len(people), "users", "user") as progress:
        for person in people:
            user = histories.user(person)
            if len(user["profile"]) >= options.min_items:
                users.add(user)
            else:
                reader.tally.add("users with fewer than --min_items items", person.user_id)
            progress.update(1)
    if not users.lengths:
        raise InputError(nobody(reader))
    return histories, {"split": "time" if by_time else "user", "people": len(people), "gathered": dict(+gathered)}


def _known_citations(reader: Reader, people: Iterable[Person], cited: Mapping[str, str]) -> Citations:
    """What papers cite, by the table given and by everybody's questions."""
    citations = Citations(cited)
    for person in people:
        for question in reader.spool.questions(person.questions):
            citations.add_question(person.user_id, reader.task, question)
    return citations


def ordered_by_time(split: str, tally: Tally) -> bool:
    """Whether this is the time split: asked for, or `auto` and most items have a date."""
    dated = tally.counts["items with a date"]
    if split == "time" and not dated:
        raise InputError("--split time: no history item has a date; these are files of the user split")
    usable = tally.counts["items read"] - tally.counts[UNUSABLE] - tally.counts["items repeated in a profile"]
    return split == "time" or (split == "auto" and dated * 2 > usable)


def nobody(reader: Reader) -> str:
    """Why there is no user at all."""
    task, counts = reader.task, reader.tally.counts
    if counts["items whose citation is not known"]:
        return (
            f"{task.name}: no history item tells what its paper cites; official LaMP-1 does not, and no question asks "
            "about these papers. Give --citations FILE with {title: cited title} (docs/real_data.md)"
        )
    if counts[UNUSABLE] == counts["items read"] and reader.seen_fields:
        return (
            f"{task.name}: no history item has {' and '.join(reader.needed)}; the first has "
            f"{', '.join(reader.seen_fields)}. Is it another task (--task_name)?"
        )
    return f"{task.name}: no user has a question with an answer and --min_items history items"
