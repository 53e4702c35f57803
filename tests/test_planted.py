"""Results folders from strangers: a stage touches nothing outside of them, and removes nothing that is not its own."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prime.errors import InputError
from prime.runs.files import check_own, read_lines
from prime.runs.journal import Journal, users_of
from prime.runs.locks import claim
from prime.runs.run import Run, read_results, user_dirname

SETTINGS = {"seed": 0}
USERS = ["7", "8"]


def opened(root: Path) -> Run:
    return Run(root, "lora_composition_evo", "prime", SETTINGS)


def work(root: Path) -> None:
    """All that a stage does with its folder."""
    run = opened(root)
    for index, user in enumerate(USERS):
        with run.claim([user]):
            journal = run.journal([user])
            journal.call("asked", lambda: "answered")
            run.finish(user, {"user_id": user, "index": index, "seconds": {}})
            journal.drop()
    with run.turn("the summary"):
        read_results(root)
    opened(root)


def at_work(root: Path) -> Run:
    """A run folder as a stranger may hand it on: one user finished, the other begun."""
    run = opened(root)
    run.finish("7", {"user_id": "7", "index": 0, "seconds": {}})
    run.journal(["8"]).call("asked", lambda: "answered")
    run.lock_path("8").write_text("process 1 on elsewhere\n")
    return run


def link(place: Path, target: Path) -> None:
    """`target` under the name `place`; what was there stands in the target's folder, as in a real one."""
    if place.is_dir():
        place.rename(place.with_name("before"))
    place.unlink(missing_ok=True)
    place.symlink_to(target)


JOURNAL_OF_7 = '{"users": ["7"]}\n'
PLANTS: dict[str, Callable[[Run, Path], None]] = {
    "working": lambda run, victim: link(run.working, victim),
    "users": lambda run, victim: link(run.root / "users", victim),
    "a user's folder": lambda run, victim: link(run.user_dir("8"), victim),
    "a finished user's folder": lambda run, victim: link(run.user_dir("7"), victim),
    "a user's lock": lambda run, victim: link(run.lock_path("8"), victim / "notes.txt"),
    "a turn's lock": lambda run, victim: link(run.working / "settings.lock", victim / "notes.txt"),
    "a journal": lambda run, victim: link(run.journal(["8"]).path, victim / "journal.jsonl"),
    "a journal that leads nowhere": lambda run, victim: link(run.journal(["7"]).path, victim / "new.jsonl"),
    "a result": lambda run, victim: link(run.result_path("7"), victim / "notes.txt"),
    "an adapter's folder": lambda run, victim: link(run.user_dir("7") / "adapter", victim),
    "the settings": lambda run, victim: link(run.root / "settings.json", victim / "notes.txt"),
    "an attack's folder": lambda run, victim: link(run.root / "mia", victim),
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "poetry.lock").write_text("mine")
    (folder / "user_7.lock").write_text("mine")
    (folder / "journal.jsonl").write_text(JOURNAL_OF_7)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", PLANTS)
def test_no_link_of_a_results_folder_is_followed(name: str, tmp_path: Path, victim: Path) -> None:
    root = tmp_path / "run"
    PLANTS[name](at_work(root), victim)
    before = content(victim)
    for use in (work, read_results):
        with pytest.raises(InputError, match="run.*: a link; a run's folder holds folders and regular files only"):
            use(root)
    assert content(victim) == before


def test_a_folder_that_is_itself_behind_a_link_is_the_callers_choice(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    work(tmp_path / "run")
    assert len(read_results(tmp_path / "disk")) == 2


def test_files_that_are_not_the_runs_own_stay(tmp_path: Path) -> None:
    """A folder with a `working/` of somebody else's may be given as --output_dir."""
    run = at_work(tmp_path)
    foreign = ("poetry.lock", "Cargo.lock", "user_7.txt", "others.jsonl", f"{user_dirname('7')}.lock.bak")
    for name in foreign:
        (run.working / name).write_text(JOURNAL_OF_7)
    stale = run.journal(["7"]).path
    stale.write_text(JOURNAL_OF_7)
    opened(tmp_path)
    assert all((run.working / name).read_text() == JOURNAL_OF_7 for name in foreign)
    assert not stale.exists() and not run.lock_path("8").exists()  # of dead processes, and of finished users


PLACES = ["settings.json", "users/user_7/result.json", "working/user_8.lock", "working/x.jsonl"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused_by_name(kind: str, place: str, tmp_path: Path) -> None:
    at_work(tmp_path / "run")
    path = tmp_path / "run" / place
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    for use in (work, read_results, check_own):
        with pytest.raises(InputError, match=f"{place}: a (link|pipe or a device)"):
            use(tmp_path / "run")


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_nor_does_a_single_file_lead_elsewhere(kind: str, tmp_path: Path, victim: Path) -> None:
    """Where another process puts it there after the folder was looked at."""
    path = tmp_path / "x"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to({"device": "/dev/zero", "link": victim / "notes.txt"}[kind])
    for use in (Journal, users_of) if kind == "link" else (Journal, read_lines, users_of):
        if use is users_of:
            assert use(path) == []
        else:
            with pytest.raises(InputError, match="x: "):
                use(path)
    if kind != "pipe":
        with pytest.raises(OSError, match="x"), claim(path):
            pass
    assert (victim / "notes.txt").read_text() == "mine"
