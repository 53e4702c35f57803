"""Processes on one directory: claims, shares, and who does what."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime.errors import InputError
from prime.runs import locks, workers
from prime.runs import run as runs
from prime.runs.files import write_bytes, write_json
from prime.runs.locks import claim
from prime.runs.run import Run
from prime.users.data import User

ROOT = Path(__file__).resolve().parent.parent


def start(code: str, *words: str, **env: str) -> subprocess.Popen:
    """Python code in a process of its own that has not imported torch."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=os.environ | env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


HOLD = """
import sys
from pathlib import Path
from prime.runs.locks import claim
with claim(*map(Path, sys.argv[1:])) as held:
    print(held, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen]]:
    """A lock file that another process holds."""
    path = tmp_path / "working" / "b.lock"
    process = start(HOLD, str(path))
    assert process.stdout and process.stdout.readline() == "True\n"
    yield path, process
    process.kill()
    process.communicate()


# -- claims ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_told_and_not_tried_for_ever(tmp_path: Path) -> None:
    (tmp_path / "output").symlink_to(tmp_path / "disk that is not mounted")
    with pytest.raises(OSError, match="output"):
        Run(tmp_path / "output" / "movie_tagging", "mia", "users", {})


def test_a_claim_is_of_one_process_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "working" / "a.lock"
    with claim(path) as mine:
        assert mine and f"process {os.getpid()} on " in path.read_text()
        with claim(path) as again:
            assert not again  # not even this process has it twice
    assert list(tmp_path.iterdir()) == []


def test_of_several_locks_all_or_none_are_held(held: tuple[Path, subprocess.Popen]) -> None:
    path, process = held
    first = path.with_name("a.lock")
    with claim(first, path) as mine:
        assert not mine and not first.exists()
        with claim(first) as free:
            assert free
    assert f"process {process.pid} on " in locks.holder(path)


def test_the_lock_of_a_killed_process_is_free(held: tuple[Path, subprocess.Popen]) -> None:
    path, process = held
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()
    with claim(path) as mine:
        assert mine
    assert not path.parent.exists()


COUNT = """
import sys, time
from pathlib import Path
from prime.runs import locks
locks.POLL = 0.001
folder = Path(sys.argv[1])
for _ in range(40):
    with locks.turn(folder / "working" / "x.lock", "x"):
        number = int((folder / "number").read_text())
        time.sleep(0.0005)
        (folder / "number").write_text(str(number + 1))
"""


def test_only_one_at_a_time_has_a_lock_that_comes_and_goes(tmp_path: Path) -> None:
    """The file is removed after every turn, which is where such locks go wrong."""
    (tmp_path / "number").write_text("0")
    processes = [start(COUNT, str(tmp_path)) for _ in range(3)]
    assert [(p.communicate()[1].count("Traceback"), p.returncode) for p in processes] == [(0, 0)] * 3
    assert (tmp_path / "number").read_text() == "120"


def test_where_there_are_no_locks_all_is_granted_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_warned", False)
    lock = tmp_path / "working" / "a.lock"
    with claim(lock) as one, claim(lock) as two:
        assert one and two
    (tmp_path / ".x.json.abc.tmp").write_text("of a writer who may live")
    write_json(tmp_path / "x.json", {})
    assert (tmp_path / ".x.json.abc.tmp").exists()
    assert capsys.readouterr().err.count("knows no locks") == 1


# -- shares ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 7))
@settings(max_examples=60)
def test_every_rank_starts_with_its_share_and_knows_all(costs: list[int], size: int) -> None:
    parts = workers.shares(costs, size)
    assert sorted(place for part in parts for place in part) == list(range(len(costs)))
    load = [sum(costs[place] for place in part) for part in parts]
    assert max(load) <= sum(costs) / size + max(costs, default=0)
    for rank in range(size):
        order = workers.order_of(costs, rank, size)
        assert sorted(order) == list(range(len(costs)))
        assert size == 1 or order[: len(parts[rank])] == parts[rank]
    assert workers.order_of(costs, 0, 1) == list(range(len(costs)))


def test_shares_are_within_graham_s_bound_of_the_best() -> None:
    """Against all ways to part eight users among three."""
    costs = [7, 7, 6, 6, 5, 4, 4, 2]
    best = min(max(sum(c for c, r in zip(costs, ranks, strict=True) if r == own) for own in range(3))
               for ranks in product(range(3), repeat=len(costs)))  # fmt: skip
    ours = max(sum(costs[place] for place in part) for part in workers.shares(costs, 3))
    assert best <= ours <= best * 4 / 3


SHARE = """
import sys, time
from prime.runs import workers
from prime.runs.run import Run
from prime.users.data import User
workers.POLL = 0.02
run = Run(sys.argv[1], "stage", "method", {})
ids = [str(number) for number in range(12)]
for user in workers.share(run, ids, lambda user: [user], lambda user: 1 + int(user)):
    print(user, flush=True)
    if len(sys.argv) > 2 and user == sys.argv[2]:
        sys.stdin.readline()  # until it is killed
    time.sleep(0.05)
    run.finish(user, {"user_id": user, "index": int(user), "seconds": {}})
