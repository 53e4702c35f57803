"""Processes that work on one output directory together, on one machine or many.

`torchrun` gives each process a rank; each begins with its share of the users, the costly ones first, and then helps the
others. Nothing is sent between them: result files say what is finished, and claims (`runs/locks.py`) who works on what.
So processes may come, die and come back at any time, and others that are started by hand or by a scheduler on the same
directory share the work as well.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeVar

from prime.errors import tell
from prime.runs.locks import PATIENCE, POLL, holder
from prime.runs.run import Run


class HasId(Protocol):
    @property
    def user_id(self) -> str: ...


User = TypeVar("User", bound=HasId)
Unit = TypeVar("Unit")


class World(NamedTuple):
    """The place of this process among those that were launched together (torchrun's environment)."""

    rank: int
    size: int
    local_rank: int  # on this machine: the number of its GPU
    local_size: int


def world() -> World:
    return World(_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1))


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def limit_threads() -> None:
    """Part this machine's cores among the local processes, unless OMP_NUM_THREADS says how many each takes."""
    local = world().local_size
    if local > 1 and not os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
ALWAYS_MAPPED = 32 << 20  # glibc gives blocks from this size back to the system at once (DEFAULT_MMAP_THRESHOLD_MAX)


def keep_freed_memory() -> None:
    """Let glibc keep smaller blocks that are freed: the next pass takes them again, and every page that was given back
    costs a fault, which is dear on a virtual machine. The heap's free end is kept up to 2 GiB.
    """
    with suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, ALWAYS_MAPPED)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def shares(costs: Sequence[int], size: int) -> list[list[int]]:
    """Places parted among `size` processes, each to whom has the least so far, the costliest first (Graham 1969:
    longest processing time first, at most 4/3 of the best possible time).
    """
    load = [0] * size
    parts: list[list[int]] = [[] for _ in range(size)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        rank = load.index(min(load))
        load[rank] += costs[place]
        parts[rank].append(place)
    return parts


def order_of(costs: Sequence[int], rank: int, size: int) -> list[int]:
    """The places in the order this process works on them: its own share, then the ends of the others'."""
    if size == 1:
        return list(range(len(costs)))
    parts = shares(costs, size)
    others = [place for step in range(1, size) for place in reversed(parts[(rank + step) % size])]
    return parts[rank] + others


def share(
    run: Run, units: Sequence[Unit], ids: Callable[[Unit], Sequence[str]], cost: Callable[[Unit], int],
    others: Sequence[Run] = (),
) -> Iterator[Unit]:  # fmt: skip
    """Units of work, each claimed as long as the caller works on it, until the users of all are finished.

    Units that others work on are waited for at the end, and taken over if these die.

    Args:
        units: of which every process gives the same ones in the same order.
        ids: of the users that a unit finishes.
        cost: estimate of its work, in any measure.
        others: further runs in which the same work finishes the users.
    """
    here = world()
    waiting = [units[place] for place in order_of([cost(unit) for unit in units], here.rank, here.size)]
    idle = 0
    while waiting:
        held: list[Unit] = []
        for unit in waiting:
            names = ids(unit)
            if _finished([run, *others], names):
                continue
            with run.claim(names) as mine:
                if not mine:
                    held.append(unit)
                    continue
                run.recover(names)
                if not _finished([run, *others], names):
                    yield unit
        if len(held) == len(waiting):
            idle += 1
            if idle == PATIENCE:
                _tell(run, [name for unit in held for name in ids(unit)])
            time.sleep(POLL)
        waiting = held


def open_users(users: Sequence[User], indices: Iterable[int], done: Callable[[str], bool]) -> list[tuple[int, User]]:
    """(index, user) of the users at `indices` that are not finished."""
    return [(index, users[index]) for index in indices if not done(users[index].user_id)]


def open_groups(users: Sequence[User], size: int, done: Callable[[str], bool]) -> list[Sequence[User]]:
    """Users in groups of `size` (0: all in one group), without the groups whose users are all finished.

    The groups do not depend on what is finished, so an interrupted run ends with the same bytes as an unbroken one.
    """
    size = size or len(users)
    groups = [users[start : start + size] for start in range(0, len(users), size)]
    return [group for group in groups if not all(done(user.user_id) for user in group)]


def share_users(
    run: Run, todo: Sequence[tuple[int, User]], cost: Callable[[User], int], others: Sequence[Run] = ()
) -> Iterator[tuple[int, User]]:
    """The (index, user) of `todo` that no other process works on, each claimed while the caller works on it.

    Args:
        cost: estimate of a user's work, in any measure.
        others: further runs in which the same work finishes the user.
    """
    return share(run, todo, lambda unit: [unit[1].user_id], lambda unit: cost(unit[1]), others)


def share_groups(run: Run, groups: Sequence[Sequence[User]], cost: Callable[[User], int]) -> Iterator[Sequence[User]]:
    """The same for groups of users that are trained together; `cost` is that of one user."""
    return share(run, groups, lambda group: [user.user_id for user in group], lambda group: sum(map(cost, group)))


def _finished(runs: Sequence[Run], names: Sequence[str]) -> bool:
    return all(run.done(name) for run in runs for name in names)


def _tell(run: Run, names: Sequence[str]) -> None:
    """Say which users are waited for, and who works on them."""
    holders = {holder(path): name for name in names if (path := run.lock_path(name)).exists()}
    for who, name in holders.items():
        tell(f"waiting for user {name}: {who} is at it")
