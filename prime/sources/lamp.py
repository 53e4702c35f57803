"""Official LaMP files, read piece by piece: `{train,dev}_questions.json` and `{train,dev}_outputs.json`.

Questions are a list of `{"id", "input", "profile": [item, ...]}`, in the time split with a `date` in each item, in some
releases with `user_id`; outputs are `{"task": "LaMP_2", "golds": [{"id", "output"}]}` (Salemi et al., ACL 2024).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from prime.errors import InputError
from prime.sources.depth import Depth
from prime.sources.placing import Tally
from prime.sources.spool import Item, Question, Spool, item_key
from prime.sources.values import date_key, id_of, id_order, text_of
from prime.users.tasks import Task, extract

PARTS = ("train", "dev")  # the test part has no public answers
UNUSABLE = "items without usable text"

_TASK = re.compile(r"LaMP[_-](?:t_)?(\d)[_-]?([A-Z]?)", re.IGNORECASE)
_DATE_AT_END = re.compile(r"\bdate: (\d{4}(?:-\d{1,2}){0,2})\s*$")


# -- files ----------------------------------------------------------------------------------------------------------


class _WatchedFile:
    """A binary file that reports how many bytes are read of it, and refuses what is nested too deeply."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], object]):
        self.file, self.progress, self.depth = file, progress, Depth()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.progress(len(data))
        self.depth.feed(data)
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
            yield from ijson.items(_WatchedFile(file, progress), prefix, use_float=True, buf_size=2**20)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ijson.JSONError, ValueError) as error:  # also bytes that are no text, and numbers of thousands of digits
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise InputError(f"{path}: not JSON: {reason}") from None


def find_parts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """(questions, outputs) of each part there is, beside each other or, as on LaMP's server, in a folder per part.

    Raises:
        InputError: no part at all, or questions without their outputs.
    """
    parts = {}
    for part in PARTS:
        for place in (folder, folder / part):
            questions, outputs = place / f"{part}_questions.json", place / f"{part}_outputs.json"
            if not questions.is_file():
                continue
            if not outputs.is_file():
                raise InputError(f"{outputs}: no such file; questions without their answers cannot be used")
            parts[part] = (questions, outputs)
            break
    if not parts:
        names = " or ".join(f"{part}_questions.json" for part in PARTS)
        raise InputError(f"{folder}: no {names} there, nor in {', '.join(f'{part}/' for part in PARTS)}")
    return parts