"""


def test_processes_share_users_and_none_is_done_twice(tmp_path: Path) -> None:
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"} for rank in range(3)]
    processes = [start(SHARE, str(tmp_path), **env) for env in ranks] + [start(SHARE, str(tmp_path))]  # and a helper
    found = [process.communicate()[0].split() for process in processes]
    assert sorted((user for own in found for user in own), key=int) == [str(number) for number in range(12)]
    assert len(list(tmp_path.glob("users/*/result.json"))) == 12 and not (tmp_path / "working").exists()
    assert [process.returncode for process in processes] == [0] * 4


def test_a_killed_process_loses_only_its_unfinished_user(tmp_path: Path) -> None:
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    lost = start(SHARE, str(tmp_path), "7", RANK="1", **env)  # alone at first, so it comes to user 7
    assert lost.stdout
    found = list(iter(lambda: lost.stdout.readline().strip(), "7"))
    other = start(SHARE, str(tmp_path), RANK="0", **env)
    assert other.stderr
    told = other.stderr.readline()  # when all the others are finished
    lost.kill()
    rest, _ = other.communicate()
    assert sorted([*found, *rest.split()], key=int) == [str(number) for number in range(12)]
    assert f"waiting for user 7: process {lost.pid} on " in told and other.returncode == 0


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_group_whose_results_were_cut_off_is_finished_and_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    ids = ["a", "b", "c"]
    results = [{"user_id": name, "index": place, "seconds": {"train": 1.0}} for place, name in enumerate(ids)]
    run = Run(tmp_path, "stage", "method", {})
    finish = Run.finish

    def cut_off(self: Run, name: str, result: dict) -> None:
        if name == ids[finished]:
            raise KeyboardInterrupt
        finish(self, name, result)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run.finish_all(results)
    assert [run.done(name) for name in ids] == [place < finished for place in range(3)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("users/*/*")}
    again = Run(tmp_path, "stage", "method", {})
    assert list(workers.share(again, [ids], list, len)) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert runs.read_results(tmp_path) == results and not (tmp_path / "working").exists()


def test_users_finished_in_one_of_several_runs_are_still_to_do(tmp_path: Path) -> None:
    first, last = (Run(tmp_path / name, "stage", "method", {}) for name in ("first", "last"))
    last.finish("a", {"user_id": "a", "index": 0})
    for run in (first, last):
        run.finish("b", {"user_id": "b", "index": 1})
    found = []
    for user in workers.share(last, ["a", "b"], lambda user: [user], len, [first]):
        found.append(user)
        first.finish(user, {"user_id": user, "index": 0})
    assert found == ["a"]


def test_what_is_left_of_finished_users_is_removed(tmp_path: Path) -> None:
    run = Run(tmp_path, "stage", "method", {})
    for name in ("A/7", "8"):
        for users in ([name], ["1", name], [name, "1"]):
            run.journal(users).call("question", int)
        run.lock_path(name).write_text("process 1 on nowhere\n")
    (run.working / "torn.jsonl").write_text('{"users": ["A/')
    run.finish("A/7", {"user_id": "A/7", "index": 0})
    Run(tmp_path, "stage", "method", {})
    assert len(list(run.working.iterdir())) == 6  # not the lock files, and the journal of A/7 alone
    run.finish("1", {"user_id": "1", "index": 1})
    Run(tmp_path, "stage", "method", {})
    left = [run.journal(users).path for users in (["8"], ["1", "8"], ["8", "1"])]
    assert sorted(run.working.iterdir()) == sorted([*left, run.working / "torn.jsonl"])


# -- writing --------------------------------------------------------------------------------------------------------


def test_temporary_files_of_dead_writers_go_with_the_next_write(tmp_path: Path) -> None:
    code = "import sys\nfrom prime.runs.files import *\nwith replacing(sys.argv[1]):\n    print(flush=True); input()"
    living, dead = (start(code, str(tmp_path / "x.json")) for _ in range(2))
    for process in (living, dead):
        assert process.stdout and process.stdout.readline()
    dead.kill()
    dead.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    write_json(tmp_path / "x.json", {"new": 1})
    assert len(list(tmp_path.iterdir())) == 2  # the file, and the living writer's
    living.communicate("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and living.returncode == 0


def test_folder_and_file_are_flushed_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda one, other: (events.append("rename"), replace(one, other))[1])
    write_bytes(tmp_path / "new" / "x", b"content")
    assert events == ["folder", "file", "rename", "folder"]  # the new folder's own name first


STOPPED = """
import os, signal, sys
from pathlib import Path
from prime import cli
from prime.runs import run as runs
slow = Path.write_bytes
def write(path, content):
    if b"last" in content:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    return slow(path, content)
