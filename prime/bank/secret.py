"""Randomness that nobody can draw again: from a secret key in a file, by SHAKE-256.

A run's seed is published with its results, and torch's CPU generator knows 2^32 streams, few enough to try them all.
"""

import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prime.errors import InputError

KEY_BYTES = 32


def load_key(path: Path) -> bytes:
    """The secret in a key file (64 hexadecimal digits), made if there is none, readable by its owner only."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
        try:
            os.link(draft, path)  # unlike a rename it never replaces the key of a process that was faster
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    try:
        with open(path, encoding="ascii", opener=_unwaiting) as file:
            key = bytes.fromhex(file.read(1000).strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise InputError(f"{path}: not a noise key (--noise_key): expected {2 * KEY_BYTES} hexadecimal digits")
    return key


def _unwaiting(path: str, flags: int) -> int:
    """Opens a file; a pipe under its name is not waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def normal(key: bytes, shape: Sequence[int], *parts: object) -> Tensor:
    """Standard Gaussian numbers in fp64, on the CPU."""
    draws = torch.from_numpy(uniform(key, int(np.prod(shape)), *parts))
    return torch.special.ndtri(draws).reshape(tuple(shape))


def uniform(key: bytes, count: int, *parts: object) -> np.ndarray:
    """`count` numbers within (0, 1): odd multiples of 2^-53."""
    bits = np.frombuffer(stream(key, 8 * count, *parts), dtype="<u8")
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def stream(key: bytes, count: int, *parts: object) -> bytes:
    """Bytes of SHAKE-256 under a key of fixed length: a pseudo-random function of the parts."""
    return hashlib.shake_256(key + "\x1f".join(map(str, parts)).encode()).digest(count)
