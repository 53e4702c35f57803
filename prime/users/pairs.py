"""Pairs of one's own: an input and its output a line, as JSONL or CSV; no task, no histories.

    {"input": "Rate this review: ...", "output": "4"}
    {"input": "...", "output": "...", "user": "anna"}     user: whose records belong together, for the audit
    {"text": "a whole text that was trained on"}          for the audit: all of it is scored

A row of CSV has the same columns, named in the first row. Further fields are not looked at. All problems of a file are
told together, each with its line.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.runs.files import json_type, read_bytes

FILE_BYTES = 2 << 30
FIELDS = ("input", "output")
NOTHING_IN_COMMON = "a record was trained on or it was not: remove it from one of the two files"

Rows = Iterator[tuple[int, Mapping[str, Any]]]  # with their lines


@dataclass(frozen=True)
class Pair:
    """An input, the output that belongs to it, and the line where they stand."""

    line: int
    input: str
    output: str
    user: str = ""  # "": the file names none

    @property
    def target(self) -> str:
        """The output as it follows the input: behind a space, where neither side brings one."""
        apart = not self.input or self.input[-1].isspace() or self.output[0].isspace()
        return self.output if apart else f" {self.output}"


def read_pairs(path: str | Path, *, texts: bool = False) -> list[Pair]:
    """All pairs of a file.

    Args:
        texts: a line may also hold a `text`, which becomes the output of an empty input.

    Raises:
        InputError: no such file, another kind of one, or all that is wrong with its lines.
    """
    path, problems = Path(path), list[str]()
    readers = {".jsonl": _json_rows, ".ndjson": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: pairs are read from .jsonl (an object a line) or .csv; give one of these")
    rows = list(readers[path.suffix.lower()](path))
    if not rows:
        raise InputError(f"{path}: holds no pairs; a line is {_example(texts)}")
    if not any(_has_fields(row, texts) for _, row in rows):
        line, row = rows[0]
        named = f"line {line} has {_names(row)}"
        raise InputError(f"{path}: no line has the fields input and output ({named}); rename them: {_example(texts)}")
    pairs = []
    for line, row in rows:
        pairs.append(_pair(row, line, texts, problems))
    with_user = [pair for pair in pairs if pair.user]
    if with_user and len(with_user) < len(pairs):
        bare = next(pair for pair in pairs if not pair.user)
        problems.append(f"line {bare.line}: no user, but line {with_user[0].line} has one; name all of them or none")
    if problems:
        raise InputError.many([f"{path}: {problem}" for problem in problems])
    return pairs


def check_apart(path: str, pairs: Sequence[Pair], other_path: str, others: Sequence[Pair]) -> None:
    """InputError naming every pair that is in both files."""
    lines = {(pair.input.strip(), pair.output.strip()): pair.line for pair in others}
    problems = []
    for pair in pairs:
        if there := lines.get((pair.input.strip(), pair.output.strip())):
            problems.append(f"{path}: line {pair.line}: also in {other_path}, line {there}; {NOTHING_IN_COMMON}")
    if problems:
        raise InputError.many(problems)


def _example(texts: bool) -> str:
    return '{"input": "...", "output": "..."}' + (' or {"text": "..."}' if texts else "")


def _has_fields(row: Mapping[str, Any], texts: bool) -> bool:
    return all(name in row for name in FIELDS) or (texts and "text" in row)


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(str(name)[:40] for name in list(row)[:8]) or "nothing"


def _pair(row: Mapping[str, Any], line: int, texts: bool, problems: list[str]) -> Pair:
    """The pair of a line; what is wrong with it is added to `problems`."""
    fields = {"input": "input", "output": "output"}  # by what they become
    found: dict[str, str] = {"input": ""}
    if texts and "text" in row and not any(name in row for name in FIELDS):
        fields = {"output": "text"}
    for field, name in fields.items():
        value = _text(row.get(name, ""))
        found[field] = value or ""
        if name not in row:
            problems.append(f"line {line}: no field '{name}' (it has {_names(row)})")
        elif value is None:
            problems.append(f"line {line}: {name} is {json_type(row[name])}, expected a text")
        elif not value.strip():
            problems.append(f"line {line}: an empty {name}; fill it in or remove the line")
    user = _text(row.get("user", ""))
    if user is None:
        problems.append(f"line {line}: user is {json_type(row['user'])}, expected a name or a number")
    return Pair(line, found["input"], found["output"], user or "")


def _text(value: Any) -> str | None:
    """A text, or a number as one; None: something else."""
    if isinstance(value, str):
        return value
    return str(value) if type(value) in (int, float) else None


# -- files ----------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); is it a file of pairs?") from None


def _json_rows(path: Path) -> Rows:
    text = _read_text(path)
    if text.lstrip().startswith("["):
        raise InputError(f"{path}: a JSON list; one object a line is expected: jq -c '.[]' {path} > pairs.jsonl")
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}: line {number}: not JSON ({error}); one object a line is expected")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f"{path}: line {number}: {json_type(row)}, expected an object")
    if problems:
        raise InputError.many(problems)


def _csv_rows(path: Path) -> Rows:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    try:
        for row in reader:
            yield reader.line_num, {str(name): value for name, value in row.items() if value is not None}
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not CSV ({error})") from None
