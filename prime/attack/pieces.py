"""A deployed adapter taken apart by whoever holds the file, into pieces that may be single sharers' updates.

| kind         | what the holder knows beside the file                                                              |
|--------------|----------------------------------------------------------------------------------------------------|
| `blocks`     | nothing: factors that were stacked fall apart where one sharer's end                               |
| `directions` | nothing: singular directions of the update, as many at a time as one sharer's part may have        |
| `initial`    | ids, and the run's seed: an initial A (`--init seed`), seen in the rows, shows a sharer's part     |
| `together`   | another file that the same sharer is in: the directions that both have in common                   |
| `others`     | the adapters that all other sharers of the merge shared: what they do not span                     |

Each sharer is attacked by the piece of a kind that is most like his own update, scaled to its size: who takes a file
apart can try all of them, and sharers' updates are of about one size.

Shapes: A `[r, in]`, B `[out, r]`, Q `[q, in]` with orthonormal rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prime.bank.lora import Adapter, Factors, refactored

KINDS = ("blocks", "directions", "initial", "together", "others")
WHOLE = "whole"  # the file as it is, beside its pieces
Rows = Mapping[str, Tensor]  # [q, in] by module


@dataclass(frozen=True)
class Known:
    """What the strongest holder of a file knows.

    Args:
        own: the sharers' own adapters, by id.
        initial: initial A of a sharer, by module, as it follows from his id and the run's seed; None: not known.
        together: another file that a sharer is in; None: there is none.
    """

    own: Mapping[str, Adapter]
    initial: Callable[[str], Rows] | None = None
    together: Callable[[str], Adapter | None] | None = None


def pieces_of(file: Adapter, known: Known) -> dict[str, dict[str, Adapter]]:
    """By kind and sharer the piece that is most like his own update, scaled to its size; the whole file as it is.

    A kind that yields no pieces is left out.
    """
    whole = refactored(file)  # its A spans the rows of the update, orthonormal
    found: dict[str, dict[str, Adapter]] = {}
    for kind in (WHOLE, *KINDS):
        chosen = {}
        for name, own in known.own.items():
            candidates = _candidates(kind, file, whole, name, known)
            if candidates:
                best = max(candidates, key=lambda piece: abs(cosine(piece, own)))
                chosen[name] = best if kind == WHOLE else _scaled_like(best, own)
        if chosen:
            found[kind] = chosen
    return found


def _candidates(kind: str, file: Adapter, whole: Adapter, name: str, known: Known) -> list[Adapter]:
    """Pieces of a kind that may be a sharer's. What is known of other adapters is held against the rows of the update
    and against its columns.
    """
    rank = known.own[name].rank
    if kind == WHOLE:
        return [whole]
    if kind == "blocks":
        return blocks(file, rank)
    if kind == "directions":
        return blocks(whole, max(1, whole.rank // len(known.own)))
    if kind == "initial" and known.initial:
        return near(whole, known.initial(name), rank)
    columns = refactored(turned(whole))
    other = known.together(name) if kind == "together" and known.together else None
    if other:
        by_columns = near(columns, rows_of(refactored(turned(other))), rank)
        return near(whole, rows_of(refactored(other)), rank) + [turned(piece) for piece in by_columns]
    others = [adapter for sharer, adapter in known.own.items() if sharer != name]
    if kind == "others" and others:
        return [off(whole, others), turned(off(columns, [turned(adapter) for adapter in others]))]
    return []


def rows_of(adapter: Adapter) -> Rows:
    return {name: a for name, (a, _) in adapter.factors.items()}


def turned(adapter: Adapter) -> Adapter:
    """The transposed updates."""
    return Adapter({name: (b.T, a.T) for name, (a, b) in adapter.factors.items()}, adapter.scale)


def blocks(file: Adapter, rank: int) -> list[Adapter]:
    """Consecutive rows of A with their columns of B, `rank` at a time; none where there would be a single piece."""
    if file.rank <= rank:
        return []
    pieces = []
    for start in range(0, file.rank, rank):
        part = slice(start, start + rank)
        factors = {name: (a[part], b[:, part]) for name, (a, b) in file.factors.items() if len(a) > start}
        pieces.append(Adapter(factors))
    return pieces


def onto(file: Adapter, rows: Rows) -> Adapter:
    """The part of each update within the span of rows Q: dW Q^T Q."""
    return Adapter({name: (rows[name], b @ (a @ rows[name].T)) for name, (a, b) in file.factors.items()})


def off(file: Adapter, adapters: Sequence[Adapter]) -> Adapter:
    """The part of each update outside the span of the adapters' A."""
    factors: Factors = {}
    for name, (a, b) in file.factors.items():
        span = basis(torch.cat([adapter.factors[name][0] for adapter in adapters if name in adapter.factors]))
        factors[name] = (a - (a @ span.T) @ span, b)
    return Adapter(factors)


def near(whole: Adapter, rows: Rows, rank: int) -> list[Adapter]:
    """The parts of each update within the directions of its A that lie closest to given rows: all that a sharer's rank
    allows, half of them, a quarter.

    The directions are the first principal vectors of the two spans (Bjorck and Golub, 1973).
    """
    principal = {}
    for name, (a, _) in whole.factors.items():
        left, _, _ = torch.linalg.svd(a @ basis(rows[name].to(a)).T, full_matrices=False)
        principal[name] = left.T @ a
    sizes = sorted({max(1, rank // part) for part in (1, 2, 4)})
    return [onto(whole, {name: directions[:size] for name, directions in principal.items()}) for size in sizes]


def basis(rows: Tensor) -> Tensor:
    """Orthonormal rows `[q, in]` with the span of rows `[r, in]`, q <= r."""
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    return right[: max(1, int((sizes > 1e-4 * sizes[0]).sum()))]


def cosine(one: Adapter, other: Adapter) -> float:
    """Of the two updates, all modules as one vector; 0 where one of them is zero."""
    size = math.sqrt(inner(one, one) * inner(other, other))
    return inner(one, other) / size if size else 0.0


def inner(one: Adapter, other: Adapter) -> float:
    """Sum of products of the entries of two updates; a module that one of them lacks is zero there."""
    total = 0.0
    for name in one.factors.keys() & other.factors.keys():
        (a, b), (c, d) = one.factors[name], other.factors[name]
        total += float(((b.double().T @ d.double()) * (a.double() @ c.double().T)).sum())
    return total * one.scale * other.scale


def _scaled_like(piece: Adapter, own: Adapter) -> Adapter:
    """The piece as large as another update, and of its direction: weights below zero turn a piece round."""
    size = math.sqrt(inner(piece, piece))
    if not size:
        return piece
    return Adapter(piece.factors, math.copysign(math.sqrt(inner(own, own)) / size, cosine(piece, own)))
