"""Notebooks, macOS, Windows, other work on the same cores: it works, or one line says what is needed."""

import os
import subprocess
import sys

import pytest
import torch
import world
from torch import nn

from prime.checkpoints import loading
from prime.runs.workers import cores


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=world.ROOT, env=os.environ | env, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "first", ["from prime import cli; from prime.report.figures import parts", "import prime.report.plots"]
)
def test_the_backend_of_a_notebook_is_not_looked_for(first: str) -> None:
    """A shell inside Jupyter or Colab has this variable, and .venv no such module."""
    code = f"{first}; import matplotlib; print(matplotlib.get_backend())"
    done = python(code, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert (done.returncode, done.stdout.strip().lower()) == (0, "agg"), done.stderr


def test_without_file_locks_one_line_says_what_is_needed() -> None:
    for script in ("gen_profile", "prepare_data"):
        done = python(f"import sys; sys.modules['fcntl'] = None; import {script}")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert "Linux or macOS" in done.stderr and "WSL" in done.stderr


def test_where_a_process_cannot_be_told_its_cores_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


def settled(model: nn.Module) -> int:
    before = torch.get_num_threads()
    try:
        loading.settle_threads(model, torch.device("cpu"))
        return torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_a_small_model_takes_one_thread_and_a_larger_one_all_cores_of_its_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large head alone makes no large model. What the environment says stays, without a word."""
    small = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8192))
    large = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 16))
    monkeypatch.setattr(loading, "cores", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert settled(small) == settled(large) == torch.get_num_threads() and capsys.readouterr().err == ""
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert (settled(small), settled(large)) == (1, 3)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in told] == ["threads: 1 of 3 cores", "threads: 3 of 3 cores"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert settled(large) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch has another OpenMP")
def test_threads_sleep_while_they_wait() -> None:
    """As the library itself tells it, when torch loads it."""
    done = python("from prime import cli; import torch", OMP_DISPLAY_ENV="TRUE")
    assert done.returncode == 0 and "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
