"""What every conversion to the files of data/README.md has in common: the files, putting them in place, the report."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prime.errors import MAX_LINES, InputError, harmless
from prime.runs.files import flush, make_folder, uninterrupted
from prime.runs.locks import claim
from prime.users.data import BASE_FILE, CANDIDATE_FILE, LABEL_FILE, PREPARING, TEST_FILE
from prime.users.task import Task

FILES = {
    "base": BASE_FILE,
    "candidates": CANDIDATE_FILE,
    "reserve": "user_reserve_10_percent.json",
    "test": TEST_FILE,
}
TASK_FILE = "task.json"  # of a task that is made with its data
REPORT = "prepare_report.json"
EXAMPLES = 5  # cases named of what was dropped or is doubtful


# -- what was met ---------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What was read, dropped and doubtful: the number of cases of each kind, and the first few of them by name."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, kind: str, case: str = "") -> None:
        self.counts[kind] += 1
        examples = self.named.setdefault(kind, []) if case else []
        if len(examples) < EXAMPLES:
            examples.append(case)

    def problem(self, text: str) -> None:
        self.counts["problems"] += 1
        if len(self.problems) < MAX_LINES:
            self.problems.append(text)

    def check(self) -> None:
        """InputError with the problems so far, if there are any."""
        more = self.counts["problems"] - len(self.problems)
        if self.problems:
            raise InputError("\n".join([*self.problems, *([f"... and {more} more"] if more else [])]))


# -- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def placing(target: Path) -> Iterator[Path]:
    """An empty folder to make the files in; they are put in place at the end of the block, or on an error removed.

    Raises:
        InputError: `target` holds files of another origin, or somebody else is at it; nothing is changed then.
    """
    with claim(target / f"{PREPARING}.lock") as mine:
        if not mine:
            raise InputError(f"{target}: another prepare_data.py is at it")
        if (target / PREPARING / REPORT).exists():
            _publish(target / PREPARING, target)  # an earlier run was cut off at that
        folder = _workplace(target)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _publish(folder, target)


def _publish(folder: Path, target: Path) -> None:
    """Put the finished files in place: labels after users, the report last.

    A signal waits. After a crash `folder` still holds the report, so that no stage reads old and new files together
    (`prime.users.data.load_users`), and the next conversion goes on here.
    """
    with uninterrupted():
        for name in (*FILES.values(), LABEL_FILE, TASK_FILE, REPORT):
            if (folder / name).exists():  # not placed before a crash
                make_folder((target / name).parent)
                os.replace(folder / name, target / name)
                flush((target / name).parent)
        shutil.rmtree(folder)


def _workplace(target: Path) -> Path:
    """An empty folder within `target`; a conversion that was cut off there is begun anew."""
    folder = target / PREPARING
    foreign = [target / name for name in FILES.values() if (target / name).exists()]
    if foreign and not (target / REPORT).exists() and not folder.exists():
        raise InputError(f"{foreign[0]}: there already, and not made by prepare_data.py; use another --output_dir")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_users(path: Path, users: Iterable[dict[str, Any]], task: Task) -> dict[str, Any]:
    """Write a file of users, one per line; what the report says of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths: list[int] = []
    queries = words = 0
    with open(path, "w", encoding="utf-8") as file:
        for user in users:
            file.write((",\n" if lengths else "[\n") + json.dumps(user, ensure_ascii=False))
            lengths.append(len(user["profile"]))
            queries += len(user["query"])
            words += sum(_words(item, task) for item in user["profile"])
        file.write("\n]\n" if lengths else "[]\n")
    flush(path)
    items = sum(lengths)
    return {
        "users": len(lengths),
        "items": items,
        "queries": queries,
        "items_per_user": {
            "min": min(lengths, default=0),
            "median": statistics.median(lengths or [0]),
            "max": max(lengths, default=0),
        },
        "words_per_item": round(words / items, 1) if items else 0.0,
    }


def _words(item: Mapping[str, str], task: Task) -> int:
    """Words of an item's texts."""
    return sum(len(item.get(name, "").split()) for name in task.fields if name != "id")


# -- the report -----------------------------------------------------------------------------------------------------


def report_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The table of the report: header and a row per file."""
    rows = [["file", "users", "items", "queries", "items per user: min", "median", "max", "words per item"]]
    for name, counts in report["files"].items():
        lengths = counts["items_per_user"]
        numbers = [counts["users"], counts["items"], counts["queries"], *lengths.values()]
        cells = [f"{number:g}" if isinstance(number, float) else f"{number:,}" for number in numbers]
        rows.append([name, *cells, f"{counts['words_per_item']:.1f}"])
    return rows


def report_notes(report: Mapping[str, Any]) -> str:
    """What was read, gathered, dropped and doubtful, a line each."""
    lines = [f"{report['split']} split, {report['people']:,} people"]
    lines += [f"questions gathered {reason}: {number:,}" for reason, number in report["gathered"].items()]
    for kind, number in report["counts"].items():
        examples = report["named"].get(kind, [])
        more = ", ..." if number > len(examples) else ""
        lines.append(f"{kind}: {number:,}" + (f" ({', '.join(examples)}{more})" if examples else ""))
    return harmless("\n".join(lines))


def free_name(name: str, taken: set[str]) -> str:
    """`name`, with a number behind it if it is taken; taken from now on."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    taken.add(free)
    return free
