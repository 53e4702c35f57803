"""What is kept on disk during a conversion, so that memory does not hold the texts: items and questions, then users.

Each distinct item and each distinct profile is kept once. Items are known by their content, because ids tell nothing:
LaMP makes an item's id from the question's id and counts from 0 in each question. The key of an item is 63 bits of a
hash of its content: among ten million items, two share one by chance with probability 6e-6.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CACHE_KIB = 128 * 1024  # of the index

Item = dict[str, str]  # the task's fields without id, and `date` where the file has one


class Question(NamedTuple):
    """A question as it is kept; `profile` is the number of a distinct profile."""

    number: int  # 0: not kept yet
    part: str
    id: str
    user: str | None
    input: str
    gold: str
    date: str
    profile: int
    ids: str  # of the profile's items in this question, as a JSON list


def item_key(item: Item) -> int:
    """63 bits of a hash of the content."""
    text = "\x1f".join(f"{name}\x1e{value}" for name, value in sorted(item.items()))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


_TABLES = """
CREATE TABLE item (key INTEGER PRIMARY KEY, place INTEGER, size INTEGER);
CREATE TABLE profile (profile INTEGER PRIMARY KEY, print BLOB UNIQUE, size INTEGER);
CREATE TABLE member (profile INTEGER, position INTEGER, item INTEGER, PRIMARY KEY (profile, position)) WITHOUT ROWID;
CREATE TABLE gold (part TEXT, id TEXT, output TEXT, PRIMARY KEY (part, id)) WITHOUT ROWID;
CREATE TABLE question (number INTEGER PRIMARY KEY, part TEXT, id TEXT, user TEXT, input TEXT, gold TEXT, date TEXT,
                       profile INTEGER, ids TEXT, UNIQUE (part, id));
"""


class Spool:
    """What was read: items are lines of a file; an SQLite file beside it says where they are and who shows them.

    Args:
        folder: an empty directory for both files, which are as large as the distinct items that are read.
    """

    def __init__(self, folder: Path):
        self.texts = open(folder / "items.jsonl", "wb+")  # noqa: SIM115 (held as long as the spool)
        self.end = 0
        self.db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
        # A conversion that is cut off starts anew, so nothing has to survive a crash.
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KIB}"):
            self.db.execute(f"PRAGMA {pragma}")
        self.db.executescript(_TABLES)
        self.db.execute("BEGIN")

    def close(self) -> None:
        self.db.close()
        self.texts.close()

    def rows(self, query: str, *values: Any) -> Iterator[Any]:
        return self.db.execute(query, values)

    def insert(self, table: str, *values: Any) -> bool:
        """Add a row; False where the table has one of the same key, which stays."""
        marks = ", ".join("?" * len(values))
        return bool(self.db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", values).rowcount)

    def add_profile(self, items: list[tuple[int, Item]]) -> int:
        """The number of a profile, given its items with their keys in the file's order. A new profile is kept."""
        keys = [key for key, _ in items]
        digest = hashlib.blake2b(struct.pack(f"{len(keys)}q", *keys), digest_size=16).digest()
        for (number,) in self.rows("SELECT profile FROM profile WHERE print = ?", digest):
            return number
        for key, item in items:
            self._add_item(key, item)
        number = self.db.execute("INSERT INTO profile (print, size) VALUES (?, ?)", (digest, len(keys))).lastrowid or 0
        members = ((number, position, key) for position, key in enumerate(keys))
        self.db.executemany("INSERT INTO member VALUES (?, ?, ?)", members)
        return number

    def _add_item(self, key: int, item: Item) -> None:
        line = json.dumps(item, ensure_ascii=False).encode()
        if self.insert("item", key, self.end, len(line)):
            self.texts.write(line + b"\n")
            self.end += len(line) + 1

    def gold(self, part: str, question_id: str) -> str | None:
        """The answer to a question, None where the outputs have none."""
        for (output,) in self.rows("SELECT output FROM gold WHERE part = ? AND id = ?", part, question_id):
            return output
        return None

    def members(self, profile: int) -> list[int]:
        """Keys of a profile's items, in the file's order."""
        return [key for (key,) in self.rows("SELECT item FROM member WHERE profile = ? ORDER BY position", profile)]

    def item(self, key: int) -> Item:
        """A new copy of an item."""
        ((place, size),) = self.rows("SELECT place, size FROM item WHERE key = ?", key)
        return json.loads(os.pread(self.texts.fileno(), size, place))

    def add_question(self, question: Question) -> bool:
        """Keep a question under the next number; False where its part has one of this id, which stays."""
        return self.insert("question", None, *question[1:])

    def questions(self, numbers: Iterable[int]) -> list[Question]:
        questions = []
        for number in numbers:
            (row,) = self.rows("SELECT * FROM question WHERE number = ?", number)
            questions.append(Question(*row))
        return questions


class StoredUsers:
    """Users made so far, as lines of a file; of each only the length of the history and the place stay in memory."""

    def __init__(self, path: Path):
        self.file = open(path, "wb+")  # noqa: SIM115 (held as long as the object)
        self.lengths: dict[str, int] = {}  # history items, by user id
        self._places: dict[str, tuple[int, int]] = {}  # first byte and number of bytes
        self._end = 0

    def close(self) -> None:
        self.file.close()

    def add(self, user: dict[str, Any]) -> None:
        line = json.dumps(user, ensure_ascii=False).encode()
        self.file.write(line)
        self.lengths[user["user_id"]] = len(user["profile"])
        self._places[user["user_id"]] = (self._end, len(line))
        self._end += len(line)

    def read(self, user_id: str) -> dict[str, Any]:
        """A new copy of a user."""
        self.file.flush()
        place, size = self._places[user_id]
        return json.loads(os.pread(self.file.fileno(), size, place))
