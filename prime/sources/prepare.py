"""Official LaMP files to the files of data/README.md: who goes where, what is written, and the report of it.

Reading is in `lamp.py`, telling people apart in `gather.py`, their histories in `histories.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prime.errors import InputError, harmless
from prime.runs.files import flush, make_folder, uninterrupted, write_json
from prime.runs.locks import claim
from prime.seeds import derive_seed
from prime.sources.gather import OVERLAP, gather, question_names
from prime.sources.histories import Citations, Histories
from prime.sources.lamp import UNUSABLE, Reader, Spool, Tally, find_parts
from prime.users.data import BASE_FILE, CANDIDATE_FILE, LABEL_FILE, PREPARING, TEST_FILE
from prime.users.tasks import Task

FILES = {
    "base": BASE_FILE,
    "candidates": CANDIDATE_FILE,
    "reserve": "user_reserve_10_percent.json",
    "test": TEST_FILE,
}
REPORT = "prepare_report.json"
WORK = PREPARING  # folder of a conversion under way, within the output's
# The test users and the reserve's tenth are the Per-Pcs authors' choice, the other shares ours.
TEST_USERS, BASE_SHARE, RESERVE_SHARE = 100, 0.4, 0.1

Bar = Callable[[int, str, str], AbstractContextManager[Any]]  # (total, what, unit), with update(n): `prime.cli.bar`


# -- who goes where -------------------------------------------------------------------------------------------------


class Stored:
    """Users made so far, as lines of a file: (id, history items, place, bytes) of each stay in memory."""

    def __init__(self, path: Path):
        self.file = open(path, "wb+")  # noqa: SIM115 (held as long as the object)
        self.index: dict[str, tuple[int, int, int]] = {}
        self.end = 0

    def add(self, user: dict[str, Any]) -> None:
        line = json.dumps(user, ensure_ascii=False).encode()
        self.file.write(line)
        self.index[user["user_id"]] = (len(user["profile"]), self.end, len(line))
        self.end += len(line)

    def close(self) -> None:
        self.file.close()

    def read(self, user_id: str) -> dict[str, Any]:
        self.file.flush()
        _, place, size = self.index[user_id]
        return json.loads(os.pread(self.file.fileno(), size, place))


@dataclass(frozen=True)
class Shares:
    """Sizes of the files: users of the test, shares of the others in base and reserve (the rest: candidates)."""

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
        "base": others[:base], "candidates": others[base + reserve :],
        "reserve": others[base : base + reserve], "test": test,
    }  # fmt: skip


# -- files and report -----------------------------------------------------------------------------------------------


def write_users(path: Path, users: Iterable[dict[str, Any]], task: Task) -> dict[str, Any]:
    """A file of users, one per line, and what the report says of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths: list[int] = []
    queries = words = 0
    with open(path, "w", encoding="utf-8") as file:
        for user in users:
            file.write((",\n" if lengths else "[\n") + json.dumps(user, ensure_ascii=False))
            lengths.append(len(user["profile"]))
            queries += len(user["query"])
            words += sum(len(item.get(name, "").split()) for item in user["profile"] for name in task.fields[1:])
        file.write("\n]\n" if lengths else "[]\n")
    flush(path)
    items = sum(lengths)
    return {
        "users": len(lengths), "items": items, "queries": queries,
        "items_per_user": {
            "min": min(lengths, default=0), "median": statistics.median(lengths or [0]), "max": max(lengths, default=0)
        },
        "words_per_item": round(words / items, 1) if items else 0.0,
    }  # fmt: skip


def report_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The table of the report: header and a row per file."""
    rows = [["file", "users", "items", "queries", "items per user: min", "median", "max", "words per item"]]
    for name, found in report["files"].items():
        lengths = found["items_per_user"]
        cells = [found["users"], found["items"], found["queries"], lengths["min"], lengths["median"], lengths["max"]]
        rows.append([name, *(f"{cell:g}" if isinstance(cell, float) else f"{cell:,}" for cell in cells)])
        rows[-1].append(f"{found['words_per_item']:.1f}")
    return rows


def report_notes(report: Mapping[str, Any]) -> str:
    """What was read, gathered, dropped and doubtful, a line each."""
    lines = [f"{report['split']} split, {report['people']:,} people"]
    lines += [f"questions gathered {how}: {number:,}" for how, number in report["gathered"].items()]
    for what, number in report["counts"].items():
        named = report["named"].get(what, [])
        more = ", ..." if number > len(named) else ""
        lines.append(f"{what}: {number:,}" + (f" ({', '.join(named)}{more})" if named else ""))
    return harmless("\n".join(lines))


# -- the whole conversion -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the files depend on, beside what is read."""

    split: str = "auto"
    shares: Shares = Shares()
    min_items: int = 1
    overlap: float = OVERLAP
    seed: int = 0


