"""A run directory: one result file per user, written last; only its presence says that the user is finished.

    <root>/settings.json                 what the run was asked to do. Resuming under other settings is refused once
                                         anything was computed under these
    <root>/users/<name>/result.json      one per finished user (or anchor): a function of settings, seed and user alone
    <root>/users/<name>/seconds.json     how long it took, the one file that differs from run to run
    <root>/**/inputs.json                what was read, by content (`prime.runs.inputs`)
    <root>/working/                      locks and journals of unfinished users; gone when nobody is at work

Every file is written under a temporary name, flushed to disk and renamed, and its folder is flushed. So a reader never
sees half a file, and a result that was seen survives a loss of power.
"""

import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prime.errors import InputError, tell
from prime.runs.files import check_own, uninterrupted, write_json
from prime.runs.forms import SETTINGS_FILE, USER_RESULT, form_problems, merge_problems, read_form
from prime.runs.inputs import INPUTS_FILE, Inputs, record, settle
from prime.runs.journal import Journal, users_of
from prime.runs.locks import claim, hold, turn, unheld
from prime.runs.machine import library_versions, machine, tell_versions

PLAIN_ID = re.compile(r"[a-z0-9_-]{1,64}")
# Locks of users, and of what one process does for all (`Run.turn`). Other files are not ours to remove.
LOCK = re.compile(r"(user_[a-z0-9_-]{1,64}|user\.[a-z0-9-]{0,32}\.[0-9a-f]{32}|settings|the_[a-z_]+)\.lock")
EXPORTED = "adapter_full"  # in the folder of a finished user, whose result does not depend on it
NO_RESULTS = ("settings.json", INPUTS_FILE, "noise.key")  # the key of the noise is as good under other settings
RESULTS = "results of all users of the group"  # the question of the last entry in a group's journal
NO_INPUTS = Inputs()


def user_dirname(user_id: str) -> str:
    """Folder name of a user: readable for plain ids, escaped with a hash for all others.

    The prefix keeps reserved names (`con`) harmless; ids that are unsafe, long, or differ only in case
    get a digest, so no two users share a folder and none leaves it.
    """
    if PLAIN_ID.fullmatch(user_id):
        return f"user_{user_id}"
    digest = hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]  # 16 could be made to meet
    readable = re.sub(r"[^a-z0-9]+", "-", user_id.lower())[:32].strip("-")
    return f"user.{readable}.{digest}"


