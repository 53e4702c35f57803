"""People with timed items to the files of data/README.md: what a converter of any source hands its records to.

A record is something that a person wrote or chose at a time, in answer to a text. A person is in one file only. Test
users are asked their latest records and have the earlier ones as history; so are base users, who train the task
adapter; candidates keep all. Everything is held in memory.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prime.errors import InputError
from prime.runs.files import write_json
from prime.seeds import derive_seed
from prime.settings import MIN_ITEMS
from prime.sources.placing import FILES, REPORT, TASK_FILE, Tally, free_name, placing, write_users
from prime.users.answers import Choices
from prime.users.data import LABEL_FILE
from prime.users.task import Task

SHARERS = 4  # candidates at least: three are merged, and the attack compares with one that is not
BASE_SHARE = 0.4  # of the users beside those of the test: train the task
ENOUGH = 8  # of those who may be anchors, where there are as many
MOST = 20  # records that a user is asked, unless told otherwise


class Timed(NamedTuple):
    """A record; `time` may be seconds, a year or a row's number, and equal ones stay in the order they came in."""

    user: str
    time: float
    input: str
    target: str
    id: str = ""


@dataclass(frozen=True)
class Sizes:
    """How many of what; None: what the data allow.

    Args:
        test_users: drawn among all; None: a fifth, at most 100.
        base_share: of the others; those with the fewest items, so that the rest may share.
        queries: records that a test user is asked, the latest; None: a quarter, at most `MOST`.
        min_items: records of a user at least.
    """

    test_users: int | None = None
    base_share: float = BASE_SHARE
    queries: int | None = None
    min_items: int = 3


@dataclass(frozen=True)
class Origin:
    """Where records come from, for the report; `tally`: what the converter dropped, and why."""

    read: Mapping[str, int]  # bytes of each file
    tally: Tally = field(default_factory=Tally)
    task_file: Mapping[str, Any] | None = None  # to write beside the data, where the task was made with them


def convert(
    records: Iterable[Timed], task: Task, target: Path, sizes: Sizes, seed: int, origin: Origin
) -> dict[str, Any]:
    """Make the files of `target` from records, and return the report, which is written last.

    Raises:
        InputError: a task whose items are more than a text and its answer; too few users or records; a target that
            holds files of another origin. Nothing is changed then.
    """
    if not task.source or task.query_parts > 1:
        raise InputError(f"{task.name}: its items are more than a text and its answer; it takes official LaMP files")
    tally = origin.tally
    histories = in_order(records, tally, task.choices)
    for name in [name for name, own in histories.items() if len(own) < sizes.min_items]:
        tally.add("users with fewer than --min_items records", f"{name} ({len(histories.pop(name))})")
    ids = part(histories, sizes, seed, tally)
    with placing(target) as folder:
        files: dict[str, Any] = {}
        golds: list[dict[str, str]] = []
        for kind, names in ids.items():
            users = [as_user(name, histories[name], task, asked(kind, len(histories[name]), sizes)) for name in names]
            files[FILES[kind]] = write_users(folder / FILES[kind], users, task)
            if kind == "test":
                for user in users:
                    golds += [{"id": query["id"], "output": query["gold"]} for query in user["query"]]
        write_json(folder / LABEL_FILE, {"task": task.lamp, "golds": golds})
        if origin.task_file is not None:
            write_json(folder / TASK_FILE, origin.task_file)
        report = {"task": task.name, "split": "time", "people": len(histories), "gathered": {}, "files": files}
        report |= {"counts": dict(tally.counts), "named": tally.named, **sharing(ids["candidates"], histories)}
        report |= {"options": asdict(sizes) | {"seed": seed}, "read": dict(origin.read)}
        write_json(folder / REPORT, report)
    return report


