"""One linear layer of a bank: a frozen `nn.Linear` that adds to each row the low-rank update of its own adapter.

Shapes: `b` batch rows, `m` rows of a group, `t` tokens, `r` rank, `n` adapters, `g` row groups (consecutive rows of one
adapter, `b = g * m`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prime.bank.cpu import device_of

# Adapters times tokens of a row group up to which one product with the factors of all adapters takes less than to
# copy each group's own.
SPREAD = 64

# Multiplies the input of one module, x [g, m*t, in], given the module's number.
InputScaler = Callable[[int, Tensor], Tensor]


class Route:
    """Which adapter each row of the next forward pass uses; shared by all wrappers of a bank.

    What is the same for all layers is made once a pass: with few rows a GPU otherwise waits for the CPU to ask for it.
    """

    def __init__(self) -> None:
        self.groups: Tensor | None = None  # [g] adapter of each group of b / g consecutive rows; None: the base
        self.on_base: Tensor | None = None  # [g, 1, 1] True where a group has no adapter, None if all have one
        self.scaler: InputScaler | None = None  # dropout or gates in front of the factor pair
        self._others: tuple[Tensor, int, int, Tensor] | None = None
        self._widened: tuple[Tensor, Tensor] | None = None

    def to(self, groups: Tensor | None, on_base: Tensor | None, scaler: InputScaler | None) -> None:
        """Send the rows that follow there."""
        self.groups, self.on_base, self.scaler = groups, on_base, scaler
        self._others = self._widened = None

    def others(self, groups: Tensor, n: int, r: int) -> Tensor:
        """True in the columns of all adapters but a group's own: `[g, 1, n*r]`, r columns of each."""
        if self._others is None or self._others[0] is not groups or self._others[1:3] != (n, r):
            others = groups[:, None] != torch.arange(n, device=groups.device)
            if self.on_base is not None:
                others |= self.on_base.to(groups.device)[..., 0]
            self._others = groups, n, r, others.repeat_interleave(r, 1)[:, None]
        return self._others[3]

    def widened(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in the factors' type; several modules of a layer have the same input."""
        if x.dtype == dtype:
            return x
        if self._widened is None or self._widened[0] is not x:
            self._widened = x, x.to(dtype)
        return self._widened[1]


class BankLinear(nn.Module):
    """A frozen `nn.Linear` plus the routed low-rank update of stacked factors A `[n, r, in]`, B `[n, out, r]`."""

    def __init__(self, base: nn.Linear, number: int, route: Route):
        super().__init__()
        self.base = base
        self.number = number
        self.route = route
        self.device = device_of(base)
        self.scale = 1.0
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.under: tuple[Tensor, Tensor] | None = None  # frozen A, B that trainable ones stand on; scale 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        groups = self.route.groups
        if groups is None or self.A is None or self.B is None:
            return y
        if x.shape[0] % len(groups):
            raise ValueError(f"{x.shape[0]} rows cannot be parted into {len(groups)} equal groups")
        groups = groups.to(x.device)
        if self.under is not None:
            y = self._add(y, x, groups, *self.under, 1.0, None)
        return self._add(y, x, groups, self.A, self.B, self.scale, self.route.scaler)

    def _add(
        self,
        y: Tensor,
        x: Tensor,
        groups: Tensor,
        stacked_a: Tensor,
        stacked_b: Tensor,
        scale: float,
        scaler: InputScaler | None,
    ) -> Tensor:
        """y plus the routed update of one pair of stacks, whose input goes through `scaler` first."""
        training = torch.is_grad_enabled()
        wide = x.to(stacked_a.dtype) if training else self.route.widened(x, stacked_a.dtype)
        rows = wide.reshape(len(groups), -1, x.shape[-1])
        if scaler is not None:
            rows = scaler(self.number, rows)
        if not training and rows.shape[1] * len(stacked_b) <= SPREAD:
            low, b = self._spread(rows, groups, stacked_a, stacked_b)
        else:
            low, b = _low(rows, groups, stacked_a), _selected(stacked_b, groups).mT
            if self.route.on_base is not None:
                low = low.masked_fill(self.route.on_base.to(low.device), 0.0)
        out = y.view(len(low), -1, y.shape[-1])
        # Factors are fp32; a model in bfloat16 gets the sum rounded. Without gradients y may be overwritten.
        if out.dtype != b.dtype:
            update = torch.bmm(low, b)
            added = torch.add(out, update, alpha=scale) if training else out.add_(update, alpha=scale)
            return added.to(y.dtype).view_as(y)
        add = torch.baddbmm if training else Tensor.baddbmm_
        return add(out, low, b, alpha=scale).view_as(y)

    def _spread(self, rows: Tensor, groups: Tensor, stacked_a: Tensor, stacked_b: Tensor) -> tuple[Tensor, Tensor]:
        """The update as one product of two factors: each row's `x A^T` in the columns of its own adapter and zeros in
        those of the others, `[1, g*m*t, n*r]`, and the B of all adapters, `[1, n*r, out]`.

        Not for training: zero times the infinite factor of an adapter that diverges would be NaN in all other rows.
        """
        n, _, r = stacked_b.shape
        distinct = stacked_a[:1] if _shared(stacked_a) else stacked_a
        low = rows @ distinct.flatten(0, 1).T  # [g, m*t, r or n*r]
        low = low.repeat(1, 1, n // len(distinct))  # [g, m*t, n*r]
        low.masked_fill_(self.route.others(groups, n, r), 0.0)
        return low.view(1, -1, n * r), stacked_b.mT.reshape(1, n * r, -1)


def _low(rows: Tensor, groups: Tensor, stacked_a: Tensor) -> Tensor:
    """x A_i^T of rows `[g, m*t, in]`, i the adapter of their group: `[g, m*t, r]`."""
    if _shared(stacked_a):
        return rows @ stacked_a[0].T
    return torch.bmm(rows, _selected(stacked_a, groups).mT)


def _selected(stack: Tensor, groups: Tensor) -> Tensor:
    """Each group's member of the stack. A transposed stack is selected from as it lies in memory, where each member is
    one contiguous piece.
    """
    return stack.index_select(0, groups) if stack.is_contiguous() else stack.mT.index_select(0, groups).mT


def _shared(stack: Tensor) -> bool:
    """Whether all members of a stack are the same memory."""
    return stack.stride(0) == 0