Path.write_bytes = write
sys.argv[0] = "stage.py"
def main(_):
    runs.write_json(Path(sys.argv[1]) / "first.json", ["first"])
    runs.write_json(Path(sys.argv[1]) / "last.json", ["last"])
    runs.write_json(Path(sys.argv[1]) / "never.json", ["never"])
cli.run(main)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_let_the_write_finish_and_exit_130_with_one_line(tmp_path: Path, name: str) -> None:
    process = start(STOPPED, str(tmp_path), name)
    _, told = process.communicate()
    assert process.returncode == 130 and told == "stage.py: stopped; run the same command again to go on\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.json", "last.json"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_names_the_file_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_bytes") if call == "write" else (os, call)), full)
        with pytest.raises(OSError, match="No space left on device.*x.json"):
            write_json(path, {"new": 1})
    assert path.read_text() == '{\n "old": 1\n}\n' and len(list(tmp_path.iterdir())) == 1


# -- launchers ------------------------------------------------------------------------------------------------------


def test_the_world_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert workers.world() == (0, 1, 0, 1)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert workers.world() == (5, 8, 1, 4)


def test_other_settings_are_refused_whoever_came_first(tmp_path: Path) -> None:
    first = Run(tmp_path, "stage", "method", {"seed": 0})
    assert not first.done("1")
    with pytest.raises(InputError, match="seed: there 0, now 1"):
        Run(tmp_path, "stage", "method", {"seed": 1})


def test_results_that_are_removed_while_others_are_computed_are_missed(tmp_path: Path) -> None:
    """A folder that was deleted midway: the stage does not end as if all were there."""
    run = Run(tmp_path / "run", "stage", "prime", {})
    users = [User(name, ()) for name in ("1", "2", "3")]
    with pytest.raises(InputError, match=r"2 results were removed meanwhile \(users 1, 2\); run it again"):
        for index, user in workers.share_users(run, list(enumerate(users)), lambda _: 1):
            if user.user_id == "3":
                shutil.rmtree(run.root)
            run.finish(user.user_id, {"user_id": user.user_id, "index": index})
