"""Files in and out: regular files of bounded size, and writes that are either whole or not there.

A signal that would stop the process waits until the write in progress is done.
"""

import json
import os
import signal
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.runs.locks import grab, remove_abandoned, still_names

JSON_BYTES = 256 << 20  # a JSON file may have, unless its reader says otherwise
DIGITS = 300  # of a whole number at most: a float holds 308

# -- reading --------------------------------------------------------------------------------------------------------


def read_json(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> Any:
    """The content of a JSON file; whatever is wrong with it is an InputError that names the file.

    Refused are, beside broken JSON: a file of more than `limit` bytes, NaN and infinity (they are not JSON), and an
    object with the same key twice (the second value would silently win).
    """
    try:
        text = read_bytes(path, limit).decode("utf-8-sig")
        return json.loads(text, parse_constant=_refuse_constant, parse_int=_whole, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path}: {where}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    except ValueError as error:  # a number of hundreds of digits, a key given twice, NaN
        raise InputError(f"{path}: {error}") from None


def read_bytes(path: str | os.PathLike[str], limit: int = JSON_BYTES, flags: int = 0) -> bytes:
    """The content of a regular file of at most `limit` bytes; a pipe or a device could be read for ever.

    Args:
        flags: further ones of `os.open`.

    Raises:
        InputError: no such file, or another kind of one, or a larger one.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)  # a pipe is not waited for
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        status = os.fstat(handle)  # of what is read, also where the name is given to something else meanwhile
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file")
        if status.st_size > limit:
            raise InputError(f"{path}: {status.st_size:,} bytes, above the limit of {limit:,} for such a file")
        with open(handle, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(handle)


def check_own(root: Path) -> None:
    """InputError for anything below a run's folder that is neither a folder nor a regular file.

    A stage writes, cuts and removes files there. The folder may come from a stranger, whose link would have it done
    elsewhere, and whose pipe would be waited for.
    """
    problems: list[str] = []
    waiting = [os.fspath(root)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except (FileNotFoundError, NotADirectoryError):  # another process has just removed it
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                kind = "a link" if entry.is_symlink() else "a pipe or a device"
                problems.append(f"{entry.path}: {kind}; a run's folder holds folders and regular files only")
    if problems:
        raise InputError.many(sorted(problems))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"not JSON: {name}")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, beyond the largest number")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        times = Counter(key for key, _ in pairs)
        repeated = next(key for key in times if times[key] > 1)
        raise ValueError(f"an object holds the key {repeated[:80]!r} more than once")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of one JSON object per line; InputError names a line that is none."""
    rows = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            row = json.loads(line, parse_int=_whole)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number}: not an object")
        rows.append(row)
    return rows


def json_type(value: Any) -> str:
    """The JSON type of a value, for messages."""
    return _JSON_TYPES.get(type(value), "null")


_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a decimal number",
}

# -- signals --------------------------------------------------------------------------------------------------------


class _Stop:
    """The state of this process's signal handler."""

    depth = 0  # of nested `uninterrupted` blocks
    pending = False  # a signal came inside of one


def _stop(signum: int, frame: object) -> None:
    """Handler of SIGINT and SIGTERM: KeyboardInterrupt, but not in the middle of a write."""
    if _Stop.depth:
        _Stop.pending = True
    else:
        raise KeyboardInterrupt


def stop_between_writes() -> None:
    """Let SIGTERM (of SLURM, torchrun, docker) stop a run as Ctrl-C does, and both wait for a write in progress."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off the signals that `stop_between_writes` handles until the end of this block."""
    _Stop.depth += 1
    try:
        yield
    finally:
        _Stop.depth -= 1
    if _Stop.pending and not _Stop.depth:
        _Stop.pending = False
        raise KeyboardInterrupt


# -- writing --------------------------------------------------------------------------------------------------------


def flush(path: Path) -> None:
    """Return only when a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """A folder with its parents, the new names flushed to disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` to write to; flushed to disk and renamed to `path` on success.

    Raises:
        OSError: what went wrong, with the name of the file; an old file is left as it was.
    """
    path = Path(path)
    make_folder(path.parent)
    _remove_abandoned(path)
    handle, temporary = _held_temporary(path)
    try:
        yield temporary
        with uninterrupted():
            flush(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
            flush(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        os.close(handle)


def _held_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`; as long as this process holds it, others do not take it for abandoned."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        grab(handle)
        if still_names(Path(name), handle):
            return handle, Path(name)
        os.close(handle)  # somebody removed it before it was held


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of `path` whose writers died."""
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and name.endswith(".tmp"):
            remove_abandoned(path.with_name(name))


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one; signals wait until it is."""
    with uninterrupted(), replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path | str, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically: one key per line, in insertion order; ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
