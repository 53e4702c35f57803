"""Users, their histories and queries: loads and checks the files described in data/README.md.

Everything is checked once, here. All problems of a file are reported together, with file, user, item and field.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from prime.errors import InputError, harmless
from prime.runs.files import json_type, read_json
from prime.users.task import Task, extract

# The largest file of users, labels or profiles that is read. LaMP's, as processed, stay below 1 GB; parsed, JSON takes
# five to twenty times its size in memory.
DATA_BYTES = 2 << 30

# Names of a task's files within its folder, as the Per-Pcs authors chose them; data/README.md has their schema.
BASE_FILE = "user_base_LLM.json"
CANDIDATE_FILE = "user_anchor_candidate.json"
TEST_FILE = "test_100/user_test_100.json"
LABEL_FILE = "test_100/user_test_100_label.json"
PROFILE_FILE = "profile-id2text.json"
PUBLISHED_PROFILE_FILE = "profile-id2text-gpt-4o-mini.json"  # as the published task stage names it

# The folder that prepare_data.py works in, within a task's folder. Once the report is in it, files are being placed.
PREPARING = ".prepare"


PUBLISHED_WORDS = 768  # published cut of a history item's fields, and of the articles that train the task adapter


def spaced(text: str, words: int | None = None) -> str:
    """The first `words` words (None: all), with single spaces between them."""
    return " ".join(text.split()[:words])


def first_words(text: str, words: int) -> str:
    """The first `words` words, with the spaces, line breaks and indents between them."""
    beyond = next(islice(re.finditer(r"\S+", text), words, None), None)
    return text[: beyond.start()].rstrip() if beyond else text


@dataclass(frozen=True)
class Query:
    """One test question; `gold` is None where the file has no answer to it."""

    id: str
    input: str
    gold: str | None


@dataclass(frozen=True)
class User:
    """One user; `profile` is the history, oldest first; an item has exactly the task's fields, as strings."""

    user_id: str
    profile: tuple[Mapping[str, str], ...]
    queries: tuple[Query, ...] = ()

    def recent(self, k: int) -> tuple[Mapping[str, str], ...]:
        """The last `k` items of the history (0: all), oldest first."""
        if k < 0:
            raise ValueError(f"recent_k is {k}, expected 0 (all) or more")
        return self.profile[-k:]  # [-0:] is everything


def load_users(path: Path | str, task: Task, *, need_queries: bool = False, need_golds: bool = False) -> list[User]:
    """All users of a file (`user_base_LLM.json`, `user_anchor_candidate.json`, `user_test_100.json`).

    Args:
        need_queries: each user must have the key `query`, and in citation each input a title and two options.
        need_golds: each query must have its gold answer (training).

    Raises:
        InputError: no such file, or all that is wrong with it.
    """
    _check_there(Path(path), task)
    rows = read_json(path, DATA_BYTES)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of users, found {json_type(rows)}")
    if not rows:
        raise InputError(f"{path}: holds no users")
    checker = _Checker(str(path), task, need_queries, need_golds)
    users = [checker.user(row, position) for position, row in enumerate(rows)]
    if checker.problems:
        raise InputError.many(checker.problems)
    checker.warn()
    return [user for user in users if user is not None]


def load_profiles(path: Path | str) -> dict[str, str]:
    """`profile-id2text.json`: the textual profile of each user, by user id."""
    rows = read_json(path, DATA_BYTES)
    if not isinstance(rows, dict):
        raise InputError(f"{path}: expected an object of user id to text, found {json_type(rows)}")
    problems: list[str] = []
    texts = {user_id: _text(text, f"{path}: user {user_id}: the text", problems) for user_id, text in rows.items()}
    if problems:
        raise InputError.many(problems)
    return texts


