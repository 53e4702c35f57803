"""A run directory: one result file per user, written last; its presence is the only mark of being finished.

    <root>/settings.json                 what the run was asked to do; resuming under other settings is refused, once
                                         anything was made under these
    <root>/users/<name>/result.json      one per finished user (or anchor): a function of settings, seed and user alone
    <root>/users/<name>/seconds.json     how long it took, the one file that differs from run to run
    <root>/working/                      locks and unfinished work of those at it now; gone when nobody is

Every file is written under a temporary name, flushed to disk and renamed, and its folder flushed, so a reader never
sees half a file and a result that was seen survives a loss of power.
"""
import hashlib
import json
import os
import platform
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.runs.files import uninterrupted, write_json
from prime.runs.forms import SETTINGS_FILE, USER_RESULT, merge_problems, read_form
from prime.runs.journal import Journal, users_of
from prime.runs.locks import claim, hold, turn, unheld

PLAIN_ID = re.compile(r"[a-z0-9_-]{1,64}")
DRIVER = Path("/proc/driver/nvidia/gpus")
NOTHING_MADE = ("settings.json", "noise.key")  # a key's noise is of the settings, too
RESULTS = "results of all users of the group"  # the question of the last entry in a group's journal
LIBRARIES = ("torch", "transformers", "peft", "nevergrad", "cma", "numpy")


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


# -- files ----------------------------------------------------------------------------------------------------------


# -- a run ----------------------------------------------------------------------------------------------------------


