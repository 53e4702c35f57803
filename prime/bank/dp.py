"""Differential privacy of adapters and gates: DP-SGD (Abadi et al., CCS 2016), accounted by Opacus.

Protected unit: one item of one user's history. Neighbouring histories differ in one item, which is there in one
and blank, without a gradient, in the other ("zero-out": the number of items is public, noise and mean go by it). A step
takes every item with probability q on its own (Poisson sampling), scales each item's gradient to norm C at most over
all tensors of the adapter, adds Gaussian noise of standard deviation sigma * C to their sum, and divides by the
expected number of items q * n. AdamW and everything after it (merging, decoding) only process that.

So that an item has one gradient and no other, private training uses one record per item that quotes nothing else
(`history_records(..., quoting=False)`). The second records would quote earlier items, which the item then
influences through other records, and the textual profile, which is written from all items.

Noise and sampling are a function of (key, options, records, step, tensor): the same on any device, beside any
neighbour in the bank, after any crash. They are drawn from SHAKE-256 of a secret key, because whoever can draw them
again can subtract them: a run's seed is published with its results, and torch's CPU generator knows 2^32 streams.

Not covered, see docs/privacy.md: which anchors were selected, the number of items, the options, the losses in
result.json, and the rounding of floating-point noise (Mironov, CCS 2012).

Shapes: `b` rows, `n` adapters.
"""
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from prime.bank.accounting import Spent, auroc_bound, sigma_for, spent_epsilon
from prime.bank.secret import KEY_BYTES, load_key, normal, stream, uniform
from prime.errors import InputError
from prime.settings import PrivacySettings

UNIT = "history item, there or blank; the number of items is public"
KEY_FILE = "noise.key"

T = TypeVar("T")


@dataclass(frozen=True)
class Mechanism:
    """Private training of one adapter, or of one set of gates."""

    sigma: float  # standard deviation of the noise over max_norm
    max_norm: float  # of one item's gradient
    n: int  # items
    rate: float  # probability of an item to be in a step
    steps: int
    key: bytes  # the adapter's own secret

    @property
    def spends(self) -> Spent:
        return (self.sigma, self.rate, self.steps)

    @property
    def size(self) -> float:
        """Expected number of items in a step."""
        return self.rate * self.n

    def batches(self, items: Sequence[T]) -> list[list[T]]:
        """The items of every step; a step may have none."""
        batches = []
        for step in range(self.steps):
            draws = uniform(self.key, len(items), "sample", step)
            batches.append([item for item, draw in zip(items, draws, strict=True) if draw < self.rate])
        return batches

    def noise(self, step: int, tensor: int, shape: Sequence[int]) -> Tensor:
        """Gaussian noise for the sum of a step's clipped gradients in one tensor, on the CPU."""
        return normal(self.key, shape, "noise", step, tensor).mul_(self.sigma * self.max_norm).float()


