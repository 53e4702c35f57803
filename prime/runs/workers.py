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
from itertools import chain, product
from typing import NamedTuple, Protocol, TypeVar

from prime.errors import InputError, tell
from prime.runs.locks import PATIENCE, POLL, holder
from prime.runs.run import Run


class HasId(Protocol):
    @property
    def user_id(self) -> str: ...


U = TypeVar("U", bound=HasId)  # a user, an anchor, a subject of an attack
Unit = TypeVar("Unit")


# -- this process ---------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """The place of this process among those that were launched together, as torchrun's environment tells it."""

    rank: int
    size: int
    local_rank: int  # on this machine: the number of its GPU
    local_size: int


def world() -> World:
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # with the values of a lone process
    return World(*(int(os.environ.get(name) or alone) for name, alone in names.items()))


def limit_threads() -> None:
    """Divide this machine's cores among the local processes, unless OMP_NUM_THREADS says how many each takes."""
    local = world().local_size
    if local > 1 and not os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(max(1, cores() // local))


def cores() -> int:
    """Cores that this process may use; macOS tells only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
ALWAYS_MAPPED = 32 << 20  # glibc gives blocks from this size back to the system at once (DEFAULT_MMAP_THRESHOLD_MAX)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of less than 32 MiB, and up to 2 GiB at the end of the heap.

    The next forward pass takes the same blocks again. Given back, each page would cost a page fault then, which is
    expensive on a virtual machine.
    """
    with suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, ALWAYS_MAPPED)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# -- who works on what ----------------------------------------------------------------------------------------------


def shares(costs: Sequence[int], size: int) -> list[list[int]]:
    """Indices of the costs, divided among `size` processes: the costliest first, each to whom has the least so far.

    Source: Graham 1969, longest processing time first; at most 4/3 of the best possible time.
    """
    load = [0] * size
    parts: list[list[int]] = [[] for _ in range(size)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = load.index(min(load))
        load[rank] += costs[index]
        parts[rank].append(index)
    return parts


def order_of(costs: Sequence[int], rank: int, size: int) -> list[int]:
    """Indices in the order in which process `rank` works on them: its own share, then the others' from their ends."""
    if size == 1:
        return list(range(len(costs)))
    parts = shares(costs, size)
    order = list(parts[rank])
    for step in range(1, size):
        order += reversed(parts[(rank + step) % size])
    return order


def share(
    run: Run, units: Sequence[Unit], ids: Callable[[Unit], Sequence[str]], cost: Callable[[Unit], int],
    others: Sequence[Run] = (),
) -> Iterator[Unit]:  # fmt: skip
    """Units of work, each claimed while the caller works on it, until the users of all units are finished.

    Units that other processes work on are waited for at the end, and taken over if their process dies.

    Raises:
        InputError: users who were finished are so no longer: somebody removes files of the run.

    Args:
        units: every process passes the same ones in the same order.
        ids: of the users that a unit finishes.
        cost: estimate of a unit's work, in any measure.
        others: further runs in which the same work finishes the users.
    """
    rank, size, *_ = world()
    waiting = [units[index] for index in order_of(list(map(cost, units)), rank, size)]
    rounds_without_work = 0
    while waiting:
        claimed_by_others: list[Unit] = []
        for unit in waiting:
            user_ids = ids(unit)
            if _finished([run, *others], user_ids):
                continue
            with run.claim(user_ids) as claimed:
                if not claimed:
                    claimed_by_others.append(unit)
                    continue
                run.recover(user_ids)
                if not _finished([run, *others], user_ids):  # looked at again under the claim
                    yield unit
        if len(claimed_by_others) == len(waiting):
            rounds_without_work += 1
            if rounds_without_work == PATIENCE:
                _tell_holders(run, chain.from_iterable(map(ids, waiting)))
            time.sleep(POLL)
        waiting = claimed_by_others
    user_ids = list(chain.from_iterable(map(ids, units)))
    lost = [user_id for user_id in user_ids if not _finished([run, *others], [user_id])]
    if lost:
        named = ", ".join(lost[:8]) + (", ..." if len(lost) > 8 else "")
        raise InputError(f"{run.root}: {len(lost)} results were removed meanwhile (users {named}); run it again")


def _finished(runs: Sequence[Run], user_ids: Sequence[str]) -> bool:
    return all(run.done(user_id) for run, user_id in product(runs, user_ids))


def _tell_holders(run: Run, user_ids: Iterable[str]) -> None:
    """Say which users are waited for, and who works on them: one user for each process."""
    user_of: dict[str, str] = {}
    for user_id in user_ids:
        path = run.lock_path(user_id)
        if path.exists():
            user_of[holder(path)] = user_id
    for process, user_id in user_of.items():
        tell(f"waiting for user {user_id}: {process} is at it")


# -- units of users -------------------------------------------------------------------------------------------------


def open_users(users: Sequence[U], indices: Iterable[int], done: Callable[[str], bool]) -> list[tuple[int, U]]:
    """(index, user) of the users at `indices` that are not finished."""
    return [(index, users[index]) for index in indices if not done(users[index].user_id)]


def open_groups(users: Sequence[U], size: int, done: Callable[[str], bool]) -> list[Sequence[U]]:
    """Users in groups of `size` (0: all in one group), without the groups whose users are all finished.

    The groups do not depend on what is finished, so an interrupted run ends with the same bytes as an unbroken one.
    """
    size = size or len(users)
    groups = [users[start : start + size] for start in range(0, len(users), size)]
    return [group for group in groups if not all(map(done, ids_of(group)))]


def ids_of(group: Iterable[U]) -> list[str]:
    return [user.user_id for user in group]


def share_users(
    run: Run, todo: Sequence[tuple[int, U]], cost: Callable[[U], int], others: Sequence[Run] = ()
) -> Iterator[tuple[int, U]]:
    """The (index, user) of `todo` that no other process works on, each claimed while the caller works on it.

    Args:
        cost: estimate of a user's work, in any measure.
        others: further runs in which the same work finishes the user.
    """
    return share(run, todo, lambda unit: [unit[1].user_id], lambda unit: cost(unit[1]), others)


def share_groups(run: Run, groups: Sequence[Sequence[U]], cost: Callable[[U], int]) -> Iterator[Sequence[U]]:
    """The same for groups of users that are trained together; `cost` is that of one user."""
    return share(run, groups, ids_of, lambda group: sum(map(cost, group)))
