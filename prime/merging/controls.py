"""Null controls of the choice of sharers: does it matter whose adapters are merged, and that they are adapters at all?

Recycling LoRAs with adaptive merging (2026, arXiv 2602.12323) finds random adapters to merge about as well as chosen
ones. A control changes nothing but the sharers: search, budget and selection stay.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prime.bank.lora import Adapter
from prime.errors import InputError
from prime.merging.sharers import Pool, Selection, load_pool
from prime.seeds import derive_seed
from prime.settings import ModelSettings, SearchSettings
from prime.users.data import User


def load_sharers(
    selection: Selection,
    model: ModelSettings,
    anchor_dir: str,
    users: Sequence[User],
    search: SearchSettings,
    seed: int,
) -> Pool:
    """Anchors, adapters and the sharers of each test user, as `--sharers` names them."""
    if search.sharers == "nearest":
        return load_pool(selection, model, anchor_dir, len(users), search.n_sim)
    pool = load_pool(selection, model, anchor_dir, len(users), n_sim=0)
    return with_sharers(pool, users, search.sharers, search.n_sim, seed)


def with_sharers(pool: Pool, users: Sequence[User], how: str, n_sim: int, seed: int) -> Pool:
    """The pool with other sharers for each test user.

    Args:
        pool: ranks all anchors (`n_sim` 0).
        users: the test users.
        how: nearest (PriME); farthest: the least similar, farthest first; random: drawn for each user by the run's
            seed; noise: the nearest, their adapters replaced by noise of the same size.
        n_sim: sharers of a user; 0 = all.

    Raises:
        InputError: more sharers than there are anchors.
    """
    if n_sim > len(pool.anchors):
        raise InputError(f"--n_sim {n_sim}: must be 0 (all) to {len(pool.anchors)}, the number of anchors")
    ranking = []
    for user, places in zip(users, pool.ranking, strict=True):
        n = n_sim or len(places)
        if how == "farthest":
            ranking.append(places[::-1][:n])
        elif how == "random":
            ranking.append(tuple(random.Random(derive_seed(seed, "sharers", user.user_id)).sample(places, n)))
        else:
            ranking.append(places[:n])
    pool = replace(pool, ranking=tuple(ranking))
    return replace(pool, open_once=noisy(pool.open_once, seed)) if how == "noise" else pool


def noisy(open_adapter: Callable[..., Adapter], seed: int) -> Callable[..., Adapter]:
    """Opens an adapter as noise: each factor is drawn anew, normal, and scaled to the norm that it had."""

    def opened(folder: Path, *base: str) -> Adapter:
        adapter = open_adapter(folder, *base)
        stream = torch.Generator().manual_seed(derive_seed(seed, "noise", folder.parent.name))
        factors = {name: (noise_like(a, stream), noise_like(b, stream)) for name, (a, b) in adapter.factors.items()}
        return replace(adapter, factors=factors)

    return opened


def noise_like(factor: Tensor, stream: torch.Generator) -> Tensor:
    noise = torch.randn(factor.shape, generator=stream)
    return noise * (factor.norm() / noise.norm())
