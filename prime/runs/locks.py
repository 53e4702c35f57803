"""Claims: locked files say who works on what, so that several processes can share a run directory.

A claim is an advisory lock (`flock`) on a file. The kernel releases it when its holder dies, however that happens. It
holds between the processes of one machine, and between machines whose shared file system passes locks on (NFS 4,
Lustre mounted with `flock`). On a file system without locks every claim is granted: see docs/scaling.md.
"""

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from prime.errors import tell

try:
    import fcntl
except ImportError:
    tell("this toolkit needs Linux or macOS, whose file locks keep runs apart; on Windows run it in WSL")
    sys.exit(2)

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
POLL = 0.2  # seconds between two looks at a claim that somebody else holds
PATIENCE = 5  # looks in vain before a message says who is waited for
FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a link leads elsewhere, a pipe would be waited for
TRIES = 100  # to create a folder that other processes may be removing


@contextmanager
def claim(*paths: Path) -> Iterator[bool]:
    """Hold the lock files `paths`, all or none; False where another process holds one.

    At the end they are removed, and so is their folder if it is empty.
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
    """Hold the lock file `path`, after waiting for it if need be; `what` names in a message what is waited for."""
    for look in count(1):
        with claim(path) as held:
            if held:
                yield
                return
        if look == PATIENCE:
            tell(f"waiting for {what}: {holder(path)} is at it")
        time.sleep(POLL)


def holder(path: Path) -> str:
    """Who holds a lock file, as the holder wrote into it."""
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


def _lock(path: Path) -> int | None:
    """An open handle that holds the lock; None where another process holds it."""
    failed = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | FLAGS, 0o644)
        except (FileExistsError, FileNotFoundError):  # the folder was just removed by the last of the others
            failed += 1
            if failed == TRIES:  # nobody removes it: the path leads through a broken link, or the like
                raise
            continue
        try:
            if grab(handle) is False:
                os.close(handle)
                return None
            if still_names(path, handle):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder before us removed the file under this name


def hold(path: Path) -> int:
    """An open handle of a file: as long as any process has one, `unheld` is False for all others."""
    while True:
        handle = os.open(path, os.O_RDONLY | FLAGS)
        try:
            with suppress_without_locks():
                fcntl.flock(handle, fcntl.LOCK_SH)
            if still_names(path, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # replaced in the meantime


@contextmanager
def unheld(path: Path) -> Iterator[bool]:
    """Whether no process holds a file (see `hold`), and none begins to within this block.

    False on a file system without locks.
    """
    try:
        handle = os.open(path, os.O_RDWR | FLAGS)
    except OSError:
        yield False
        return
    try:
        yield grab(handle) is True and still_names(path, handle)
    finally:
        os.close(handle)


def grab(handle: int) -> bool | None:
    """Whether an open file could be locked, without waiting; None on a file system without locks."""
    try:
        with suppress_without_locks():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    return None


@contextmanager
def suppress_without_locks() -> Iterator[None]:
    """Go on where the file system knows no locks, with one warning."""
    try:
        yield
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        _warn_once()


def remove_abandoned(path: Path) -> None:
    """Remove a temporary file unless its writer holds the lock on it, and so is still alive."""
    try:
        handle = os.open(path, os.O_RDWR | FLAGS)
    except OSError:
        return
    if grab(handle) is True:
        path.unlink(missing_ok=True)
    os.close(handle)


def still_names(path: Path, handle: int) -> bool:
    """Whether the path still names the open file, and nobody has removed or replaced it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _release(path: Path, handle: int) -> None:
    path.unlink(missing_ok=True)
    os.close(handle)
    with suppress(OSError):  # not empty: others still work there
        path.parent.rmdir()


_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        risk = "processes that share an output directory may do a user twice (the files stay whole); use --user_idxs"
        tell(f"this file system knows no locks: {risk}")
