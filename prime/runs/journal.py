"""A journal of expensive calls: the same calls in the same order are answered from it instead of computed again."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prime.runs.files import flush, make_folder, uninterrupted


class Journal:
    """Answers of a deterministic computation, a JSON line each, on disk before they are used.

    A computation that was cut off runs again from its start: its recorded calls cost nothing, and from the first one
    that is not recorded it goes on as if never stopped. A torn last line is dropped, and so is everything from the
    first call that asks something else than what was recorded (the data have changed).

    Args:
        path: of the file; made by the first call.
    """

    def __init__(self, path: Path):
        self.path = path
        self.spared = 0.0  # seconds that calls answered from the journal took when they were computed
        self._recorded = list(_whole_lines(path))
        self._place = 0
        self._size = 0  # bytes of the lines before the place

    def call(self, question: Any, compute: Callable[[], Any]) -> Any:
        """The answer to `question`, recorded or computed; JSON both. The question names all the answer depends on."""
        asked = hashlib.sha256(json.dumps(question).encode()).hexdigest()
        if self._place < len(self._recorded):
            line = self._recorded[self._place]
            found = json.loads(line)
            if found["asked"] == asked:
                self._advance(line)
                self.spared += found["seconds"]
                return found["answer"]
            del self._recorded[self._place :]
        started = time.perf_counter()
        answer = compute()
        self._append({"asked": asked, "seconds": time.perf_counter() - started, "answer": answer})
        return answer

    def drop(self) -> None:
        """Remove the file: what it led to is safe elsewhere."""
        self.path.unlink(missing_ok=True)

    def _append(self, entry: dict) -> None:
        line = json.dumps(entry).encode() + b"\n"
        new = not self.path.exists()
        make_folder(self.path.parent)
        with uninterrupted(), open(self.path, "ab") as file:
            file.truncate(self._size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if new:
            flush(self.path.parent)
        self._recorded.append(line)
        self._advance(line)

    def _advance(self, line: bytes) -> None:
        self._place += 1
        self._size += len(line)


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a journal before the first torn one."""
    found: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not (line.endswith(b"\n") and isinstance(entry, dict) and entry.keys() == {"asked", "seconds", "answer"}):
            break
        found.append(line)
    return found