class Run:
    """The output directory of one stage.

    Args:
        root: the directory; made if absent.
        stage: name of the script that fills it.
        method: label of its predictions in the final table (`prime`, `task_lora`, ...).
        settings: everything a result depends on.
        default: the value of a setting that settings.json does not name: an option's default, since the directory may
            be older than the option.
        inputs: everything else that a result depends on.
        refresh: make again what was made from other inputs.

    Other versions of libraries than those that began the run are told.

    Raises:
        InputError: the directory holds results of other settings, or another process is at work in it under other
            settings; names each key that differs, with both values. Or it holds links, pipes or devices, or, without
            `refresh`, results of other inputs.
    """

    def __init__(
        self, root: Path | str, stage: str, method: str, settings: Mapping[str, Any],
        default: Callable[[str], Any] = lambda key: None, inputs: Inputs = NO_INPUTS, refresh: bool = False,
    ):  # fmt: skip
        self.root, self.inputs = Path(root), inputs
        self.working = self.root / "working"
        self._path, self._default = self.root / "settings.json", default
        self.settings: dict[str, Any] = _as_json(dict(settings))
        check_own(self.root)
        wanted: dict[str, Any] = {"stage": stage, "method": method, "settings": self.settings}
        if not self._path.exists() or self._problem(wanted):
            with self.turn("settings"):
                self._write_settings(wanted)
        # First held until this run is dropped, then compared: from here on nobody replaces the settings.
        weakref.finalize(self, os.close, hold(self._path))
        if problem := self._problem(wanted):
            raise InputError(problem)
        tell_versions(self._path, read_settings(self.root).get("versions", {}))
        if inputs != NO_INPUTS:
            with self.turn("the inputs"):
                folders = {user_id: self.user_dir(user_id) for user_id in inputs.by_user}
                settle(self.root, folders, inputs, refresh)
        self._remove_leftovers()
        self._reopen()

    def _write_settings(self, wanted: Mapping[str, Any]) -> None:
        """Write the settings where there are none, or in place of others that led to nothing and that nobody uses."""
        record = {**wanted, "versions": library_versions(), "machine": machine()}
        if not self._path.exists():
            write_json(self._path, record)
        elif self._problem(wanted):
            with unheld(self._path) as unused:
                if unused and not self._holds_results():
                    write_json(self._path, record)

    def _holds_results(self) -> bool:
        """Whether the directory holds anything that was computed, finished or not."""
        for _, _, names in os.walk(self.root):
            if any(name not in NO_RESULTS and not name.endswith((".lock", ".tmp")) for name in names):
                return True
        return False

    def _problem(self, wanted: Mapping[str, Any]) -> str:
        """What keeps this run from going on in the directory; "" if nothing does."""
        present = read_settings(self.root)
        if present["stage"] != wanted["stage"]:
            return f"{self._path}: made by {present['stage']}.py, not {wanted['stage']}.py; use another --output_dir"
        differences = self._differences(present["settings"], wanted["settings"])
        if not differences:
            return ""
        if self._holds_results():
            what, remedy = f"{self._path}: this directory holds results of other settings:", "remove it to start over."
        else:
            what = f"{self._path}: another process is at work in this directory under other settings:"
            remedy = "wait until it has ended."
        return "\n".join([what, *differences, f"Use another --output_dir, or {remedy}"])

    def _differences(self, present: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
        """A line for each setting whose value in the directory is not the wanted one."""
        lines = []
        for key in sorted(present.keys() | wanted.keys()):
            old, new = (
                settings[key] if key in settings else _as_json(self._default(key)) for settings in (present, wanted)
            )
            if old != new:
                lines.append(f"  {key}: there {old!r}, now {new!r}")
        return lines

    def user_dir(self, user_id: str) -> Path:
        return self.root / "users" / user_dirname(user_id)

    def result_path(self, user_id: str) -> Path:
        return self.user_dir(user_id) / "result.json"

    def done(self, user_id: str) -> bool:
        return self.result_path(user_id).exists()

    def finish(self, user_id: str, result: Mapping[str, Any]) -> None:
        """Write the user's result file, the last of all files of the user, and names those in it.

        `seconds` go into a file of their own.
        """
        folder = self.user_dir(user_id)
        with uninterrupted():
            if sources := self.inputs.of(user_id):
                record(folder, sources)
            if "seconds" in result:
                write_json(folder / "seconds.json", result["seconds"])
            kept = {key: value for key, value in result.items() if key != "seconds"}
            if files := _files_of(folder):
                kept["files"] = files
            write_json(self.result_path(user_id), kept)

    # Work in progress

    def claim(self, user_ids: Sequence[str]) -> AbstractContextManager[bool]:
        """Hold these users, all or none; False where another process holds one."""
        return claim(*(self.lock_path(user_id) for user_id in user_ids))

    def lock_path(self, user_id: str) -> Path:
        return self.working / f"{user_dirname(user_id)}.lock"

    def turn(self, what: str) -> AbstractContextManager[None]:
        """Wait for one's turn at something that one process does for all (train the task adapter, write a summary)."""
        return turn(self.working / f"{what.replace(' ', '_')}.lock", what)

    def journal(self, user_ids: Sequence[str]) -> Journal:
        """The journal of the unfinished work that leads to the results of these users together."""
        return Journal(self._journal_path(user_ids), user_ids, self.inputs.identity(user_ids))

    def _journal_path(self, user_ids: Sequence[str]) -> Path:
        digest = hashlib.sha256(json.dumps(list(user_ids)).encode()).hexdigest()[:32]
        return self.working / f"{digest}.jsonl"

    def finish_all(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Finish those users of a group who are not finished yet.

        The results are noted in the group's journal first, so that a crash between two users leaves nobody to be
        computed again: `recover` finishes the rest.
        """
        journal = self.journal([result["user_id"] for result in results])
        for result in journal.call(RESULTS, lambda: list(results)):
            if not self.done(result["user_id"]):
                self.finish(result["user_id"], result)
        journal.drop()

    def recover(self, user_ids: Sequence[str]) -> None:
        """Finish a group whose results had been noted when `finish_all` was cut off."""
        journal = self.journal(user_ids)
        results = journal.recorded(RESULTS)
        if results is None:
            return
        if form_problems(results, [USER_RESULT], "") or [result["user_id"] for result in results] != list(user_ids):
            journal.drop()  # somebody else wrote it: these users are done anew
        else:
            self.finish_all(results)

    def _remove_leftovers(self) -> None:
        """Remove what a crash left: journals whose users were all finished by then, and locks of dead processes."""
        for path in sorted(self.working.glob("*.jsonl")):
            users = users_of(path)
            if users and path == self._journal_path(users) and all(self.done(user_id) for user_id in users):
                path.unlink(missing_ok=True)
        for path in sorted(self.working.glob("*.lock")):
            if LOCK.fullmatch(path.name):
                with claim(path):  # giving a lock back removes its file
                    pass


    def _reopen(self) -> None:
        """Remove results of which a file has been lost since: those users are done again."""
        for path in sorted(self.root.glob("users/*/result.json")):
            lost = [name for name in _named_files(path) if not (path.parent / name).is_file()]
            if lost:
                tell(f"{path.parent}: {lost[0]} is lost, so this user is done again")
                path.unlink(missing_ok=True)


def _files_of(folder: Path) -> list[str]:
    """The files of a user that a result speaks of, as paths within the folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    names = {path.relative_to(folder).as_posix() for path in paths} - {"result.json", "seconds.json", INPUTS_FILE}
    return sorted(name for name in names if not name.startswith(f"{EXPORTED}/"))


def _named_files(path: Path) -> list[str]:
    """The files that a result names; none where it is not readable, which is told where it is used."""
    try:
        return read_form(path, {"files?": [str]}).get("files", [])
    except InputError:
        return []


def _as_json(value: Any) -> Any:
    """As it reads from a file: JSON knows no tuples."""
    return json.loads(json.dumps(value))


def read_result(path: Path) -> dict:
    """A user's result, with its `seconds` where they are known.

    Raises:
        InputError: not a result of a stage, or that of another user than the folder is named after.
    """
    result = read_form(path, USER_RESULT)
    if problems := merge_problems(result):
        raise InputError.many([f"{path}: {problem}" for problem in problems])
    if user_dirname(result["user_id"]) != path.parent.name:
        raise InputError(f"{path}: the result of user {result['user_id']}, in another user's folder")
    seconds = path.with_name("seconds.json")
    if seconds.exists():
        result["seconds"] = read_form(seconds, USER_RESULT["seconds?"])
    return result


def read_results(root: Path | str) -> list[dict]:
    """The results of all finished users of a run directory, by index; one InputError lists all problems."""
    results, problems = [], []
    check_own(Path(root))
    for path in sorted(Path(root).glob("users/*/result.json")):
        try:
            results.append(read_result(path))
        except InputError as error:
            problems += str(error).splitlines()
    if problems:
        raise InputError.many(problems)
    return sorted(results, key=lambda result: result["index"])


def read_settings(root: Path | str) -> dict:
    """The settings.json of a run directory; InputError where there is none."""
    path = Path(root) / "settings.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; {root} is not the output directory of a stage")
    return read_form(path, SETTINGS_FILE)
