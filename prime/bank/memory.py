"""How this process takes memory from the system (glibc)."""

import ctypes
from contextlib import suppress

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
