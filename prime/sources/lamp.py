"""Official LaMP files, read piece by piece: `{train,dev}_questions.json` and `{train,dev}_outputs.json`.

Questions are a list of `{"id", "input", "profile": [item, ...]}`, in the time split with a `date` in each item, in some
releases with `user_id`; outputs are `{"task": "LaMP_2", "golds": [{"id", "output"}]}` (Salemi et al., ACL 2024). Ids of
items are made from the question's id and count from 0 in each question, so they tell nothing about whether two
questions show the same item: items are known by their content.

What is read goes to disk, each distinct item and each distinct profile once, so that memory does not hold the texts.
An item's key is 63 bits of a hash of its content: among ten million items, two share one by chance with probability
6e-6.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ijson

from prime.errors import MAX_LINES, InputError
from prime.users.tasks import Task, extract

PARTS = ("train", "dev")  # the test part has no public answers
NAMED = 5  # examples told of what was dropped or doubtful
CACHE_KIB = 128 * 1024  # of the index
UNUSABLE = "items without usable text"

_TASK = re.compile(r"LaMP[_-](?:t_)?(\d)[_-]?([A-Z]?)", re.IGNORECASE)
_DATE = re.compile(r"\d{1,13}(?:[-/.T: ]\d{1,2})*")
_DATE_AT_END = re.compile(r"\bdate: (\d{4}(?:-\d{1,2}){0,2})\s*$")

Item = dict[str, str]  # the task's fields without id, and `date` where the file has one


class Question(NamedTuple):
    """A question as kept in the index; `profile` numbers a distinct profile, `ids` are the items' ids, as JSON."""

    number: int
    part: str
    id: str
    user: str | None
    input: str
    gold: str
    date: str
    profile: int
    ids: str


@dataclass
class Tally:
    """What was read, dropped and doubtful: a count for each name, and the first few cases by name."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, who: str = "") -> None:
        self.counts[what] += 1
        examples = self.named.setdefault(what, []) if who else []
        if len(examples) < NAMED:
            examples.append(who)

    def problem(self, text: str) -> None:
        self.counts["problems"] += 1
        if len(self.problems) < MAX_LINES:
            self.problems.append(text)

    def check(self) -> None:
        """InputError with the problems found so far, if any."""
        more = self.counts["problems"] - len(self.problems)
        if self.problems:
            raise InputError("\n".join([*self.problems, *([f"... and {more} more"] if more else [])]))


# -- files ----------------------------------------------------------------------------------------------------------


class _Counted:
    """A binary file that tells how many bytes were read of it."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], object]):
        self.file, self.progress = file, progress

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.progress(len(data))
        return data


def stream(path: Path, prefix: str, progress: Callable[[int], object] = lambda _: None) -> Iterator[Any]:
    """The values at an ijson prefix (`item`: the elements of a list), one at a time.

    Raises:
        InputError: the file is not there, or not JSON (a wrong address of LaMP's server gives a page of HTML).
    """
    try:
        with open(path, "rb") as file:
            if file.peek(3)[:3] == b"\xef\xbb\xbf":  # a byte order mark
                file.read(3)
            if file.peek(64).lstrip()[:1] == b"<":
                raise InputError(f"{path}: holds HTML or XML, not JSON; the download failed")
            yield from ijson.items(_Counted(file, progress), prefix, use_float=True, buf_size=2**20)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {str(error).splitlines()[0] if str(error) else error!r}") from None


def find_parts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """(questions, outputs) of each part there is, beside each other or, as on LaMP's server, in a folder per part."""
    found = {}
    for part in PARTS:
        for place in (folder, folder / part):
            questions, outputs = place / f"{part}_questions.json", place / f"{part}_outputs.json"
            if not questions.is_file():
                continue
            if not outputs.is_file():
                raise InputError(f"{outputs}: no such file; questions without their answers cannot be used")
            found[part] = (questions, outputs)
            break
    if not found:
        names = " or ".join(f"{part}_questions.json" for part in PARTS)
        raise InputError(f"{folder}: no {names} there, nor in {', '.join(f'{part}/' for part in PARTS)}")
    return found