def in_order(records: Iterable[Timed], tally: Tally, choices: Choices) -> dict[str, list[Timed]]:
    """Each user's records, the earliest first, their ids each used once; without those that lack something, or whose
    answer is not one of the task's. Answers are written as the task writes them.
    """
    histories: dict[str, list[Timed]] = defaultdict(list)
    taken: set[str] = set()
    seen: set[tuple[str, float, str, str]] = set()
    for number, record in enumerate(records):
        tally.counts["records read"] += 1
        if reason := _unusable(record):
            tally.add(reason, record.id or f"record {number}")
        elif record[:4] in seen:
            tally.add("records given twice", record.id or f"record {number}")
        elif choices.outside(record.target):
            tally.add("records whose answer is none of the task's", f"{record.target[:40]!r}")
        else:
            seen.add(record[:4])
            own = record._replace(target=choices.written(record.target), id=free_name(record.id or str(number), taken))
            histories[record.user.strip()].append(own)
    return {user: sorted(own, key=lambda record: record.time) for user, own in histories.items()}


def _unusable(record: Timed) -> str:
    for name in ("user", "input", "target"):
        if not getattr(record, name).strip():
            return f"records without {name}"
    return "" if math.isfinite(record.time) else "records without time"


def part(histories: Mapping[str, Sequence[Timed]], sizes: Sizes, seed: int, tally: Tally) -> dict[str, list[str]]:
    """User ids of each file: a function of ids, numbers of records and seed, not of the order of users.

    Test users are drawn among all. Of the others, those with as many items as an anchor needs may share before all
    else; the rest train the task.

    Raises:
        InputError: too few users for one in each file and `SHARERS` candidates.
    """
    order = sorted(histories, key=lambda user: (derive_seed("timed", seed, user), user))
    tests = min(100, max(1, len(order) // 5)) if sizes.test_users is None else sizes.test_users
    others = sorted(order[tests:], key=lambda user: len(histories[user]) >= MIN_ITEMS)  # stable
    base = max(1, round(len(others) * sizes.base_share))
    candidates = others[base:]
    if len(candidates) < SHARERS:
        raise InputError(
            f"{len(order)} users with at least {sizes.min_items} usable records: too few for {tests} of the test, a "
            f"share of {sizes.base_share:g} of the others as base users, and {SHARERS} candidates who may share. Give "
            "more people's records, or less --min_items, --test_users or --base_share" + _dropped(tally)
        )
    return {"base": others[:base], "candidates": candidates, "test": order[:tests]}


def _dropped(tally: Tally) -> str:
    """What was dropped, at the end of a message."""
    counts = [f"{what}: {number:,}" for what, number in tally.counts.items()]
    return f" ({'; '.join(counts)})" if counts else ""


def sharing(candidates: Sequence[str], histories: Mapping[str, Sequence[Timed]]) -> dict[str, int]:
    """`--min_items` and `--k` of stage 2 for these candidates.

    An anchor has the usual number of items, or fewer where `ENOUGH` candidates do not have as many. Clusters are half
    of those who may be anchors, from `ENOUGH` to the published 50.
    """
    lengths = sorted((len(histories[user]) for user in candidates), reverse=True)
    least = min(MIN_ITEMS, lengths[: ENOUGH][-1])
    able = sum(length >= least for length in lengths)
    return {"min_items": least, "k": min(50, max(able // 2, min(able, ENOUGH)))}


def asked(kind: str, records: int, sizes: Sizes) -> int:
    """Of a user's records, how many are asked: half of a base user's, so that the task has much to learn from."""
    if kind == "candidates":
        return 0
    if kind == "test" and sizes.queries is not None:
        return min(sizes.queries, records - 1)
    return min(MOST, max(1, records // (2 if kind == "base" else 4)))


def as_user(name: str, records: Sequence[Timed], task: Task, queries: int) -> dict[str, Any]:
    """A user as in the files; the last `queries` records are asked."""
    history = records[: len(records) - queries]
    empty = dict.fromkeys(task.fields, "")
    return {
        "user_id": name,
        "profile": [{**empty, "id": r.id, task.source: r.input, task.target: r.target} for r in history],
        "query": [{"id": r.id, "input": task.marker + r.input, "gold": r.target} for r in records[len(history) :]],
    }
