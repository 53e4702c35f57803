"""What results were made from, by content: results of other inputs are neither believed nor mixed with new ones.

    <root>/inputs.json                 digests of what all users have in common, and of what a run makes but once
    <root>/users/<name>/inputs.json    of all that a user's result was made from; written before the result

Digests are of contents, never of paths, so a folder that was moved is the same input. Weight files above `LARGE` are
known by their size, their beginning (the header) and blocks spread over them: a change between those goes unseen.
What a run did not record, because it is older than the record, is recorded when the run is next opened.

    python -m prime.runs.inputs PATH...    one digest of files and folders, for reproduce.sh
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from prime.errors import InputError, tell
from prime.runs.files import read_json, uninterrupted, write_json

INPUTS_FILE, RESULT_FILE = "inputs.json", "result.json"
MACHINE = "device and dtype"  # that a run computes with
PLACE = "place"  # of a user among all; where nothing else has changed, the result is given the new one
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
LARGE = 64 << 20  # bytes
BLOCK, BLOCKS = 64 << 10, 64
SHOWN = 15  # changes in a message
# Of a stage's output, what later stages read; of another folder everything, to two levels.
MADE = ("*.safetensors", "*.pt", "users/*/result.json", "users/*/*.safetensors", "users/*/adapter/*.safetensors")
ANY = ("*", "*/*")


class Source(NamedTuple):
    """Something that was read: a digest of its content, or the content where it is short, and where it lies."""

    digest: str
    path: str


Sources = Mapping[str, Source]  # by what it is


@dataclass(frozen=True)
class Inputs:
    """What the results of a run depend on beside its settings.

    Args:
        shared: what all of them depend on.
        by_user: what one user's result depends on, by user id; of all users, not only of those to work on.
        products: files that the run makes but once, of `shared` alone; the first says that they are made.
    """

    shared: Sources = field(default_factory=dict)
    by_user: Mapping[str, dict[str, Source]] = field(default_factory=dict)
    products: tuple[str, ...] = ()

    def of(self, user_id: str) -> Sources:
        return {**self.shared, **self.by_user.get(user_id, {})}

    def identity(self, user_ids: Sequence[str]) -> str:
        """Of all that the results of these users together depend on; "" where nothing is known."""
        found = {user_id: digests(self.of(user_id)) for user_id in user_ids}
        return digest_of(found) if any(found.values()) else ""


def digests(sources: Sources) -> dict[str, str]:
    return {what: source.digest for what, source in sources.items()}


# -- digests --------------------------------------------------------------------------------------------------------


def digest_of(value: Any) -> str:
    """Of a value that JSON can hold."""
    return _shown(hashlib.sha256(json.dumps(value, sort_keys=True).encode()))


def file_digest(path: Path | str) -> str:
    """Of a file's content; of a large weight file see above."""
    status = Path(path).stat()
    return _file_digest(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, *_state: int) -> str:
    with open(path, "rb") as file:
        if size <= LARGE or not path.endswith(WEIGHTS):
            return _shown(hashlib.file_digest(file, "sha256"))
        digest = hashlib.sha256(str(size).encode())
        for number in range(BLOCKS):
            file.seek(number * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return _shown(digest, "sampled")


def folder_digest(folder: Path | str, patterns: Sequence[str]) -> str | None:
    """Of the files of a folder that match one of the patterns; None where there is none."""
    found: dict[str, str] = {}
    for pattern in patterns:
        for path in Path(folder).glob(pattern):
            if path.is_file():
                found[str(path.relative_to(folder))] = file_digest(path)
    return digest_of(found) if found else None


def path_digest(path: Path) -> str | None:
    """Of a file, of what a stage made in a folder, or of any other folder; None where nothing is there."""
    if path.is_file():
        return file_digest(path)
    return folder_digest(path, MADE if (path / "settings.json").is_file() else ANY)


def _shown(digest: Any, kind: str = "sha256") -> str:
    return f"{kind}:{digest.hexdigest()[:32]}"


# -- the record of a run --------------------------------------------------------------------------------------------


def record(folder: Path, sources: Sources) -> None:
    """Note in a folder what was read; entries for what is not there now are kept."""
    known, path = recorded(folder), folder / INPUTS_FILE
    if (new := known | digests(sources)) != known:
        write_json(path, new)


def recorded(folder: Path) -> dict[str, str]:
    """What was noted in a folder; nothing where it is older than the record."""
    path = folder / INPUTS_FILE
    known = read_json(path) if path.is_file() else {}
    if not isinstance(known, dict) or not all(isinstance(digest, str) for digest in known.values()):
        raise InputError(f"{path}: not an object of digests")
    return known


def settle(root: Path, folders: Mapping[str, Path], inputs: Inputs, refresh: bool) -> None:
    """Compare what a run directory was made from with what is there now, and record what was not recorded.

    Args:
        folders: of all users of `inputs`, by id.
        refresh: remove what was made from other inputs, to be made again; nothing else is touched. Another device or
            dtype (`MACHINE`) is no reason: whoever goes on elsewhere by mistake does not mean to lose anything.

    Raises:
        InputError: without `refresh`, where anything was; names each change with both digests and the file.
    """
    changed = _changes(root, inputs.shared)
    stale: dict[str, list[str]] = {}  # lines to tell, by user
    for user_id, folder in folders.items():
        if (folder / RESULT_FILE).is_file():
            found = _changes(folder, inputs.of(user_id))
            if found.keys() == {PLACE}:
                _renumber(folder, inputs.of(user_id)[PLACE])
            elif found:
                stale[user_id] = [line for what, line in found.items() if what not in changed]
    former = _former_users(root, folders.values()) if folders else []
    made = bool(changed and inputs.products and (root / inputs.products[0]).exists())
    if stale or former or made:
        if not refresh or MACHINE in changed:
            users = {sources[PLACE].path for sources in inputs.by_user.values() if PLACE in sources}
            gone = [f"{folder}: no longer one of the users of {', '.join(sorted(users))}" for folder in former]
            raise InputError(_message(root, changed, stale, gone))
        tell(f"{root}: inputs have changed; made again: {len(stale)} users" + " and what they share" * made)
        for folder in [*(folders[user_id] for user_id in stale), *former]:
            reopen(folder)
    if changed:
        for name in inputs.products:
            (root / name).unlink(missing_ok=True)
    record(root, inputs.shared)
    for user_id, folder in folders.items():
        if (folder / RESULT_FILE).is_file():
            record(folder, inputs.of(user_id))


def reopen(folder: Path) -> None:
    """Remove all that a user has in a run, the result first."""
    if folder.is_symlink():
        raise InputError(f"{folder}: a link, not a folder of this run")
    with uninterrupted():
        (folder / RESULT_FILE).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)


