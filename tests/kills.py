"""A stage that is killed and started again, against the same stage left alone: what the kill tests are made of.

Each stage runs on a small cut of the demo world, in a copy of the folder that the stages before it filled. What must
not happen: files that differ from those of the undisturbed run, and users computed again though they were finished.
"""

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import world
from forks import Forks

TASK = "movie_tagging"
SHORT = ["--k_list", "1", "--recent_k", "4"]
COMMON = ["--task_name", TASK, "--llama_model_path", world.CHECKPOINT]
ADAPTED = [*COMMON, "--lora_ckpt", "out/task"]
TRAINING = ["--epochs", "1", "--lr", "5e-3"]
# In the order they run; each fills the folder of its name in out/, mia the one of evo.
STAGES: dict[str, list[str]] = {
    "task": ["task_lora.py", *COMMON, *TRAINING, "--k_list", "1"],
    "selection": ["history_anchor.py", "--task_name", TASK, "--encoder", world.CHECKPOINT, "--k", "6"],
    "anchors": ["train_anchor_peft.py", *ADAPTED, *TRAINING, "--recent_k", "4", "--anchors_per_batch", "3"],
    "gates": ["train_anchor_gate.py", *ADAPTED, "--anchor_path", "out/anchors", "--max_step", "2", "--recent_k", "4",
              "--anchors_per_batch", "3"],
    "evo": ["lora_composition_evo.py", *ADAPTED, *SHORT, "--anchor_dir", "out/anchors", "--opt_budget", "5"],
    "composed": ["lora_composition.py", *ADAPTED, *SHORT, "--anchor_dir", "out/anchors", "--gate_dir", "out/gates"],
    "oppu": ["train_user_peft.py", "--method", "oppu", *ADAPTED, *TRAINING, *SHORT, "--users_per_batch", "2"],
    "mia": ["mia.py", *ADAPTED, "--anchor_dir", "out/anchors", "--exp_dir", "out/evo", "--recent_k", "4",
            "--users_per_batch", "2"],
}  # fmt: skip
SELECTED = ("anchors", "gates", "evo", "composed", "oppu")


def command(stage: str) -> list[str]:
    """The stage's command, run in the world's folder."""
    words = list(STAGES[stage])
    if stage in SELECTED:
        words += ["--anchor_selection_dir", "out/selection"]
    return words if stage == "mia" else [*words, "--output_dir", f"out/{stage}"]


def output(stage: str) -> str:
    """The folder in out/ that the stage writes to."""
    return "evo" if stage == "mia" else stage