def check_task(outputs: Path, task: Task) -> None:
    """InputError when the outputs say that they belong to another task."""
    told = next(stream(outputs, "task"), None)
    match = _TASK.fullmatch(told.strip()) if isinstance(told, str) else None
    if match is None:
        return
    number, letter = match[1], match[2].upper()
    if number == "6":
        raise InputError(
            f"{outputs}: {told} (email subjects) is not supported: its texts are the Avocado collection, which LaMP "
            "may not give away"
        )
    if f"LaMP_{number}{letter}" not in (task.lamp, task.lamp[:6]):
        raise InputError(f"{outputs}: answers of {told}, but {task.name} is {task.lamp} (--task_name, --lamp_dir)")


# -- values ---------------------------------------------------------------------------------------------------------


def text_of(value: Any) -> str:
    """A text or number as a text that any file can hold; everything else is the empty text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def id_of(value: Any) -> str:
    """An id, integer or text, as a text; empty where there is none."""
    return "" if isinstance(value, bool | float) else text_of(value).strip()


def id_order(name: str) -> tuple[int, int, str]:
    """Sorts ids as people count: 2 before 10, numbers before words."""
    number = int(name) if name.isascii() and name.isdigit() and len(name) < 19 else -1
    return (number < 0, number, name)


def date_key(value: Any) -> str:
    """A date (`2012-05-03`, a year, a time stamp) as a text that sorts by time; empty where there is none."""
    match = _DATE.match(text_of(value).strip())
    return "-".join(f"{int(digits):013d}" for digits in re.findall(r"\d+", match[0])) if match else ""


def strictly_before(one: str, other: str) -> bool:
    """Whether a date key is surely earlier: a year alone is not before a day of the same year."""
    a, b = one.split("-"), other.split("-")
    known = min(len(a), len(b))
    return bool(one and other) and a[:known] < b[:known]


# -- the index on disk ----------------------------------------------------------------------------------------------

_TABLES = """
CREATE TABLE item (key INTEGER PRIMARY KEY, place INTEGER, size INTEGER);
CREATE TABLE profile (profile INTEGER PRIMARY KEY, print BLOB UNIQUE, size INTEGER);
CREATE TABLE member (profile INTEGER, position INTEGER, item INTEGER, PRIMARY KEY (profile, position)) WITHOUT ROWID;
CREATE TABLE gold (part TEXT, id TEXT, output TEXT, PRIMARY KEY (part, id)) WITHOUT ROWID;
CREATE TABLE question (number INTEGER PRIMARY KEY, part TEXT, id TEXT, user TEXT, input TEXT, gold TEXT, date TEXT,
                       profile INTEGER, ids TEXT, UNIQUE (part, id));
