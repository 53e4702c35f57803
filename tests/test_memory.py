"""Freed memory stays with the process."""

import ctypes
import subprocess
import sys

import pytest

from prime.runs.workers import keep_freed_memory

SCRIPT = """
import ctypes, sys
import torch
from prime.runs.workers import keep_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

if sys.argv[1] == "keep":
    keep_freed_memory()
blocks = [torch.ones(2**21) for _ in range(30)]  # 8 MB each
most = resident()
del blocks
print((most - resident()) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_blocks_are_kept() -> None:
    freed = {
        way: int(subprocess.run([sys.executable, "-c", SCRIPT, way], check=True, capture_output=True).stdout)
        for way in ("keep", "plain")
    }
    assert freed["keep"] < 120 < freed["plain"]  # of 240 MB


def test_another_libc_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    keep_freed_memory()
