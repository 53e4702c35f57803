"""Time and memory for programs of strangers, which chat templates are: transformers' sandbox bounds neither."""

import os
import resource
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SECONDS = 1.0  # of CPU time
MEMORY = 128 << 20  # bytes, beside what the process has


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Within this block TimeoutError after so much CPU time, and MemoryError beyond `MEMORY`.

    A single operation of the interpreter is not interrupted: see `ends_in_time`. In other threads than the main one
    there is no limit of time.
    """

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds:g} s")

    timed = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        _limit_memory(hard)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


def ends_in_time(work: Callable[[], object], seconds: float = SECONDS) -> bool:
    """Whether `work` comes to an end, successful or not: tried in a process of its own, which is ended at the limit."""
    with warnings.catch_warnings():  # of threads: torch's, which the other process leaves alone
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        try:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it does
            signal.setitimer(signal.ITIMER_PROF, seconds)
            _limit_memory(resource.getrlimit(resource.RLIMIT_AS)[1])
            work()
        finally:
            os._exit(0)
    try:
        return os.waitpid(pid, 0)[1] == 0
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _limit_memory(hard: int) -> None:
    with suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