"""


class Spool:
    """What was read: items as lines of a file, where they are and who shows them in an SQLite file beside it.

    Args:
        folder: an empty directory for both; they are as large as the distinct items of the files read.
    """

    def __init__(self, folder: Path):
        self.texts = open(folder / "items.jsonl", "wb+")  # noqa: SIM115 (held as long as the spool)
        self.end = 0
        self.db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KIB}"):
            self.db.execute(f"PRAGMA {pragma}")
        self.db.executescript(_TABLES)
        self.db.execute("BEGIN")

    def close(self) -> None:
        self.db.close()
        self.texts.close()

    def rows(self, query: str, *values: Any) -> Iterator[Any]:
        return self.db.execute(query, values)

    def add_profile(self, items: list[tuple[int, Item]]) -> int:
        """The number of a profile, given its items and their keys in the file's order; new ones are kept."""
        keys = [key for key, _ in items]
        mark = hashlib.blake2b(struct.pack(f"{len(keys)}q", *keys), digest_size=16).digest()
        for (number,) in self.rows("SELECT profile FROM profile WHERE print = ?", mark):
            return number
        for key, item in items:
            self._add_item(key, item)
        number = self.db.execute("INSERT INTO profile (print, size) VALUES (?, ?)", (mark, len(keys))).lastrowid or 0
        members = ((number, position, key) for position, key in enumerate(keys))
        self.db.executemany("INSERT INTO member VALUES (?, ?, ?)", members)
        return number

    def _add_item(self, key: int, item: Item) -> None:
        line = json.dumps(item, ensure_ascii=False).encode()
        if self.db.execute("INSERT OR IGNORE INTO item VALUES (?, ?, ?)", (key, self.end, len(line))).rowcount:
            self.texts.write(line + b"\n")
            self.end += len(line) + 1

    def members(self, profile: int) -> list[int]:
        """Keys of a profile's items, in the file's order."""
        return [key for (key,) in self.rows("SELECT item FROM member WHERE profile = ? ORDER BY position", profile)]

    def item(self, key: int) -> Item:
        """A new copy of an item."""
        ((place, size),) = self.rows("SELECT place, size FROM item WHERE key = ?", key)
        return json.loads(os.pread(self.texts.fileno(), size, place))

    def questions(self, numbers: Iterable[int]) -> list[Question]:
        return [Question(*row) for n in numbers for row in self.rows("SELECT * FROM question WHERE number = ?", n)]


# -- reading --------------------------------------------------------------------------------------------------------


