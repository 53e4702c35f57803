"""Rows of a table: CSV of any usual delimiter, JSON Lines (or one list of objects), Parquet where pyarrow is there."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.runs.files import read_bytes
from prime.sources.placing import Tally
from prime.users.data import DATA_BYTES

DELIMITERS = ",\t;|"
CELL = 16 << 20  # characters of a cell at most

Row = Mapping[str, Any]


def read_rows(path: Path, wanted: Sequence[str], tally: Tally) -> Iterator[tuple[str, Row]]:
    """Where each row is, for messages, and the row itself; columns of `wanted` are in it.

    Raises:
        InputError: no such file or column, or a file that cannot be read; it says what to do.
    """
    kind = path.suffix.lower()
    if kind in (".parquet", ".pq"):
        yield from _parquet(path, wanted)
    elif kind in (".xlsx", ".xls", ".ods"):
        raise InputError(f"{path}: a spreadsheet; save it as CSV in UTF-8, and give that to --table")
    elif kind in (".jsonl", ".ndjson", ".json"):
        yield from _json_lines(path, wanted)
    else:
        yield from _csv(path, wanted, tally)


def _text(path: Path) -> str:
    try:
        text = read_bytes(path, DATA_BYTES).decode("utf-8-sig")  # a byte order mark is no part of the first column
    except UnicodeDecodeError as error:
        remedy = f"save it as UTF-8, e.g. iconv -f windows-1252 -t utf-8 {path.name} > utf8-{path.name}"
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); {remedy}") from None
    if not text.strip():
        raise InputError(f"{path}: empty; a header with the names of the columns and rows are expected")
    return text


def columns_of(path: Path) -> str:
    """The columns of a table, for a message."""
    try:
        next(read_rows(path, ["\0"], Tally()))
    except InputError as error:
        return str(error).rpartition("columns are: ")[2]
    return ""


def check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """InputError for a column that is not there, or there twice."""
    for name in wanted:
        if columns.count(name) > 1:
            raise InputError(f"{path}: {columns.count(name)} columns are called '{name}'; rename one")
        if name not in columns:
            near = difflib.get_close_matches(name, columns, 1, 0.5)
            hint = f" (is it '{near[0]}'?)" if near else ""
            raise InputError(f"{path}: no column '{name}'{hint}; columns are: {', '.join(columns)}")


def _csv(path: Path, wanted: Sequence[str], tally: Tally) -> Iterator[tuple[str, Row]]:
    text = _text(path)
    csv.field_size_limit(CELL)
    delimiter = _delimiter(text.lstrip().partition("\n")[0], wanted)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in next((cells for cells in reader if any(cells)), [])]
        check_columns(path, columns, wanted)
        for cells in reader:
            where = f"line {reader.line_num}"
            if len(cells) > len(columns):
                tally.add("rows with more cells than the header (is a text with the delimiter unquoted?)", where)
            elif any(cells):
                yield where, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}; is a quotation mark not closed?") from None


def _delimiter(header: str, wanted: Sequence[str]) -> str:
    """The one that finds the columns; else the one that finds most, so that a message can name them."""

    def found(delimiter: str) -> tuple[int, int]:
        names = [name.strip().strip('"') for name in header.strip().split(delimiter)]
        return sum(name in names for name in wanted), len(names)

    return max(DELIMITERS, key=found)


def _json_lines(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Objects, one a line, or one list of them."""
    text = _text(path)
    if text.lstrip().startswith("["):
        rows = [(f"row {place}", row) for place, row in enumerate(_parsed(path, "", text))]
    else:
        lines = ((place, line) for place, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = [(f"line {place}", _parsed(path, f"line {place}: ", line)) for place, line in lines]
    columns: dict[str, None] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{path}: {where}: not an object; one object a line is expected")
        columns |= dict.fromkeys(row)
    check_columns(path, list(columns), wanted)
    yield from rows


def _parsed(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {where}not JSON: {error}; one object a line is expected") from None


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Row]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if find_spec("pyarrow") is None:
        raise InputError(f"{path}: Parquet needs pyarrow: .venv/bin/python -m pip install pyarrow; or save it as CSV")
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path, memory_map=False)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not Parquet: {str(error).splitlines()[0]}") from None
    check_columns(path, table.column_names, wanted)
    for place, row in enumerate(table.select(list(wanted)).to_pylist()):
        yield f"row {place}", row
