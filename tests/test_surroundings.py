"""Notebooks, macOS and Windows: it works, or one line says what is needed."""

import os
import subprocess
import sys

import pytest
import world

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