class Reader:
    """Reads the parts of one task into a spool, and counts what it meets.

    Items need the field that a question would show and, but for citation (see `prime.sources.prepare`), the one that is
    learned; texts of white space alone count as none.
    """

    def __init__(self, task: Task, spool: Spool):
        self.task, self.spool, self.tally = task, spool, Tally()
        learned = {task.target} if task.query_parts == 1 else set()
        self.needed = tuple(learned | ({task.source} - {""}))
        self.names = tuple(name for name in task.fields if name != "id")
        self.seen_fields: tuple[str, ...] = ()  # of the first item that could not be used
        self.heads: dict[str, tuple] = {}  # part -> (order, words up to the text) of its first question by id

    def read(self, part: str, questions: Path, outputs: Path, progress: Callable[[int], object]) -> None:
        """Both files of a part.

        Raises:
            InputError: a file that is no LaMP file of this task, or all that is wrong with the questions.
        """
        check_task(outputs, self.task)
        self._read_golds(part, outputs)
        before = self.tally.counts.copy()
        for position, row in enumerate(stream(questions, "item", progress)):
            self.tally.add("questions read")
            self._question(part, row, f"{questions}: question at position {position}")
        self.spool.texts.flush()
        self.tally.check()
        read = self.tally.counts["questions read"] - before["questions read"]
        unmarked = self.tally.counts["questions without their marker"] - before["questions without their marker"]
        if not read:
            raise InputError(f"{questions}: no question there; a list of objects is expected")
        if unmarked > max(1, read / 2):
            wanted = f"'{self.task.marker.strip()}'" if self.task.marker else "a title and two options"
            told = f"{unmarked} of {read} questions do not hold {wanted}"
            raise InputError(f"{questions}: {told}; is it {self.task.name}?")

    def _read_golds(self, part: str, outputs: Path) -> None:
        rows = 0
        for rows, row in enumerate(stream(outputs, "golds.item"), 1):
            name = id_of(row.get("id")) if isinstance(row, dict) else ""
            if not name:
                self.tally.problem(f"{outputs}: answer at position {rows - 1}: no 'id' that is an integer or a text")
                continue
            given = (part, name, text_of(row.get("output")).strip())
            if not self.spool.db.execute("INSERT OR IGNORE INTO gold VALUES (?, ?, ?)", given).rowcount:
                ((known,),) = self.spool.rows("SELECT output FROM gold WHERE part = ? AND id = ?", part, name)
                if known != given[2]:
                    self.tally.problem(f"{outputs}: id {name} is answered by {known!r} and by {given[2]!r}")
        if not rows:
            raise InputError(f"{outputs}: no answers there; an object with a list under 'golds' is expected")

    def _question(self, part: str, row: Any, where: str) -> None:
        if not isinstance(row, dict):
            return self.tally.problem(f"{where}: expected an object")
        name, text, profile = id_of(row.get("id")), row.get("input"), row.get("profile")
        if not name:
            return self.tally.problem(f"{where}: no 'id' that is an integer or a text")
        if not isinstance(text, str):
            return self.tally.problem(f"{where}: id {name}: field 'input' is no text")
        if not isinstance(profile, list):
            return self.tally.problem(f"{where}: id {name}: field 'profile' is no list")
        items, ids = self._profile(profile)
        number = self.spool.add_profile(items)
        text = self._asked(part, name, text_of(text))
        gold = next((output for (output,) in self.spool.rows(
            "SELECT output FROM gold WHERE part = ? AND id = ?", part, name)), None)  # fmt: skip
        if text and gold:
            dates = _DATE_AT_END.search(text)
            date = date_key(row.get("date")) or (date_key(dates[1]) if dates else "")
            user = id_of(row.get("user_id")) or None
            self._keep((part, name, user, text, gold, date, number, json.dumps(ids)), where)
        elif text:
            self.tally.add("questions without an answer", f"{part} {name}")
        return None

    def _keep(self, values: tuple, where: str) -> None:
        db = self.spool.db
        if db.execute(f"INSERT OR IGNORE INTO question VALUES (NULL{', ?' * 8})", values).rowcount:
            return
        part, name, _, text, _, _, profile, _ = values
        ((old_text, old_profile),) = db.execute(
            "SELECT input, profile FROM question WHERE part = ? AND id = ?", (part, name)
        )
        if (old_text, old_profile) == (text, profile):
            self.tally.add("questions repeated word for word", f"{part} {name}")
        else:
            self.tally.problem(f"{where}: id {name} is taken by another question of the file")

    def _profile(self, rows: list[Any]) -> tuple[list[tuple[int, Item]], list[str]]:
        """Usable items with their keys, each once, and their ids as the file has them."""
        items: dict[int, Item] = {}
        ids = []
        for row in rows:
            self.tally.add("items read")
            item = self._item(row)
            if item is None:
                self.tally.add(UNUSABLE)
                continue
            key = item_key(item)
            if key in items:
                self.tally.add("items repeated in a profile")
                continue
            items[key] = item
            ids.append(id_of(row.get("id")))
            self.tally.counts["items with a date"] += "date" in item
        return list(items.items()), ids

    def _item(self, row: Any) -> Item | None:
        if not isinstance(row, dict):
            return None
        item = {name: text_of(row[name]) for name in self.names if name in row}
        if not all(item.get(name, "").strip() for name in self.needed):
            self.seen_fields = self.seen_fields or tuple(row)
            return None
        if date_key(row.get("date")):
            item["date"] = text_of(row["date"])
        return item

    def _asked(self, part: str, name: str, text: str) -> str:
        """The input, "" where it cannot be used.

        A text without its marker is taken whole, as everywhere in the toolkit, and put behind a marker when it is
        written (`marked`).
        """
        parts = extract(self.task, text)
        if parts is None:
            self.tally.add("questions without their marker", f"{part} {name}")
            usable = self.task.query_parts == 1 and text.strip()
            return text if usable else ""
        if not all(own.strip() for own in parts):
            self.tally.add("questions without text", f"{part} {name}")
            return ""
        head = (id_order(name), text[: len(text) - len(parts[-1])])
        self.heads[part] = min(head, self.heads.get(part, head))
        return text

    def marked(self, question: Question) -> str:
        """The question's input, with its marker."""
        if extract(self.task, question.input) is not None:
            return question.input
        _, head = self.heads.get(question.part, ((), self.task.marker))
        return head + question.input


def item_key(item: Item) -> int:
    """63 bits of a hash of the content."""
    text = "\x1f".join(f"{name}\x1e{value}" for name, value in sorted(item.items()))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
