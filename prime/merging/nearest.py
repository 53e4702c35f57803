"""The nearest sharers of each test user: exact, in blocks, for pools that do not fit in memory.

Letters: `m` test users, `n` anchors, `h` embedding width, `b` anchors of a block, `p` pairs of a user and an anchor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prime.errors import InputError

USERS = 1024  # test users of one pass over the anchors
BLOCK = 4096  # anchors of one matrix product
CROWDED = 1 / 64  # part of a block's pairs in doubt above which a product in fp64 is cheaper than pair by pair
NUMBERS = 1 << 17  # fp64 numbers gathered at once: few enough for a cache


def top_similar(
    test_emb: Tensor, anchor_emb: Tensor, n_sim: int, places: Sequence[int] | None = None
) -> list[list[int]]:
    """For each row of test_emb `[m, h]` the `n_sim` anchors of highest cosine, best first, by their number.

    Ties go to the earlier anchor; a zero vector is equally far (0) from everything. n_sim 0: all anchors.

    Every cosine is first taken in fp32, by a matrix product for each block of anchors. Those that the rounding of
    fp32 leaves in doubt (within `rounding(h)` of a user's n_sim-th best so far) are taken again in fp64, pair by
    pair; where they are many, those that a product in fp64 leaves in doubt. So the result depends neither on the
    blocks nor on where in the file an anchor stands.

    Args:
        anchor_emb: `[rows, h]`; may be mapped from a file, a block at a time is read.
        places: row of each anchor in anchor_emb; None: anchor i is row i.
    """
    rows = torch.arange(len(anchor_emb)) if places is None else torch.as_tensor(list(places), dtype=torch.int64)
    if not 0 <= n_sim <= len(rows):
        raise InputError(f"--n_sim {n_sim}: must be 0 (all) to {len(rows)}, the number of anchors")
    nearest: list[list[int]] = []
    for users in test_emb.split(USERS):
        nearest += _nearest(_unit(users), anchor_emb, rows, n_sim or len(rows)).tolist()
    return nearest


def rounding(width: int, unit: float = 2.0**-24) -> float:
    """How far a cosine may be from the true one at a unit roundoff (that of fp32), doubled to be safe.

    A sum of h products errs by h u at most (by Cauchy-Schwarz), a norm by half of that, roundings add some u.
    """
    return (1.5 * width + 16) * 2 * unit


def _unit(rows: Tensor) -> Tensor:
    return normalize(rows.double(), dim=-1)


def _low_cosines(low: Tensor, block: Tensor) -> Tensor:
    """`[m, b]` cosines in fp32 of unit vectors low `[m, h]` and rows of block; the block is read, never copied.

    Norms below 1e-12 count as 1e-12, as in `normalize`; so squares too small for fp32 do no harm.
    """
    block = block.float()
    norms = torch.linalg.vector_norm(block, dim=1).clamp_min(1e-12)
    return (low @ block.T).mul_(norms.reciprocal())


def _nearest(test: Tensor, anchor_emb: Tensor, rows: Tensor, size: int) -> Tensor:
    """`[m, size]` anchors of highest cosine with unit vectors test `[m, h]` in fp64, best first."""
    low = test.float()
    scores = torch.full((len(test), size), -torch.inf, dtype=torch.float64)
    nearest = torch.full((len(test), size), -1)
    for start in range(0, len(rows), BLOCK):
        block_rows = rows[start : start + BLOCK]  # rows behind the last anchor are of nobody who shares
        block = anchor_emb[start : start + len(block_rows)] if _in_order(block_rows, start) else anchor_emb[block_rows]
        users, columns = _in_doubt(_low_cosines(low, block), scores[:, -1], size, rounding(test.shape[1]))
        if len(users) > CROWDED * len(test) * len(block):  # fp32 tells too little apart
            users, columns = _in_doubt(test @ _unit(block).T, scores[:, -1], size, rounding(test.shape[1], 2.0**-53))
        _insert(scores, nearest, users, columns + start, _cosines(test, block, users, columns))
    return nearest


def _in_order(block_rows: Tensor, start: int) -> bool:
    """Whether a block of anchors is a stretch of the file, which can be read without gathering."""
    last = start + len(block_rows) - 1
    return bool(block_rows[0] == start and block_rows[-1] == last and (block_rows.diff() == 1).all())


def _in_doubt(cosines: Tensor, worst: Tensor, size: int, slack: float) -> tuple[Tensor, Tensor]:
    """(user, column) of the pairs that may be among a user's best: by user, then by column.

    Args:
        cosines: `[m, b]`, off by `slack` at most.
        worst: `[m]` each user's last kept score so far, -inf where there are not enough.
        size: anchors that are kept.
    """
    least = worst - slack
    if size < cosines.shape[1] and torch.isinf(worst).any():  # the block's own best stand in for those kept so far
        least = torch.maximum(least, cosines.topk(size).values[:, -1] - 2 * slack)
    users, columns = torch.nonzero(cosines >= least.to(cosines.dtype)[:, None], as_tuple=True)
    return users, columns


def _cosines(test: Tensor, block: Tensor, users: Tensor, columns: Tensor) -> Tensor:
    """`[p]` in fp64, each pair's own sum."""
    step = max(1, NUMBERS // test.shape[1])
    pairs = zip(users.split(step), columns.split(step), strict=True)
    parts = [(test[user] * _unit(block[column])).sum(1) for user, column in pairs]
    return torch.cat(parts) if parts else test.new_empty(0)


def _insert(scores: Tensor, nearest: Tensor, users: Tensor, anchors: Tensor, new: Tensor) -> None:
    """Put new pairs among the users' best `[m, size]`, in place; of equal scores the earlier anchor stays in front."""
    touched, place = users.unique(return_inverse=True)
    size = scores.shape[1]
    owner = torch.cat([torch.arange(len(touched)).repeat_interleave(size), place])
    score = torch.cat([scores[touched].flatten(), new])
    anchor = torch.cat([nearest[touched].flatten(), anchors])
    order = score.sort(descending=True, stable=True).indices
    order = order[owner[order].sort(stable=True).indices]
    counts = torch.bincount(owner, minlength=len(touched))
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    kept = order[rank < size]
    scores[touched], nearest[touched] = score[kept].view(-1, size), anchor[kept].view(-1, size)
