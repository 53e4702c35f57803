"""Whole stages that are killed, run out of disk, or run by several processes, against stages left alone."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forks
import kills
import pytest
import world

pytestmark = pytest.mark.slow

KILLS = 3  # of each stage: 24 in a run of the tests; `benchmarks/kills.py` does 20 of each


@pytest.fixture(scope="module")
def server() -> Iterator[forks.Forks]:
    with forks.forks() as own:
        yield own


@pytest.fixture(scope="module")
def stages(server: forks.Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, kills.Stage]:
    return {stage.name: stage for stage in kills.prepare(server, tmp_path_factory.mktemp("stages"))}


@pytest.mark.parametrize("name", kills.STAGES)
def test_a_killed_stage_ends_with_the_same_bytes_and_finished_users_are_left_alone(
    server: forks.Forks, stages: dict[str, kills.Stage], tmp_path: Path, name: str
) -> None:
    stream = random.Random(f"kill {name}")
    outcome = kills.interrupt_often(server, stages[name], tmp_path, stream, KILLS, at_once=KILLS)
    assert outcome and outcome.kills == KILLS, outcome


@pytest.mark.parametrize("name", ["task", "anchors", "evo", "mia"])
def test_two_processes_write_the_files_of_one_and_no_user_is_done_twice(
    server: forks.Forks, stages: dict[str, kills.Stage], tmp_path: Path, name: str
) -> None:
    outcome = kills.together(server, stages[name], tmp_path / "run")
    assert outcome, outcome


def test_the_other_process_finishes_what_a_lost_one_leaves(
    server: forks.Forks, stages: dict[str, kills.Stage], tmp_path: Path
) -> None:
    outcome = kills.together(server, stages["evo"], tmp_path / "run", lose=True)
    assert outcome, outcome


@pytest.mark.parametrize("name", ["anchors", "oppu"])
def test_a_full_disk_is_one_clear_error_and_the_stage_goes_on_when_there_is_room(
    server: forks.Forks, stages: dict[str, kills.Stage], tmp_path: Path, name: str
) -> None:
    outcome, told = kills.fill_disk(server, stages[name], tmp_path / "run", random.Random(f"full {name}"))
    assert outcome, outcome
    if outcome.kills:
        assert told.count("No space left on device") == 1 and "Traceback" not in told, told
        assert "make room and run the same command again" in told


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk, which takes root")
def test_a_disk_that_is_really_full(server: forks.Forks, stages: dict[str, kills.Stage], tmp_path: Path) -> None:
    stage, folder = stages["evo"], tmp_path / "run"
    kills.copy(stage.before, folder)
    out = folder / "out" / "evo"
    out.mkdir()
    room = sum(map(len, stage.whole.values())) // 2
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", out]).returncode:
        pytest.skip("no right to mount a disk here")
    try:
        words = kills.command("evo")
        assert server.run(words, folder, folder / "full.log") == 2
        told = (folder / "full.log").read_text()
        assert told.count("No space left on device") == 1 and "Traceback" not in told, told
        subprocess.run(["mount", "-o", "remount,size=100m", out], check=True)
        done = kills.finished(out)
        assert server.run(words, folder, folder / "again.log") == 0
        after = kills.finished(out)
        assert all(after[name] == done[name] for name in done)
        assert kills.differing(kills.files(out), stage.whole) == []
    finally:
        subprocess.run(["umount", out], check=True)


ASKED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from prime import cli
from prime.runs.files import write_text
def main(_):
    name = "-".join(os.environ.get(key, "none") for key in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"))
    write_text(Path("ranks") / name, " ".join(sys.argv[1:]))
cli.run(main)
"""


def test_torchrun_starts_a_stage_as_processes_with_ranks(tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(ASKED.format(root=str(world.ROOT)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    done = subprocess.run([*launcher, str(script), "--k", "3"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {path.name: path.read_text() for path in (tmp_path / "ranks").iterdir()}
    assert found == {"0-2-1": "--k 3", "1-2-1": "--k 3"}
