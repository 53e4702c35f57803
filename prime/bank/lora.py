"""The algebra of LoRA adapters: scaling, merging, truncating, concatenating. Pure functions of tensors.

Shapes: A `[r, in]`, B `[out, r]` of one module; an adapter is one such pair per module name. The update of a
module's weight is `scale * B @ A` (Hu et al. 2022). `n` adapters are merged by weights `w [n]`, or by
`w [n, l]`, one weight per adapter and layer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from prime.errors import InputError
from prime.settings import SHARERS

Factors = dict[str, tuple[Tensor, Tensor]]

RULES = ("factor", "delta")
NO_SIZE = 1e-6  # a singular value below this part of the largest is rounding of fp32 factors
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: `factors[module] = (A [r, in], B [out, r])`, update `scale * B @ A`; 0 in other modules."""

    factors: Factors
    scale: float = 1.0
    card: Mapping = field(default_factory=dict)
    source: str = ""  # where it was read from, for messages

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.factors.values())

    def folded(self) -> "Adapter":
        """The same update with the scale moved into B, so that scale is 1."""
        if self.scale == 1.0:
            return self
        factors = {name: (a, b * self.scale) for name, (a, b) in self.factors.items()}
        return Adapter(factors, 1.0, self.card, self.source)


def norm(adapter: Adapter) -> float:
    """Frobenius norm of the whole update, all modules together: the trace of (B^T B)(A A^T), in fp64."""
    squares = 0.0
    for a, b in adapter.factors.values():
        a, b = a.double(), b.double()
        squares += float(((b.mT @ b) * (a @ a.mT)).sum())
    return abs(adapter.scale) * max(squares, 0.0) ** 0.5


def layer_of(module: str) -> int:
    """Index of the decoder layer in a module name; 0 for a module outside the layers."""
    match = LAYER.search(module)
    return int(match.group(1)) if match else 0


def merge(adapters: Sequence[Adapter], weights: Tensor, rule: str, keep_rank: int | str = 0) -> Adapter:
    """One adapter out of n by weights `[n]` or `[n, l]`.

    `factor` (PriME and LoraHub as published): A = sum w_i A_i, B = sum w_i B_i; even and quadratic in w, with
    cross terms B_i A_j. `delta`: dW = sum w_i B_i A_i, exact, held as stacked factors, ranks added up; sharers of
    weight zero are left out, so one-hot weights give that adapter bit for bit under both rules. In a module that an
    adapter does not have its update is zero.

    `keep_rank` leaves each module's merged update that many leading singular directions, see `truncate`; 0: all,
    `SHARERS`: as many as the largest rank of the adapters.

    Raises:
        InputError: the adapters hold modules of different widths.
    """
    check_widths(adapters)
    parts = [adapter.folded().factors for adapter in adapters]
    rank = max(adapter.rank for adapter in adapters) if keep_rank == SHARERS else int(keep_rank)
    merged: Factors = {}
    for name in dict.fromkeys(chain.from_iterable(parts)):
        owners = [place for place, part in enumerate(parts) if name in part]
        a, b = _merge_module([parts[place][name] for place in owners], weights[owners], name, rule)
        merged[name] = truncate(a, b, rank) if rank else (a, b)
    return Adapter(merged)


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B A cut to its `rank` leading singular directions, and scaled to the size (Frobenius norm) it had.

    A `[..., r, in]`, B `[..., out, r]` -> `[..., rank, in]`, `[..., out, rank]`; as they are where r is no larger.
    Unscaled it is the nearest update of that rank (Eckart and Young, 1936). Both factors are reduced by QR first, so
    that the decomposed matrix is `[..., r, r]`. What several sharers have in common adds up in the leading
    directions, while what each keeps of single records lies in many small ones; the scale makes up for these.
    """
    if a.shape[-2] <= rank:
        return a, b
    a_basis, b_basis, left, sizes, right = _decomposed(a, b)
    kept = sizes[..., None, :rank]
    lost = sizes.norm(dim=-1)[..., None, None] / kept.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    return right[..., :rank, :] @ a_basis.mT, b_basis @ (left[..., :rank] * kept * lost)


def _decomposed(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """a_basis `[..., in, r]`, b_basis `[..., out, r]`, left, sizes `[..., r]`, right: B A is b_basis left diag(sizes)
    right a_basis^T.
    """
    a_basis, a_core = torch.linalg.qr(a.mT)  # [..., in, r], [..., r, r]
    b_basis, b_core = torch.linalg.qr(b)
    return (a_basis, b_basis, *torch.linalg.svd(b_core @ a_core.mT, full_matrices=False))


def refactored(adapter: Adapter) -> Adapter:
    """The same updates in factors that are a function of them alone: their singular value decompositions.

    The factors of a merge tell more than their product: under `delta` they are the sharers' own, one below the other.
    Here the rows of A are orthonormal, the largest entry of each is positive, B holds the sizes in falling order, and
    directions of no size (below `NO_SIZE` of the largest) are left out, so that sharers of one A merge at its rank.
    """
    factors: Factors = {}
    for name, (a, b) in adapter.folded().factors.items():
        a_basis, b_basis, left, sizes, right = _decomposed(a.detach().cpu().double(), b.detach().cpu().double())
        rank = max(1, int((sizes > NO_SIZE * sizes[0]).sum()))
        rows = right[:rank] @ a_basis.mT
        sign = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()  # [rank, 1]
        columns = b_basis @ (left[:, :rank] * sizes[:rank])
        factors[name] = (rows * sign).to(a), (columns * sign.T).to(b)
    return Adapter(factors, 1.0, adapter.card, adapter.source)


def _merge_module(pairs: list[tuple[Tensor, Tensor]], weights: Tensor, name: str, rule: str) -> tuple[Tensor, Tensor]:
    layer_weights = weights if weights.dim() == 1 else weights[:, layer_of(name)]
    kept = [(float(w), a, b) for w, (a, b) in zip(layer_weights, pairs, strict=True) if float(w) != 0.0]
    if not kept:
        a, b = pairs[0]
        return torch.zeros_like(a), torch.zeros_like(b)
    if rule == "delta":
        return torch.cat([a for _, a, _ in kept]), torch.cat([w * b for w, _, b in kept], dim=1)
    rank = max(a.shape[0] for a, _ in pairs)
    padded = [(w, *pad_rank(a, b, rank)) for w, a, b in kept]
    return sum_scaled([(w, a) for w, a, _ in padded]), sum_scaled([(w, b) for w, _, b in padded])


def sum_scaled(terms: list[tuple[float, Tensor]]) -> Tensor:
    """sum_i w_i t_i, in order, started from the first term so that a single term of weight 1 stays as it is."""
    weight, first = terms[0]
    total = first * weight
    for weight, tensor in terms[1:]:
        total = total + tensor * weight
    return total


def check_widths(adapters: Sequence[Adapter]) -> None:
    """InputError unless adapters that share a module have the same widths there (modules and ranks may differ)."""
    first: dict[str, tuple[str, tuple[int, int]]] = {}
    for number, adapter in enumerate(adapters):
        for name, (a, b) in adapter.factors.items():
            label, widths = adapter.source or f"adapter {number}", (a.shape[1], b.shape[0])
            other, expected = first.setdefault(name, (label, widths))
            if widths != expected:
                raise InputError(f"{name}: {label} is {widths} wide (in, out), {other} is {expected}")


def pad_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `[r, in]`, B `[out, r]` padded with zeros to a larger rank; the update stays the same."""
    missing = rank - a.shape[0]
    if missing == 0:
        return a, b
    return torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
