"""A run directory: one result file per user, written last; its presence is the only mark of being finished.

    <root>/settings.json                 what the run was asked to do; resuming under other settings is refused
    <root>/users/<name>/result.json      one per finished user (or anchor)

Every file is written under a temporary name, flushed to disk and renamed, so a reader never sees half a file.
"""

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prime.data import read_json
from prime.errors import InputError

PLAIN_ID = re.compile(r"[a-z0-9_-]{1,64}")
LIBRARIES = ("torch", "transformers", "peft", "nevergrad", "cma", "numpy")


def user_dirname(user_id: str) -> str:
    """Folder name of a user: readable for plain ids, escaped with a hash for all others.

    The prefix keeps reserved names (`con`) harmless; ids that are unsafe, long, or differ only in case
    get a digest, so no two users share a folder and none leaves it.
    """
    if PLAIN_ID.fullmatch(user_id):
        return f"user_{user_id}"
    digest = hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    readable = re.sub(r"[^a-z0-9]+", "-", user_id.lower())[:32].strip("-")
    return f"user.{readable}.{digest}"


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that is a function of its parts alone (run seed, user id, ...)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` to write to; flushed to disk and renamed to `path` on success."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write a text file so that it is either the old one or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically: one key a line, insertion order, NaN refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def library_versions() -> dict[str, str]:
    """Versions that can change a result, for the run's record."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


class Run:
    """The output directory of one stage.

    Args:
        root: the directory; made if absent.
        stage: name of the script that fills it.
        method: label of its predictions in the final table (`prime`, `task_lora`, ...).
        settings: everything a result depends on. A directory made under other settings is refused with an
            InputError that names each differing key with both values.
    """

    def __init__(self, root: Path | str, stage: str, method: str, settings: Mapping[str, Any]):
        self.root = Path(root)
        asked = {"stage": stage, "method": method, "settings": json.loads(json.dumps(dict(settings)))}
        path = self.root / "settings.json"
        if path.exists():
            self._refuse_other(path, asked)
        else:
            write_json(path, asked | {"versions": library_versions()})

    @staticmethod
    def _refuse_other(path: Path, asked: dict) -> None:
        found = read_settings(path.parent)
        if found["stage"] != asked["stage"]:
            made = found["stage"]
            raise InputError(f"{path}: made by {made}.py, not {asked['stage']}.py; use another --output_dir")
        old, new = found["settings"], asked["settings"]
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if changed:
            lines = [f"  {key}: there {old.get(key)!r}, now {new.get(key)!r}" for key in changed]
            raise InputError(
                f"{path}: this directory holds results of other settings:\n" + "\n".join(lines)
                + "\nUse another --output_dir, or remove it to start over."
            )

    def user_dir(self, user_id: str) -> Path:
        return self.root / "users" / user_dirname(user_id)

    def result_path(self, user_id: str) -> Path:
        return self.user_dir(user_id) / "result.json"

    def done(self, user_id: str) -> bool:
        return self.result_path(user_id).exists()

    def finish(self, user_id: str, result: Mapping[str, Any]) -> None:
        """Write the user's result file: last of all its files."""
        write_json(self.result_path(user_id), dict(result))


def read_results(root: Path | str) -> list[dict]:
    """Results of all finished users of a run directory, in the order of the users' index."""
    results = [read_json(path) for path in sorted(Path(root).glob("users/*/result.json"))]
    return sorted(results, key=lambda result: result["index"])


def read_settings(root: Path | str) -> dict:
    """The settings.json of a run directory; InputError when it is no run directory."""
    path = Path(root) / "settings.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; {root} is not the output directory of a stage")
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict) or "stage" not in found:
        raise InputError(f"{path}: not the settings of a run (stage, method, settings)")
    return found
