"""What a fresh adapter begins with: B is zero, A is random, from a seed or from a secret key."""

import math

import torch
from torch import Tensor

from prime.bank.secret import normal
from prime.seeds import derive_seed


def initial_a(seed: int | bytes, name: str, rank: int, width: int) -> Tensor:
    """A `[rank, width]` of one module; each adapter and module has a stream of its own.

    From a seed: Kaiming-uniform (a = sqrt 5), as PEFT; whoever knows the seed draws it again, and finds the adapter's
    part of a merge by it. From a key: Gaussian of the same variance. Sums of independent uniform rows can be told
    apart by their form alone (independent component analysis), sums of Gaussian ones cannot.
    """
    bound = 1 / math.sqrt(width)
    if isinstance(seed, bytes):
        return (normal(seed, (rank, width), "initial", name) * bound / math.sqrt(3)).float()
    stream = torch.Generator().manual_seed(derive_seed(seed, name))
    return (torch.rand(rank, width, generator=stream) * 2 - 1) * bound