def prepare(
    task: Task, source: Path, target: Path, options: Options, cited: Mapping[str, str], bar: Bar
) -> dict[str, Any]:
    """Make the files of `target` from the official ones in `source`; the report, which is written last.

    Args:
        cited: citation only: title -> cited title, beside what LaMP tells.

    Raises:
        InputError: wrong input, or a target that holds other people's files; nothing is changed then.
    """
    with claim(target / f"{WORK}.lock") as mine:
        if not mine:
            raise InputError(f"{target}: another prepare_data.py is at it")
        if (target / WORK / REPORT).exists():
            _publish(target / WORK, target)  # an earlier run was cut off at that
        parts = find_parts(source)
        folder = _workplace(target)
        try:
            report = _convert(task, parts, folder, options, cited, bar)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, sqlite3.OperationalError):
                raise InputError(f"{folder}: {error}; it needs as much room as the files it reads") from None
            raise
        _publish(folder, target)
    return report


def _publish(folder: Path, target: Path) -> None:
    """Put the finished files in place: labels after users, the report last.

    A signal waits. After a crash `folder` still holds the report, so that no stage reads old and new files together
    (`prime.users.data.load_users`), and the next conversion goes on here.
    """
    with uninterrupted():
        for name in (*FILES.values(), LABEL_FILE, REPORT):
            if (folder / name).exists():  # not placed before a crash
                make_folder((target / name).parent)
                os.replace(folder / name, target / name)
                flush((target / name).parent)
        shutil.rmtree(folder)


def _workplace(target: Path) -> Path:
    """An empty folder within `target`; a conversion that was cut off there is begun anew."""
    folder = target / WORK
    foreign = [name for name in FILES.values() if (target / name).exists()]
    if foreign and not (target / REPORT).exists() and not folder.exists():
        told = f"{target / foreign[0]}: there already, and not made by prepare_data.py"
        raise InputError(f"{told}; use another --output_dir")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _convert(
    task: Task, parts: Mapping[str, tuple[Path, Path]], folder: Path, options: Options, cited: Mapping[str, str],
    bar: Bar,
) -> dict[str, Any]:  # fmt: skip
    """All files within `folder`, synced to disk."""
    sizes = {str(path): path.stat().st_size for pair in parts.values() for path in pair}
    with closing(Spool(folder)) as spool, closing(Stored(folder / "users.jsonl")) as users:
        reader = Reader(task, spool)
        with bar(sum(path.stat().st_size for path, _ in parts.values()), "reading", "B") as read:
            for part, (questions, outputs) in parts.items():
                reader.read(part, questions, outputs, read.update)
        histories, about = _make_users(reader, users, options, Citations(cited) if task.query_parts > 1 else None, bar)
        chosen = share_out({user_id: entry[0] for user_id, entry in users.index.items()}, options.shares, options.seed)
        files = {}
        for which, name in FILES.items():
            made = (histories.finished(users.read(user_id), chosen["test"]) for user_id in chosen[which])
            files[name] = write_users(folder / name, made, task)
        golds = [
            {"id": query["id"], "output": query["gold"]}
            for user_id in chosen["test"]
            for query in users.read(user_id)["query"]
        ]
    write_json(folder / LABEL_FILE, {"task": task.lamp, "golds": golds})
    counts = {what: number for what, number in reader.tally.counts.items() if number}
    report = {"task": task.name, **about, "files": files, "counts": counts, "named": reader.tally.named}
    report |= {"options": asdict(options), "read": sizes}
    write_json(folder / REPORT, report)
    return report


def _make_users(
    reader: Reader, users: Stored, options: Options, citations: Citations | None, bar: Bar
) -> tuple[Histories, dict[str, Any]]:
    """Store everybody with a history; for the report, the split and how questions were gathered."""
    by_time = ordered_by_time(options.split, reader.tally)
    names = question_names(reader.spool)
    people, gathered = gather(reader.spool, names, options.overlap)
    if citations is not None:
        for person in people:
            for question in reader.spool.questions(person.questions):
                citations.add_question(person.user_id, reader.task, question)
    histories = Histories(reader, names, by_time, citations)
    with bar(len(people), "users", "user") as made:
        for person in people:
            user = histories.user(person)
            if len(user["profile"]) >= options.min_items:
                users.add(user)
            else:
                reader.tally.add("users with fewer than --min_items items", person.user_id)
            made.update(1)
    if not users.index:
        raise InputError(nobody(reader))
    return histories, {"split": "time" if by_time else "user", "people": len(people), "gathered": dict(+gathered)}


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