def check_task(outputs: Path, task: Task) -> None:
    """InputError when the outputs say that they belong to another task."""
    name = next(stream(outputs, "task"), None)
    match = _TASK.fullmatch(name.strip()) if isinstance(name, str) else None
    if match is None:
        return
    number, letter = match[1], match[2].upper()
    if number == "6":
        raise InputError(
            f"{outputs}: {name} (email subjects) is not supported: its texts are the Avocado collection, which LaMP "
            "may not give away"
        )
    if f"LaMP_{number}{letter}" not in (task.lamp, task.lamp[:6]):
        raise InputError(f"{outputs}: answers of {name}, but {task.name} is {task.lamp} (--task_name, --lamp_dir)")


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
        # Of the first question by id of each part: its place in the order of ids, and the words in front of its text.
        self.heads: dict[str, tuple[tuple[int, int, str], str]] = {}

    def read(self, part: str, questions: Path, outputs: Path, progress: Callable[[int], object]) -> None:
        """Read both files of a part.

        Raises:
            InputError: a file that is no LaMP file of this task, or all that is wrong with the questions.
        """
        check_task(outputs, self.task)
        self._read_golds(part, outputs)
        before = self.tally.counts.copy()
        for position, row in enumerate(stream(questions, "item", progress)):
            self.tally.add("questions read")
            self._read_question(part, row, f"{questions}: question at position {position}")
        self.spool.texts.flush()
        self.tally.check()
        self._check_questions(questions, self.tally.counts - before)

    def _check_questions(self, questions: Path, counts: Counter[str]) -> None:
        """InputError for a file without questions, or whose questions are not of this task."""
        read, unmarked = counts["questions read"], counts["questions without their marker"]
        if not read:
            raise InputError(f"{questions}: no question there; a list of objects is expected")
        if unmarked > max(1, read / 2):
            expected = f"'{self.task.marker.strip()}'" if self.task.marker else "a title and two options"
            raise InputError(
                f"{questions}: {unmarked} of {read} questions do not hold {expected}; is it {self.task.name}?"
            )

    def _read_golds(self, part: str, outputs: Path) -> None:
        rows = 0
        for rows, row in enumerate(stream(outputs, "golds.item"), 1):
            question_id = id_of(row.get("id")) if isinstance(row, dict) else ""
            if not question_id:
                self.tally.problem(f"{outputs}: answer at position {rows - 1}: no 'id' that is an integer or a text")
                continue
            answer = text_of(row.get("output")).strip()
            if not self.spool.insert("gold", part, question_id, answer):
                first = self.spool.gold(part, question_id)
                if first != answer:
                    self.tally.problem(f"{outputs}: id {question_id} is answered by {first!r} and by {answer!r}")
        if not rows:
            raise InputError(f"{outputs}: no answers there; an object with a list under 'golds' is expected")

    def _read_question(self, part: str, row: Any, where: str) -> None:
        problem = _question_problem(row)
        if problem:
            self.tally.problem(f"{where}: {problem}")
            return
        question_id = id_of(row["id"])
        items, ids = self._usable_items(row["profile"])
        profile = self.spool.add_profile(items)
        text = self._usable_input(part, question_id, text_of(row["input"]))
        gold = self.spool.gold(part, question_id)
        if text and gold:
            user, date = id_of(row.get("user_id")) or None, _query_date(row, text)
            self._keep(Question(0, part, question_id, user, text, gold, date, profile, json.dumps(ids)), where)
        elif text:
            self.tally.add("questions without an answer", f"{part} {question_id}")

    def _keep(self, question: Question, where: str) -> None:
        if self.spool.add_question(question):
            return
        ((first_text, first_profile),) = self.spool.rows(
            "SELECT input, profile FROM question WHERE part = ? AND id = ?", question.part, question.id
        )
        if (first_text, first_profile) == (question.input, question.profile):
            self.tally.add("questions repeated word for word", f"{question.part} {question.id}")
        else:
            self.tally.problem(f"{where}: id {question.id} is taken by another question of the file")

    def _usable_items(self, rows: list[Any]) -> tuple[list[tuple[int, Item]], list[str]]:
        """A profile's usable items with their keys, each once, and their ids as the file has them."""
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

    def _usable_input(self, part: str, question_id: str, text: str) -> str:
        """The input, "" where it cannot be used.

        A text without its marker is taken whole, as everywhere in the toolkit, and put behind a marker when it is
        written (`marked`).
        """
        parts = extract(self.task, text)
        if parts is None:
            self.tally.add("questions without their marker", f"{part} {question_id}")
            usable = self.task.query_parts == 1 and text.strip()
            return text if usable else ""
        if not all(shown.strip() for shown in parts):
            self.tally.add("questions without text", f"{part} {question_id}")
            return ""
        head = (id_order(question_id), text[: len(text) - len(parts[-1])])
        self.heads[part] = min(head, self.heads.get(part, head))
        return text

    def marked(self, question: Question) -> str:
        """The question's input, with its marker: where it had none, as in the part's first question that has one."""
        if extract(self.task, question.input) is not None:
            return question.input
        head = self.heads[question.part][1] if question.part in self.heads else self.task.marker
        return head + question.input


def _question_problem(row: Any) -> str:
    """Why a row of the file is no question; "" where it is one."""
    if not isinstance(row, dict):
        return "expected an object"
    question_id = id_of(row.get("id"))
    if not question_id:
        return "no 'id' that is an integer or a text"
    if not isinstance(row.get("input"), str):
        return f"id {question_id}: field 'input' is no text"
    if not isinstance(row.get("profile"), list):
        return f"id {question_id}: field 'profile' is no list"
    return ""


def _query_date(row: Mapping[str, Any], text: str) -> str:
    """Date key of a question: of its field `date`, or of the date that its text ends with; "" where it has none."""
    match = _DATE_AT_END.search(text)
    return date_key(row.get("date")) or (date_key(match[1]) if match else "")