def load_labels(path: Path | str) -> dict[str, str]:
    """`user_test_100_label.json`: the gold answer of each query, by query id."""
    if not Path(path).exists():
        raise InputError(f"{path}: no such file; prepare_data.py makes it together with the users of the test")
    data = read_json(path, DATA_BYTES)
    rows = data.get("golds") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected an object with a list under 'golds'")
    problems: list[str] = []
    golds: dict[str, str] = {}
    for position, row in enumerate(rows):
        where = f"{path}: gold {position}"
        if not isinstance(row, dict):
            problems.append(f"{where}: expected an object, found {json_type(row)}")
            continue
        query_id, gold = _field(row, "id", where, problems), _field(row, "output", where, problems)
        if query_id in golds and golds[query_id] != gold:
            problems.append(f"{where}: id {query_id} was given before with another output")
        golds[query_id] = gold
    if problems:
        raise InputError.many(problems)
    return golds


def _check_there(path: Path, task: Task) -> None:
    """InputError for a file of users that is not there, which names where it is instead or the command that makes it.

    Also for a file in a folder that prepare_data.py was changing when it was stopped, where old and new files may lie
    together.
    """
    folder = path.parent.parent if path.parent.name == "test_100" else path.parent
    if (folder / PREPARING / "prepare_report.json").exists():
        raise InputError(f"{path}: prepare_data.py was stopped while it placed the files of this folder; run it again")
    if path.exists():
        return
    if (folder / task.name / path.relative_to(folder)).exists():
        raise InputError(f"{path}: no such file; give --data_dir {folder / task.name}, where there is one")
    if task.lamp == task.name:
        raise InputError(f"{path}: no such file; prepare_data.py --table makes it of a table (docs/data.md)")
    command = f"python prepare_data.py --task_name {task.name} --lamp_dir DIR --output_dir {folder}"
    raise InputError(f"{path}: no such file; from the official LaMP files this makes it: {command}")


def select(users: Sequence[User], spec: str | None) -> list[User]:
    """The users named by `--user_idxs`: see `select_indices`."""
    return [users[i] for i in select_indices(spec, len(users))]


def select_indices(spec: str | None, n: int) -> list[int]:
    """Positions named by '0-100,7', in the order written, each once; None is all.

    Ranges are half open ('0-100' is the first hundred) and end at `n`.
    """
    if spec is None:
        return list(range(n))
    chosen: dict[int, None] = {}
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_index(first) or (dash and not _is_index(last)):
            raise InputError(f"--user_idxs '{spec}': '{part}' is no index like 7 and no range like 0-100")
        start, stop = int(first), int(last) if dash else int(first) + 1
        if stop <= start:
            raise InputError(f"--user_idxs '{spec}': the range '{part}' is empty (its end is not included)")
        if start >= n:
            raise InputError(f"--user_idxs '{spec}': '{part}' is out of range, the file holds {n} users")
        chosen.update(dict.fromkeys(range(start, min(stop, n))))
    return list(chosen)


