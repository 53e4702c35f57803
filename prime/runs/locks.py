"""Claims: who works on what, told by locked files, so that processes share a run directory instead of spoiling it.

A claim is an advisory lock (`flock`) on a file, which the kernel takes back when its holder dies, however that happens.
It holds between the processes of one machine, and between machines whose shared file system passes locks on (NFS 4,
Lustre mounted with `flock`). Where a file system knows no locks, every claim is granted: see docs/scaling.md.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from prime.errors import tell

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
POLL = 0.2  # seconds between two looks at a claim that somebody else holds
PATIENCE = 5  # looks before the waiting person is told
TRIES = 100  # to make a folder that others may be removing


@contextmanager
def claim(*paths: Path) -> Iterator[bool]:
    """Hold the lock files `paths`, all or none; False where somebody else holds one.

    They are removed at the end, and so is their folder when it is empty.
    """
    with ExitStack() as held:
        handles: list[int] = []
        for path in paths:
            handle = _lock(path)
            if handle is None:
                break
            handles.append(handle)
            held.callback(_release, path, handle)
        if len(handles) < len(paths):
            held.close()
        yield len(handles) == len(paths)


@contextmanager
def turn(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, waiting for it if need be; `what` tells the waiting person what for."""
    for look in count(1):
        with claim(path) as held:
            if held:
                yield
                return
        if look == PATIENCE:
            tell(f"waiting for {what}: {holder(path)} is at it")
        time.sleep(POLL)


def holder(path: Path) -> str:
    """Who holds a lock file, as they wrote it there."""
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


def _lock(path: Path) -> int | None:
    """An open handle that holds the lock, None where another has it."""
    failed = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (FileExistsError, FileNotFoundError):  # the folder was just removed by the last of the others
            failed += 1
            if failed == TRIES:  # no: it leads through a link to nowhere, or the like
                raise
            continue
        try:
            if grab(handle) is False:
                os.close(handle)
                return None
            if _is_still(path, handle):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder before us removed the file under this name


def hold(path: Path) -> int:
    """An open handle of a file that keeps `unheld` away as long as it is open; any number of processes have one."""
    while True:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with suppress_without_locks():
                fcntl.flock(handle, fcntl.LOCK_SH)
            if _is_still(path, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # replaced in the meantime


@contextmanager
def unheld(path: Path) -> Iterator[bool]:
    """Whether nobody holds a file; while this lasts, nobody begins to. Never where the file system knows no locks."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        yield grab(handle) is True and _is_still(path, handle)
    finally:
        os.close(handle)


def grab(handle: int) -> bool | None:
    """Lock an open file, without waiting; None where the file system knows no locks."""
    try:
        with suppress_without_locks():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    return None


@contextmanager
def suppress_without_locks() -> Iterator[None]:
    """Warn, once, and go on where the file system knows no locks."""
    try:
        yield
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        _warn_once()


def remove_abandoned(path: Path) -> None:
    """Remove a file that its writer, who would lock it, no longer lives to finish."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    if grab(handle) is True:
        path.unlink(missing_ok=True)
    os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _release(path: Path, handle: int) -> None:
    path.unlink(missing_ok=True)
    os.close(handle)
    with suppress(OSError):  # others still work there
        path.parent.rmdir()


_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        told = "processes that share an output directory may do a user twice (the files stay whole); use --user_idxs"
        tell(f"this file system knows no locks: {told}")
