"""Run directories: folder names, atomic writing, resuming."""

import json
import multiprocessing
import os
import signal
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prime.errors import InputError
from prime.runs import machine
from prime.runs.files import replacing, write_json, write_text
from prime.runs.run import RESULTS, Run, read_results, read_settings, user_dirname
from prime.seeds import derive_seed

NASTY = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="aAbB01-_./\\ ", max_size=12),
    st.sampled_from(["", ".", "..", "../..", "/etc/passwd", "a/b", "con", "NUL", "a\0b", "~", "x" * 300, "é", "é"]),
)


# -- folder names ---------------------------------------------------------------------------------------------------


@given(st.lists(NASTY, min_size=2, max_size=12, unique=True))
@example(["a", "A", "user_a", "user.a", "a ", " a", "a\n"])
@example(["x" * 64, "x" * 65, "X" * 64])
@settings(max_examples=150)
def test_user_folders_are_safe_and_differ(ids: list[str]) -> None:
    names = [user_dirname(user_id) for user_id in ids]
    assert len({name.casefold() for name in names}) == len(ids)  # also where the file system ignores case
    for name in names:
        assert name == os.path.basename(name) and name not in ("", ".", "..")
        assert len(name) <= 100 and name.isascii() and name.isprintable() and not set(name) & set('/\\:*?"<>| ')
        assert name[0] not in ".-" and name[-1] not in ". "


def test_plain_ids_stay_readable() -> None:
    assert user_dirname("1032") == "user_1032"
    assert user_dirname("Ann Lee").startswith("user.ann-lee.")
    assert user_dirname("1032") == user_dirname("1032")


def test_lone_surrogates_have_a_folder() -> None:
    """JSON may hold "\\ud800", which no UTF-8 file can."""
    assert user_dirname("\ud800") != user_dirname("\ud801")


@given(st.text(max_size=20))
@settings(max_examples=50)
def test_no_user_leaves_the_run(user_id: str) -> None:
    run = Run.__new__(Run)
    run.root = Path("/runs/one")
    assert run.user_dir(user_id).parent == Path("/runs/one/users")
    assert os.path.normpath(run.result_path(user_id)).startswith("/runs/one/users/user")


# -- seeds ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 50), st.text(max_size=5)), min_size=2, max_size=20, unique=True))
@settings(max_examples=50)
def test_seeds_differ_and_fit_63_bits(parts: list[tuple[int, str]]) -> None:
    seeds = [derive_seed(*part) for part in parts if "\x1f" not in part[1]]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_stays_what_it_is() -> None:
    """Golden: every stored result depends on it."""
    assert derive_seed("decode", 0, "u1-7") == 4712473815145255490
    assert derive_seed("a", "bc") != derive_seed("ab", "c") != derive_seed("abc")


# -- atomic writing -------------------------------------------------------------------------------------------------


def test_writing_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    write_json(path, {"b": [1, "é"], "a": None})
    assert json.loads(path.read_text("utf-8")) == {"b": [1, "é"], "a": None}
    assert list(json.loads(path.read_text("utf-8"))) == ["b", "a"] and "é" in path.read_text("utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["c.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: str
) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def crash(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), crash)
        with pytest.raises(type(error)):
            write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        assert temporary.parent == tmp_path and temporary != path
        temporary.write_bytes(b"half of the n")
        raise RuntimeError("killed")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_the_file_is_on_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("rename"), replace(self, target))[1])
    write_text(tmp_path / "x", "text")
    assert events[:2] == ["fsync", "rename"]


@pytest.mark.parametrize("value", [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}])
def test_what_is_no_json_harms_nothing(tmp_path: Path, value: dict) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, value)
    assert json.loads(path.read_text()) == {"old": 1} and len(list(tmp_path.iterdir())) == 1


# -- runs -----------------------------------------------------------------------------------------------------------

SETTINGS = {"seed": 0, "lr": 1e-4, "names": ["a", "b"], "path": None}


def make(root: Path, **changes: object) -> Run:
    return Run(root, "lora_composition_evo", "prime", SETTINGS | changes)