class _Checker:
    """Turns the rows of one file into users and collects what is wrong with them."""

    def __init__(self, path: str, task: Task, need_queries: bool, need_golds: bool):
        self.path, self.task, self.need_queries, self.need_golds = path, task, need_queries, need_golds
        self.problems: list[str] = []
        self.unmarked: list[str] = []  # queries without the task's marker
        self.repeated: list[str] = []  # items whose id an earlier one of the same user has
        self.positions: dict[str, int] = {}  # of users, by id

    def user(self, row: Any, position: int) -> User | None:
        nameless = f"{self.path}: user at position {position}"
        if not isinstance(row, dict):
            self.problems.append(f"{nameless}: expected an object, found {json_type(row)}")
            return None
        user_id = self._user_id(row, position, nameless)
        where = f"{self.path}: user {user_id}" if user_id else nameless
        items = self._list(row, "profile", where, required=True)
        queries = self._list(row, "query", where, required=self.need_queries)
        profile = [self._item(item, f"{where}: item {i}") for i, item in enumerate(items)]
        checked = [self._query(query, f"{where}: query {i}", user_id) for i, query in enumerate(queries)]
        usable = tuple(query for query in checked if query)
        for query_id in _repeated(query.id for query in usable):
            self.problems.append(f"{where}: query id {query_id} is used more than once")
        item_ids = (item["id"] for item in profile if "id" in item)
        self.repeated += [f"user {user_id} item id {item_id}" for item_id in _repeated(item_ids)]
        return User(user_id, tuple(profile), usable)

    def _user_id(self, row: dict[str, Any], position: int, where: str) -> str:
        value = row.get("user_id")
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            state = "is empty" if isinstance(value, str) else f"is {json_type(value)}"
            if "user_id" not in row:
                state = "is missing"
            self.problems.append(f"{where}: field 'user_id' {state}, expected an integer or a text")
            return ""
        user_id = _text(value, f"{where}: field 'user_id'", self.problems)
        first = self.positions.setdefault(user_id, position)
        if first != position:
            self.problems.append(f"{where}: user_id {user_id} is taken by the user at position {first}")
        return user_id

    def _list(self, row: dict[str, Any], name: str, where: str, required: bool) -> list[Any]:
        if name not in row:
            if required:
                self.problems.append(f"{where}: field '{name}' is missing")
            return []
        value = row[name]
        if isinstance(value, list):
            return value
        self.problems.append(f"{where}: field '{name}' is {json_type(value)}, expected a list")
        return []

    def _item(self, item: Any, where: str) -> dict[str, str]:
        if not isinstance(item, dict):
            self.problems.append(f"{where}: expected an object, found {json_type(item)}")
            return {}
        fields = {name: _field(item, name, where, self.problems) for name in self.task.fields}
        if not self.task.published_texts:
            return fields
        return {name: text if name == "id" else spaced(text, PUBLISHED_WORDS) for name, text in fields.items()}

    def _query(self, query: Any, where: str, user_id: str) -> Query | None:
        if not isinstance(query, dict):
            self.problems.append(f"{where}: expected an object, found {json_type(query)}")
            return None
        before = len(self.problems)
        query_id, text = _field(query, "id", where, self.problems), _field(query, "input", where, self.problems)
        gold = _field(query, "gold", where, self.problems) if self.need_golds or "gold" in query else None
        if len(self.problems) > before:
            return None
        if self.need_queries and extract(self.task, text) is None:
            self._unextractable(where, user_id, query_id)
        return Query(query_id, text, gold)

    def _unextractable(self, where: str, user_id: str, query_id: str) -> None:
        if not self.task.two_options:
            self.unmarked.append(f"user {user_id} query {query_id}")
        else:
            self.problems.append(f"{where}: field 'input' does not hold a title and the options [1] and [2]")

    def warn(self) -> None:
        """Report what real files hold and what is used as it is, once per file."""
        marker = self.task.marker.strip()
        self._warn(self.unmarked, f"queries do not hold '{marker}', their whole input is taken as the text")
        self._warn(self.repeated, "item ids are used more than once in a history, all of those items are used")

    def _warn(self, cases: list[str], what: str) -> None:
        if cases:
            examples = ", ".join(cases[:5]) + (", ..." if len(cases) > 5 else "")
            warnings.warn(harmless(f"{self.path}: {len(cases)} {what}: {examples}"), stacklevel=4)


def _repeated(ids: Iterable[str]) -> list[str]:
    """The ids that occur more than once, in the order of their first places."""
    return [name for name, times in Counter(ids).items() if times > 1]


def _text(value: Any, what: str, problems: list[str]) -> str:
    """A text or number as text; the empty text is fine, real files hold it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        problems.append(f"{what} is {json_type(value)}, expected a text or a number")
        return ""
    text = str(value)
    if isinstance(value, float) and not math.isfinite(value):  # 1e999
        problems.append(f"{what} is beyond the largest number")
    try:
        text.encode()
    except UnicodeEncodeError:  # no tokenizer takes it, no file can hold it
        problems.append(f"{what} is not valid Unicode (half of a surrogate pair)")
    return text


def _field(row: dict[str, Any], name: str, where: str, problems: list[str]) -> str:
    if name not in row:
        problems.append(f"{where}: field '{name}' is missing")
        return ""
    return _text(row[name], f"{where}: field '{name}'", problems)


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def user_cost(user: User, recent_k: int = 0) -> int:
    """Characters to read for a user: of the history that is used, and of the queries."""
    cost = 1
    for item in user.recent(recent_k):
        cost += sum(len(text) for text in item.values())
    return cost + sum(len(query.input) for query in user.queries)
