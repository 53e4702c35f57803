"""What a bank computes with, as a digest: a journal's answers are believed only where this is what it was."""

import hashlib
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from prime.bank.bank import AdapterBank

SAMPLE = 1 << 16  # numbers of a large tensor that are looked at, evenly spread


def model_identity(bank: AdapterBank) -> str:
    """Digest of the frozen model, the task adapter that is folded into it included.

    Of each tensor it takes name, shape, type and at most `SAMPLE` numbers. Training and folding change all of them;
    a single number of a large tensor could differ unseen.
    """
    return digest_of_tensors(chain(bank.model.named_parameters(), bank.model.named_buffers()))


def factors_identity(bank: AdapterBank) -> str:
    """Digest of the loaded adapters in their order, every number of them unless they are very large."""
    return digest_of_tensors(bank.loaded())


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of named tensors; of those that an offloaded model keeps on disk, name and shape alone."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta and tensor.numel():
            digest.update(_sample(tensor.detach()))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    step = -(-tensor.numel() // SAMPLE) | 1  # odd, so that it does not keep to few columns
    part = tensor.flatten()[::step].contiguous().cpu()
    return part.view(torch.uint8).numpy().tobytes()