def test_the_same_settings_resume(tmp_path: Path) -> None:
    make(tmp_path).finish("7", {"user_id": "7", "index": 0})
    before = (tmp_path / "settings.json").read_text()
    again = make(tmp_path, names=("a", "b"))  # JSON knows no tuples
    assert again.done("7") and not again.done("8")
    assert (tmp_path / "settings.json").read_text() == before
    assert read_settings(tmp_path)["settings"] == SETTINGS
    assert set(read_settings(tmp_path)["versions"]) >= {"python", "torch", "peft", "nevergrad", "cma"}


def test_the_machine_is_recorded_with_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("0", "1"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "information").write_text("Model: \t\t NVIDIA H100\nIRQ: 7\n")
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    make(tmp_path / "run")
    told = json.loads((tmp_path / "run" / "settings.json").read_text())["machine"]
    assert told.endswith(f"{os.cpu_count()} CPU cores, 2 x NVIDIA H100")
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "none")
    assert machine.machine().endswith("CPU cores")


def test_other_settings_are_refused_with_every_differing_key(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.finish("7", {"user_id": "7", "index": 0})
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        make(tmp_path, seed=3, extra="new", path="p")
    message = str(error.value)
    assert "seed: there 0, now 3" in message and "extra: there None, now 'new'" in message and "path" in message
    assert "lr" not in message and "names" not in message and str(tmp_path) in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


COMPUTED = ["users/user_7/evaluations.jsonl", "working/0123.jsonl", "adapter_config.json", "sharers/users/a/x.bin"]


@pytest.mark.parametrize("name", COMPUTED)
def test_settings_that_led_to_nothing_make_way_and_others_do_not(tmp_path: Path, name: str) -> None:
    """A wrong model path, say: the stage failed after it had opened its run."""
    make(tmp_path, path="wrong")
    for path in ("users/user_7", "sharers", "working"):
        (tmp_path / path).mkdir(exist_ok=True, parents=True)
    for path in ("noise.key", "users/user_7/.x.json.1.tmp", "sharers/settings.json", "working/user_7.lock"):
        (tmp_path / path).write_text("left behind")
    make(tmp_path, path="right")
    assert read_settings(tmp_path)["settings"] == SETTINGS | {"path": "right"}
    write_text(tmp_path / name, "")
    with pytest.raises(InputError, match="results of other settings:\n  path: there 'right', now 'wrong'\nUse another"):
        make(tmp_path, path="wrong")
    assert read_settings(tmp_path)["settings"]["path"] == "right"


def work_in(root: Path, seed: int, opened: Barrier, done: Barrier) -> None:
    """Open the run at the same time as others, and finish a user under its settings; `done` while it is held."""
    opened.wait()
    try:
        run = make(root, seed=seed)
        run.finish(str(seed), {"user_id": str(seed), "index": 0, "weights": [seed]})
    finally:
        done.wait()


def start(work: object, *args: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


@pytest.mark.slow
def test_of_processes_with_different_settings_one_gets_the_directory(tmp_path: Path) -> None:
    """A new directory, or one of settings that led to nothing, which all of them would replace."""
    for attempt in range(6):
        root = tmp_path / str(attempt)
        if attempt % 2:
            make(root, seed=99)
        opened, done = (multiprocessing.get_context("fork").Barrier(6) for _ in range(2))
        begun = [start(work_in, root, seed, opened, done) for seed in range(6)]
        for process in begun:
            process.join()
        (result,) = read_results(root)
        assert read_settings(root)["settings"]["seed"] == int(result["user_id"])
        assert sorted(process.exitcode or 0 for process in begun) == [0, 1, 1, 1, 1, 1]


def test_settings_under_which_somebody_works_stay_until_he_is_gone(tmp_path: Path) -> None:
    opened, never = (multiprocessing.get_context("fork").Barrier(2) for _ in range(2))

    def wait_inside() -> None:
        run = make(tmp_path, path="his")
        opened.wait()
        never.wait()
        assert run

    other = start(wait_inside)
    opened.wait()
    make(tmp_path, path="his")  # to share the work
    with pytest.raises(InputError, match="is at work in this directory under other settings:\n  path: "):
        make(tmp_path)
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    make(tmp_path)
    assert read_settings(tmp_path)["settings"] == SETTINGS


def test_settings_older_than_an_option_are_those_with_its_default(tmp_path: Path) -> None:
    defaults = {"holdout": 0.0, "k_list": (1, 2), "gone": 3}

    def opened(**changes: object) -> Run:
        return Run(tmp_path, "mia", "mia", SETTINGS | changes, defaults.get)

    Run(tmp_path, "mia", "mia", SETTINGS | {"gone": 3}).finish("7", {"user_id": "7", "index": 0})
    before = (tmp_path / "settings.json").read_bytes()
    assert opened(holdout=0.0, k_list=(1, 2)).done("7")
    with pytest.raises(InputError, match="\n  holdout: there 0.0, now 0.2\n  k_list: there .1, 2., now .1.\nUse"):
        opened(holdout=0.2, k_list=(1,))
    assert (tmp_path / "settings.json").read_bytes() == before


def test_another_stages_directory_is_refused(tmp_path: Path) -> None:
    make(tmp_path).finish("7", {"user_id": "7", "index": 0})
    with pytest.raises(InputError, match=r"settings.json: made by lora_composition_evo.py, not mia.py"):
        Run(tmp_path, "mia", "prime", SETTINGS)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"stage": "lora_composition_evo", "settings": []}'])
def test_a_broken_settings_file_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(InputError, match="settings.json"):
        make(tmp_path)


def test_only_a_result_marks_a_user_as_done(tmp_path: Path) -> None:
    run = make(tmp_path)
    folder = run.user_dir("A/7")
    folder.mkdir(parents=True)
    (folder / "evaluations.jsonl").write_text("{}\n")
    (folder / ".result.json.x1.tmp").write_text("{")
    assert not run.done("A/7") and read_results(tmp_path) == []
    run.finish("A/7", {"user_id": "A/7", "index": 4})
    run.finish("3", {"user_id": "3", "index": 12})
    run.finish("b", {"user_id": "b", "index": 0})
    assert run.done("A/7")
    assert [result["user_id"] for result in read_results(tmp_path)] == ["b", "A/7", "3"]


FOREIGN: list[object] = [
    [{"user_id": "8", "index": 0}], [{"user_id": "7"}], [{"index": 0}], [{"user_id": "7", "index": 0, "weights": "x"}],
    {"user_id": "7"}, [7], [], "7", [[[]]],
]  # fmt: skip


@pytest.mark.parametrize("results", FOREIGN)
def test_a_journal_of_somebody_else_finishes_nobody(results: object, tmp_path: Path) -> None:
    run = make(tmp_path)
    run.journal(["7"]).call(RESULTS, lambda: results)
    run.recover(["7"])
    assert not run.done("7")
    run.finish_all([{"user_id": "7", "index": 0}])
    assert [result["user_id"] for result in read_results(tmp_path)] == ["7"]


@pytest.mark.parametrize("lost", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "log.jsonl"])
def test_a_user_whose_file_is_lost_is_done_again(lost: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make(tmp_path)
    for name in ("7", "8"):
        for file in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "log.jsonl", ".log.x.tmp"):
            write_text(run.user_dir(name) / file, "{}")
        run.finish(name, {"user_id": name, "index": int(name), "seconds": {}})
    assert make(tmp_path).done("7") and capsys.readouterr().err == ""
    (run.user_dir("7") / lost).unlink()
    again = make(tmp_path)
    assert not again.done("7") and again.done("8")
    assert f"{lost} is lost, so this user is done again" in capsys.readouterr().err


def test_a_result_that_names_no_files_stands_as_it_is(tmp_path: Path) -> None:
    """Of an older version; and one that is not readable is told of where it is read."""
    make(tmp_path).finish("7", {"user_id": "7", "index": 0})
    (tmp_path / "users" / "user_8").mkdir()
    (tmp_path / "users" / "user_8" / "result.json").write_text('{"files": [7')
    assert make(tmp_path).done("7") and make(tmp_path).done("8")
    with pytest.raises(InputError, match="user_8/result.json: line 1"):
        read_results(tmp_path)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="settings.json: no such file"):
        read_settings(tmp_path / "nowhere")
    assert read_results(tmp_path / "nowhere") == []
