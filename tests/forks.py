"""Stage scripts in forks of one process that has imported everything: a run costs its work, not seconds of imports.

A fork can be killed from outside at any time, or from inside at its nth file operation, and its disk can fill up there.
"""

import contextlib
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "task_lora", "history_anchor", "train_anchor_peft", "train_anchor_gate", "lora_composition", "lora_composition_evo",
    "train_user_peft", "mia",
)  # fmt: skip


class Forks:
    """The process that forks; `start` returns as soon as a stage runs, `wait` when it has ended."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )

    def _ask(self, **request: Any) -> Any:
        assert self.server.stdin and self.server.stdout
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(
        self, words: Sequence[str], folder: Path, log: Path, env: dict[str, str] | None = None,
        kill_at: int = 0, full_at: int = 0,
    ) -> int:  # fmt: skip
        """Run a command in `folder`, its output in `log`; the process id.

        Args:
            kill_at: SIGKILL at this file operation, counted from 1 (0: never).
            full_at: from this file operation on the disk is full.
        """
        return self._ask(
            words=list(words), folder=str(folder), log=str(log), env=env or {}, kill_at=kill_at, full_at=full_at
        )

    def wait(self, pid: int) -> int:
        """Its exit code, negative the signal that killed it."""
        return self._ask(wait=pid)

    def run(self, words: Sequence[str], folder: Path, log: Path, **options: Any) -> int:
        return self.wait(self.start(words, folder, log, **options))

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()


@contextlib.contextmanager
def forks() -> Iterator[Forks]:
    own = Forks()
    try:
        yield own
    finally:
        own.close()


# -- in the process that forks --------------------------------------------------------------------------------------


class Operations:
    """Counts a process's file operations; at the nth kills it, or from the nth on lets them fail for want of space."""

    def __init__(self, kill_at: int, full_at: int):
        self.kill_at, self.full_at, self.count = kill_at, full_at, 0
        self.write_bytes = Path.write_bytes
        Path.write_bytes = lambda path, content: self._write_bytes(path, content)
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, self._counted(getattr(os, name), fills=name != "unlink"))

    def step(self, fills: bool) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if fills and 0 < self.full_at <= self.count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _counted(self, call: Any, fills: bool) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step(fills)
            return call(*args, **kwargs)

        return counted

    def _write_bytes(self, path: Path, content: bytes) -> int:
        """Half of it before the operation counts, so that what is cut off is a torn file."""
        self.write_bytes(path, content[: len(content) // 2])
        self.step(fills=True)
        return self.write_bytes(path, content)


def note_work(module: Any, log: str) -> None:
    """Have `log`.work list for whom a stage computes: a line per user that is trained, predicted for, or attacked."""

    def note(names: Sequence[str]) -> None:
        with open(log + ".work", "a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in names)

    names_of = {
        "predict": lambda engine, texts, user, *rest: [user.user_id],
        "train": lambda bank, learners, *rest: [learner.name.split()[-1] for learner in learners],
        "attack": lambda subject, *rest: [subject.user_id],
    }
    for name, of in names_of.items():
        call = getattr(module, name, None)
        if call is not None:

            def noted(*args: Any, _call: Any = call, _of: Any = of, **kwargs: Any) -> Any:
                note(_of(*args))
                return _call(*args, **kwargs)

            setattr(module, name, noted)


def child(request: dict[str, Any]) -> int:
    """Run a stage in this process; the exit code."""
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["folder"])
    os.environ.update(request["env"])
    sys.argv = request["words"]
    module = sys.modules[request["words"][0].removesuffix(".py")]
    note_work(module, request["log"])
    operations = Operations(request["kill_at"], request["full_at"])
    from prime import cli

    try:
        cli.run(module.main)
    except SystemExit as error:
        return int(error.code or 0)
    print(f"operations: {operations.count}, CPU seconds: {time.process_time()}", flush=True)
    return 0


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    for name in (*SCRIPTS, "sklearn.cluster", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = child(request)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