def files(folder: Path) -> dict[str, bytes]:
    """All files under a folder but the seconds they took, by relative path."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "seconds.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def differing(files: Mapping[str, bytes], others: Mapping[str, bytes]) -> list[str]:
    return sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Result files now there, with what would change if they were written again."""
    stats = {path: path.stat() for path in folder.rglob("result.json")}
    return {str(path.relative_to(folder)): (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def users_of(folder: Path, results: Iterable[str]) -> set[str]:
    return {str(world.read(folder / name)["user_id"]) for name in results}


@dataclass
class Stage:
    """A stage run without interruption, and the folder to start it from."""

    name: str
    before: Path  # the world, in which the stage has not run
    whole: dict[str, bytes]  # its files when left alone
    seconds: float  # of the CPU; how long they last depends on who else uses the machine
    operations: int  # of files


@dataclass
class Outcome:
    """What became of a run that was interrupted and started again."""

    stage: str
    kills: int  # that came before the stage was through
    differing: list[str]
    again: list[str]  # users finished at a kill, and computed or written again
    runs: int = 1

    def __bool__(self) -> bool:
        return not self.differing and not self.again


def prepare(forks: Forks, folder: Path, test_users: int = 3, anchors: int = 4) -> Iterator[Stage]:
    """Run the stages in a row; each one as it is when its turn has come."""
    source = folder / "world"
    world.build(source, TASK, test_users, anchors)
    for name in STAGES:
        before = folder / f"before-{name}"
        copy(source, before)
        log = folder / f"{name}.log"
        assert forks.run(command(name), source, log) == 0, log.read_text()
        operations, seconds = re.findall(r"operations: (\d+), CPU seconds: (.+)", log.read_text())[-1]
        yield Stage(name, before, files(source / "out" / output(name)), float(seconds), int(operations))


def copy(source: Path, target: Path) -> None:
    """The world's folder again; what is only read is linked."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name == "out":
            shutil.copytree(path, target / "out")
        else:
            (target / path.name).symlink_to(path.resolve())


def kill_after(pid: int, seconds: float) -> None:
    """SIGKILL once a process has used so many seconds of the CPU, or has ended."""
    process = psutil.Process(pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        times = process.cpu_times()
        if times.user + times.system >= seconds:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.002)


def killed(forks: Forks, stage: Stage, folder: Path, log: Path, stream: random.Random, share: float) -> bool:
    """Start a stage and kill it at a random file operation or moment; False where it was through before that.

    Args:
        share: of its operations, or seconds, that the kill falls into; less is left to do after each kill.
    """
    at_operation = stream.random() < 0.5
    kill_at = stream.randint(1, max(1, int(share * stage.operations))) if at_operation else 0
    pid = forks.start(command(stage.name), folder, log, kill_at=kill_at)
    if not at_operation:
        kill_after(pid, stream.uniform(0.0, share * stage.seconds))
    code = forks.wait(pid)
    assert code in (0, -signal.SIGKILL), log.read_text()
    return code != 0


def interrupt(forks: Forks, stage: Stage, folder: Path, stream: random.Random, kills: int = 1) -> Outcome:
    """Kill a stage up to `kills` times, each time starting it again, let it finish, and look at what is there."""
    copy(stage.before, folder)
    out = folder / "out" / output(stage.name)
    outcome = Outcome(stage.name, 0, [], [])
    done: dict[str, tuple[int, int]] = {}
    for attempt in range(kills + 1):
        log = folder / f"{attempt}.log"
        users = users_of(out, done)
        if attempt < kills:
            outcome.kills += killed(forks, stage, folder, log, stream, 1 / (attempt + 1))
        else:
            assert forks.run(command(stage.name), folder, log) == 0, log.read_text()
        work = Path(f"{log}.work")
        computed = users & set(work.read_text().split()) if work.exists() else set()
        after = finished(out)
        outcome.again += sorted({*computed, *(name for name in done if done[name] != after.get(name))})
        done = after
    outcome.differing = differing(files(out), stage.whole)
    return outcome


def interrupt_often(
    forks: Forks, stage: Stage, folder: Path, stream: random.Random, kills: int, at_once: int
) -> Outcome:
    """Interrupted runs, of up to `at_once` kills each, until there were `kills` of them."""
    total = Outcome(stage.name, 0, [], [], runs=0)
    while total.kills < kills:
        outcome = interrupt(forks, stage, folder / str(total.runs), stream, min(at_once, kills - total.kills))
        total.kills += outcome.kills
        total.runs += 1
        total.differing += outcome.differing
        total.again += outcome.again
    return total


def together(forks: Forks, stage: Stage, folder: Path, size: int = 2, lose: bool = False) -> Outcome:
    """Run a stage by several processes at once, as torchrun does; `lose`: the last of them is killed midway."""
    copy(stage.before, folder)
    pids = []
    for rank in range(size):
        env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        pids.append(forks.start(command(stage.name), folder, folder / f"{rank}.log", env=env))
    if lose:
        kill_after(pids[-1], stage.seconds / 4)
    codes = [forks.wait(pid) for pid in pids]
    logs = "".join((folder / f"{rank}.log").read_text() for rank in range(size))
    assert codes[:-1] == [0] * (size - 1) and codes[-1] in ((0, -signal.SIGKILL) if lose else (0,)), logs
    processes = Counter[str]()  # that computed for a user
    for path in folder.glob("*.log.work"):
        processes.update(set(path.read_text().split()))
    twice = [] if lose else sorted(user for user, count in processes.items() if count > 1)
    out = folder / "out" / output(stage.name)
    return Outcome(stage.name, int(codes[-1] != 0), differing(files(out), stage.whole), twice)


def fill_disk(forks: Forks, stage: Stage, folder: Path, stream: random.Random) -> tuple[Outcome, str]:
    """Let the disk be full from a random file operation on, start again with room; also what the first run said."""
    copy(stage.before, folder)
    log = folder / "full.log"
    code = forks.run(command(stage.name), folder, log, full_at=stream.randint(1, stage.operations - 1))
    assert code in (0, 2), log.read_text()  # 0: only removing was left to do
    assert forks.run(command(stage.name), folder, folder / "again.log") == 0
    out = folder / "out" / output(stage.name)
    return Outcome(stage.name, code // 2, differing(files(out), stage.whole), []), log.read_text()
