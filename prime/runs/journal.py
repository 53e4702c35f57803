"""A journal of expensive calls: a computation that was cut off repeats its calls, and is answered from the journal.

It is the one way in which work is resumed. A search notes each batch of candidates that it evaluates, a stage that
trains users together notes what it learned before it writes their result files one by one.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.runs.files import flush, make_folder, read_bytes, uninterrupted


class Journal:
    """Answers of a deterministic computation, one JSON line each, on disk before they are used.

    A computation that was cut off runs again from its start: its recorded calls cost nothing, and from the first call
    that is not recorded it goes on as if it had never stopped. Dropped is everything from the first line that is torn
    or damaged, and from the first call whose question is not the recorded one (the data have changed).

    The first line names the users whose results the computation leads to, and the digest of what these depend on,
    `{"users": [...], "inputs": "..."}`. Each further line is `{"question": digest of the question, "seconds": what the
    answer took to compute, "answer": ..., "check": digest of these three}`.

    Args:
        path: of the file; the first call creates it.
        users: their ids. A file of other users is started anew.
        inputs: the digest; a file of others is started anew, too. "": not known, and left out.
    """

    def __init__(self, path: Path, users: Sequence[str] = (), inputs: str = ""):
        self.path = path
        self.spared = 0.0  # seconds that the calls answered from the journal took when they were computed
        about = {"users": list(users)} | ({"inputs": inputs} if inputs else {})
        self._head = json.dumps(about).encode() + b"\n"
        head, *entries = _lines(path) or [b""]
        same = head == self._head
        self._recorded = _whole_entries(entries) if same else []
        self._next = 0  # of the recorded entries: the one that answers the next call
        self._size = len(head) if same else 0  # bytes of the lines before it

    def call(self, question: Any, compute: Callable[[], Any]) -> Any:
        """The answer to `question`, recorded or computed; both are JSON.

        The question names everything that the answer depends on.
        """
        digest = _digest(question)
        entry = self._next_entry()
        if entry is not None and entry["question"] == digest:
            self._advance()
            self.spared += entry["seconds"]
            return entry["answer"]
        del self._recorded[self._next :]
        started = time.perf_counter()
        answer = compute()
        entry = {"question": digest, "seconds": time.perf_counter() - started, "answer": answer}
        self._append(entry | {"check": _digest(entry)})
        return answer

    def recorded(self, question: Any) -> Any | None:
        """The recorded answer to `question`, if it is what the next call would be answered with; else None."""
        entry = self._next_entry()
        return entry["answer"] if entry is not None and entry["question"] == _digest(question) else None

    def drop(self) -> None:
        """Remove the file: what the computation led to is safe elsewhere."""
        self.path.unlink(missing_ok=True)

    def _next_entry(self) -> dict[str, Any] | None:
        return json.loads(self._recorded[self._next]) if self._next < len(self._recorded) else None

    def _append(self, entry: dict[str, Any]) -> None:
        """Write an entry behind those that were used; what comes after them in the file is cut off."""
        line = json.dumps(entry).encode() + b"\n"
        head = b"" if self._size else self._head
        is_new = not self.path.exists()
        make_folder(self.path.parent)
        with uninterrupted(), open(self.path, "ab", opener=_no_link) as file:
            file.truncate(self._size)
            file.write(head + line)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            flush(self.path.parent)
        self._size += len(head)
        self._recorded.append(line)
        self._advance()

    def _advance(self) -> None:
        self._size += len(self._recorded[self._next])
        self._next += 1


def users_of(path: Path) -> list[str]:
    """The users that a journal's first line names; none where that line was cut off, or the file is no journal."""
    try:
        head = json.loads(_lines(path)[0])
    except (InputError, IndexError, ValueError, RecursionError):  # perhaps another process has just removed it
        return []
    users = head.get("users") if isinstance(head, dict) else None
    return users if isinstance(users, list) and all(isinstance(user, str) for user in users) else []


def _digest(question: Any) -> str:
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()


def _lines(path: Path) -> list[bytes]:
    return read_bytes(path, flags=os.O_NOFOLLOW).splitlines(keepends=True) if os.path.lexists(path) else []


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def _whole_entries(lines: Sequence[bytes]) -> list[bytes]:
    """The lines before the first that is torn, damaged, or no entry."""
    whole: list[bytes] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        check = entry.pop("check", None) if isinstance(entry, dict) else None
        if not line.endswith(b"\n") or check is None or check != _digest(entry):
            break
        whole.append(line)
    return whole