@dataclass(frozen=True)
class Terms:
    """The guarantee that a run was asked for: either epsilon or sigma, and how it is accounted."""

    epsilon: float | None
    sigma: float | None
    delta: float
    max_norm: float
    accountant: str
    key_file: Path  # made when the first learner needs it
    settings: str  # all options of the run

    def mechanism(
        self, name: str, seed: int, records: Sequence[object], batch_size: int, epochs: int, max_step: int = 0
    ) -> Mechanism:
        """The mechanism of one learner: `epochs` passes in expectation, at most `max_step` steps (0: all of them).

        Args:
            seed: the learner's own.
            records: one per item, told apart by their `repr`.

        Raises:
            InputError: a delta of 1 / items or more, or an epsilon that no noise keeps; names the learner.
        """
        items = len(records)
        if self.delta * items >= 1:
            raise InputError(
                f"{name}: --delta {self.delta:g} is no guarantee for {items} items; it has to be far below 1/{items}"
            )
        size = min(batch_size, items)
        steps = -(-epochs * items // size)
        steps = min(steps, max_step) if max_step else steps
        try:
            sigma = self.sigma or sigma_for(self.epsilon or 0.0, self.delta, size / items, steps, self.accountant)
        except ValueError as error:
            failure = f"no noise keeps to --epsilon {self.epsilon:g} at --delta {self.delta:g} in {steps} steps"
            raise InputError(f"{name}: {failure} (--accountant {self.accountant}: {error})") from None
        # Noise that two releases share could be taken out of both, so other options or other records draw other noise.
        key = stream(load_key(self.key_file), KEY_BYTES, "learner", seed, self.settings, *records)
        return Mechanism(sigma, self.max_norm, items, size / items, steps, key)

    def report(self, mechanism: Mechanism) -> dict[str, Any]:
        """The guarantee as an adapter's result and card state it."""
        epsilon = spent_epsilon([mechanism.spends], self.delta, self.accountant)
        return {
            "unit": UNIT,
            "epsilon": epsilon,
            "auroc_at_most": auroc_bound(mechanism.spends, epsilon, self.delta),
            "delta": self.delta,
            "sigma": mechanism.sigma,
            "max_per_sample_grad_norm": mechanism.max_norm,
            "sample_rate": mechanism.rate,
            "steps": mechanism.steps,
            "accountant": self.accountant,
        }

    def together(self, mechanism: Mechanism, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
        """Epsilon of this training and an earlier one on the same items together; None where that was not private.

        Args:
            earlier: the report of the earlier one; None: it was not private.
        """
        if earlier is None:
            return {"epsilon_with_adapter": None}
        history = [(earlier["sigma"], earlier["sample_rate"], earlier["steps"]), mechanism.spends]
        return {"epsilon_with_adapter": spent_epsilon(history, self.delta, self.accountant)}


def key_file(settings: PrivacySettings, folder: Path) -> Path:
    """The secret of a stage that writes to `folder`."""
    return Path(settings.noise_key) if settings.noise_key else folder / KEY_FILE


def terms_of(
    settings: PrivacySettings, folder: Path, recorded: Mapping[str, Any], other_use: bool = False
) -> Terms | None:
    """The differential-privacy options of a stage script that writes to `folder`; None without `--enable_dp`.

    Args:
        recorded: all settings that results depend on.
        other_use: of the key, beside the noise.

    Raises:
        InputError: options that contradict each other.
    """
    given = [name for name in ("epsilon", "sigma", "noise_key") if getattr(settings, name) is not None]
    if not settings.enable_dp:
        if given and not (other_use and given == ["noise_key"]):
            raise InputError(f"--{given[0]} does nothing without --enable_dp")
        return None
    if (settings.epsilon is None) == (settings.sigma is None):
        which = "both are" if settings.epsilon is not None else "none is"
        raise InputError(f"--enable_dp needs one of --epsilon (the budget) and --sigma (the noise); {which} given")
    return Terms(
        settings.epsilon,
        settings.sigma,
        settings.delta,
        settings.max_per_sample_grad_norm,
        settings.accountant,
        key_file(settings, folder),
        json.dumps(dict(recorded), sort_keys=True),
    )


# -- gradients ------------------------------------------------------------------------------------------------------


@contextmanager
def one_slice_per_row(stacks: Sequence[Tensor], slots: Sequence[int]) -> Iterator[None]:
    """Within the block, slice j of every stack `[n, ...]` is a copy of slice slots[j], `[b, ...]`.

    Rows routed to 0 .. b - 1 then leave one gradient per row in `.grad`, the one that each would leave in a pass alone.
    Outside the block the gradients are gone.
    """
    index = torch.as_tensor(slots, device=stacks[0].device)
    kept = {id(stack): (stack, stack.data) for stack in stacks}  # a stack may be named twice
    for stack, data in kept.values():
        stack.grad, stack.data = None, data.index_select(0, index)
    try:
        yield
    finally:
        for stack, data in kept.values():
            stack.grad, stack.data = None, data


def row_norms(grads: Sequence[Tensor]) -> Tensor:
    """Norm of each row's gradient over all tensors: `[b, ...]` each -> `[b]`."""
    return torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()


def add_clipped(sums: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[int], limits: Sequence[float]) -> None:
    """Add each row's gradient, scaled to norm limits[j] at most, to slice slots[j] of the sums `[n, ...]`."""
    norms = row_norms(grads)
    factor = (norms.new_tensor(limits) / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    index = torch.as_tensor(slots, device=norms.device)
    for total, grad in zip(sums, grads, strict=True):
        total.index_add_(0, index, grad * factor.view(-1, *[1] * (grad.dim() - 1)))


def add_noise(sums: Sequence[Tensor], slot: int, mechanism: Mechanism, step: int) -> None:
    """Noise on one adapter's sums, and the mean by the expected size of a step; in place."""
    for number, total in enumerate(sums):
        if mechanism.sigma:
            total[slot] += mechanism.noise(step, number, total.shape[1:]).to(total.device)
        total[slot] /= mechanism.size
