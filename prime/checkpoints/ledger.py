"""Bytes of tensors that are alive, counted on tensors without data (torch's FakeTensorMode).

What tensors add up to is not what a process takes: freed blocks leave gaps that the next tensor does not fit, which
on a CPU can be more than half of it. So the ledger also asks glibc's malloc for each tensor's bytes, without ever
touching them: the heap then grows and frays as the run's own would, at no cost.
"""

import ctypes
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prime.runs.workers import ALWAYS_MAPPED

ALIGNMENT = 64  # of torch's CPU tensors

MALLINFO = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


class Malloc:
    """glibc's allocator: blocks nobody writes to, and how much it holds."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = _Mallinfo  # AttributeError where there is no glibc >= 2.33
        self._libc.free.argtypes = [ctypes.c_void_p]

    def held(self) -> int:
        """Bytes taken from the system by this process's main heap and by mapped blocks."""
        found = self._libc.mallinfo2()
        return found.arena + found.hblkhd

    def take(self, size: int) -> int | None:
        block = ctypes.c_void_p()
        self._libc.posix_memalign(ctypes.byref(block), ctypes.c_size_t(ALIGNMENT), ctypes.c_size_t(size))
        return block.value

    def give_back(self, block: int | None) -> None:
        self._libc.free(block)


class Ledger(TorchDispatchMode):
    """Counts, while it is entered, every tensor that an operation makes, until it dies.

    Attributes:
        now, peak: bytes of the tensors alive, and their largest sum.
        held, most_held: bytes that the process's memory grew by to hold them, `now` and `peak` where there is no glibc
            or `shadow` is False.
    """

    def __init__(self, shadow: bool):
        super().__init__()
        self.now = self.peak = self.most_held = self._mapped = 0
        self._alive: set[int] = set()
        self._malloc: Malloc | None = None
        if shadow:
            with suppress(AttributeError, OSError, TypeError):
                self._malloc = Malloc()
        self._start = self._malloc.held() if self._malloc else 0

    @property
    def held(self) -> int:
        return self.now if self._malloc is None else self._malloc.held() - self._start + self._mapped

    def restart(self) -> None:
        """Forget the peak of the live tensors so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        return found

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        small = self._malloc is not None and size < ALWAYS_MAPPED
        block = self._malloc.take(size) if small and self._malloc else None
        self._mapped += 0 if small else size
        self.peak, self.most_held = max(self.peak, self.now), max(self.most_held, self.held)
        weakref.finalize(storage, self._leave, key, size, block)

    def _leave(self, key: int, size: int, block: int | None) -> None:
        self._alive.discard(key)
        self.now -= size
        if block is None:
            self._mapped -= size
        elif self._malloc:
            self._malloc.give_back(block)