def library_versions() -> dict[str, str]:
    """Versions that can change a result, for the run's record."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def machine() -> str:
    """What computes here, for the run's record: system, CPU cores, NVIDIA's GPUs as their driver names them.

    CUDA is left alone: starting it would forbid to fork.
    """
    told = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(DRIVER.glob("*/information"))]
    names = [line.partition(":")[2].strip() for text in told for line in text.splitlines() if line.startswith("Model:")]
    gpus = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join([f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} CPU cores", *gpus])


class Run:
    """The output directory of one stage.

    Args:
        root: the directory; made if absent.
        stage: name of the script that fills it.
        method: label of its predictions in the final table (`prime`, `task_lora`, ...).
        settings: everything a result depends on. A directory that holds something made under other settings, or
            in which another process is at work under others, is refused with an InputError that names each
            differing key with both values.
        default: what a setting is where it is not told: an option's default, for runs made before the option came.
    """

    def __init__(
        self, root: Path | str, stage: str, method: str, settings: Mapping[str, Any],
        default: Callable[[str], Any] = lambda key: None,
    ):  # fmt: skip
        self.root = Path(root)
        self.working = self.root / "working"
        self._path, self._default = self.root / "settings.json", default
        asked: dict[str, Any] = {"stage": stage, "method": method, "settings": _as_json(dict(settings))}
        if not self._path.exists() or self._problem(asked):
            with self.turn("settings"):
                self._settle(asked)
        # Held until this run is dropped, and compared after that: from here on nobody replaces them.
        weakref.finalize(self, os.close, hold(self._path))
        if problem := self._problem(asked):
            raise InputError(problem)
        self._remove_leftovers()

    def _settle(self, asked: dict[str, Any]) -> None:
        """Write the settings where there are none, or others that led to nothing and that nobody works under."""
        whole = asked | {"versions": library_versions(), "machine": machine()}
        if not self._path.exists():
            write_json(self._path, whole)
        elif self._problem(asked):
            with unheld(self._path) as free:
                if free and not self._made_something():
                    write_json(self._path, whole)

    def _made_something(self) -> bool:
        """Whether anything is there that was computed, finished or not."""
        names = (name for _, _, files in os.walk(self.root) for name in files)
        return any(name not in NOTHING_MADE and not name.endswith((".lock", ".tmp")) for name in names)

    def _problem(self, asked: Mapping[str, Any]) -> str:
        """What keeps this run from going on in the directory; "" if nothing does."""
        found = read_settings(self.root)
        if found["stage"] != asked["stage"]:
            return f"{self._path}: made by {found['stage']}.py, not {asked['stage']}.py; use another --output_dir"
        keys = sorted(found["settings"].keys() | asked["settings"].keys())
        both = {key: (self._told(found["settings"], key), self._told(asked["settings"], key)) for key in keys}
        changed = [f"  {key}: there {old!r}, now {new!r}" for key, (old, new) in both.items() if old != new]
        if not changed:
            return ""
        if self._made_something():
            what, remedy = f"{self._path}: this directory holds results of other settings:", "remove it to start over."
        else:
            what = f"{self._path}: another process is at work in this directory under other settings:"
            remedy = "wait until it has ended."
        return "\n".join([what, *changed, f"Use another --output_dir, or {remedy}"])

    def _told(self, settings: Mapping[str, Any], key: str) -> Any:
        return settings[key] if key in settings else _as_json(self._default(key))

    def user_dir(self, user_id: str) -> Path:
        return self.root / "users" / user_dirname(user_id)

    def result_path(self, user_id: str) -> Path:
        return self.user_dir(user_id) / "result.json"

    def done(self, user_id: str) -> bool:
        return self.result_path(user_id).exists()

    def finish(self, user_id: str, result: Mapping[str, Any]) -> None:
        """Write the user's result file: last of all its files. Its `seconds` go into a file of their own."""
        own = dict(result)
        with uninterrupted():
            if "seconds" in own:
                write_json(self.user_dir(user_id) / "seconds.json", own.pop("seconds"))
            write_json(self.result_path(user_id), own)

    # What is in progress

    def claim(self, user_ids: Sequence[str]) -> AbstractContextManager[bool]:
        """Hold these users, all or none; False where another process holds one."""
        return claim(*(self.lock_path(user_id) for user_id in user_ids))

    def lock_path(self, user_id: str) -> Path:
        return self.working / f"{user_dirname(user_id)}.lock"

    def turn(self, what: str) -> AbstractContextManager[None]:
        """Do something that one process does for all (train the task adapter, write a summary), in turn."""
        return turn(self.working / f"{what.replace(' ', '_')}.lock", what)

    def journal(self, user_ids: Sequence[str]) -> Journal:
        """The journal of the unfinished work that leads to the results of these users together."""
        digest = hashlib.sha256(json.dumps(list(user_ids)).encode()).hexdigest()[:32]
        return Journal(self.working / f"{digest}.jsonl", user_ids)

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
        results = self.journal(user_ids).recorded(RESULTS)
        if results is not None:
            self.finish_all(results)

    def _remove_leftovers(self) -> None:
        """Remove what a crash left: journals whose users were all finished by then, and locks of dead processes."""
        for path in sorted(self.working.glob("*.jsonl")):
            users = users_of(path)
            if users and all(self.done(user_id) for user_id in users):
                path.unlink(missing_ok=True)
        for path in sorted(self.working.glob("*.lock")):
            with claim(path):  # giving a lock back removes its file
                pass


def _as_json(value: Any) -> Any:
    """As it reads from a file: JSON knows no tuples."""
    return json.loads(json.dumps(value))


def read_result(path: Path) -> dict:
    """A user's result with its `seconds`, where they are known.

    Raises:
        InputError: no result of a stage, or another user's than the folder is named after.
    """
    result = read_form(path, USER_RESULT)
    if problems := merge_problems(result):
        raise InputError.many([f"{path}: {problem}" for problem in problems])
    if user_dirname(result["user_id"]) != path.parent.name:
        raise InputError(f"{path}: the result of user {result['user_id']}, in another user's folder")
    seconds = path.with_name("seconds.json")
    return result | ({"seconds": read_form(seconds, USER_RESULT["seconds?"])} if seconds.exists() else {})


def read_results(root: Path | str) -> list[dict]:
    """Results of all finished users of a run directory, in the order of the users' index; all problems at once."""
    results, problems = [], []
    for path in sorted(Path(root).glob("users/*/result.json")):
        try:
            results.append(read_result(path))
        except InputError as error:
            problems += str(error).splitlines()
    if problems:
        raise InputError.many(problems)
    return sorted(results, key=lambda result: result["index"])


def read_settings(root: Path | str) -> dict:
    """The settings.json of a run directory; InputError when it is no run directory."""
    path = Path(root) / "settings.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; {root} is not the output directory of a stage")
    return read_form(path, SETTINGS_FILE)