def _changes(folder: Path, sources: Sources) -> dict[str, str]:
    """A line for each thing that was recorded otherwise."""
    known = recorded(folder)
    return {
        what: f"{what}: there {known[what]}, now {source.digest} ({source.path})"
        for what, source in sources.items()
        if what in known and known[what] != source.digest
    }


def _former_users(root: Path, folders: Any) -> list[Path]:
    """Folders of users who have a result with a record here, and are no longer among the run's users."""
    names = {folder.name for folder in folders}
    found = sorted(root.glob(f"users/*/{INPUTS_FILE}"))
    return [path.parent for path in found if path.parent.name not in names and path.with_name(RESULT_FILE).is_file()]


def _renumber(folder: Path, place: Source) -> None:
    path = folder / RESULT_FILE
    write_json(path, {**read_json(path), "index": int(place.digest)})


def _message(
    root: Path, changed: Mapping[str, str], stale: Mapping[str, Sequence[str]], gone: Sequence[str]
) -> str:
    lines = [f"  {line}" for line in changed.values()]
    for user_id, lines_of_user in stale.items():
        lines += [f"  user {user_id}: {line}" for line in lines_of_user]
    lines += [f"  {line}" for line in gone]
    rest = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    remedy = "--refresh makes again what depends on them"
    count = f" ({len(stale)} users)" if stale else ""
    end = f"{remedy}{count} and leaves the rest; or use another --output_dir."
    return "\n".join([f"{root}: made from other inputs:", *lines[:SHOWN], *rest, end])


if __name__ == "__main__":
    print(digest_of({path: path_digest(Path(path)) for path in sys.argv[1:]}))
