"""Joint training of many adapters in one bank, each as if it were alone.

Every adapter has its own data order, dropout, AdamW state, gradient clipping and schedule; a step of the bank is one
batch of every adapter that is not finished yet. What is trained is a list of stacked tensors `[n, ...]`, one slice
per adapter: the bank's own factors, or gates in front of them (`prime.merging.gates`). The rows of a step are sorted by
length and cut into micro-batches by a token budget; an adapter's loss is the mean over the target tokens of its own
batch, so neither neighbours nor micro-batches change it. Learners with a `prime.bank.dp.Mechanism` get the noisy mean
of their items' clipped gradients instead.

Shapes: `n` adapters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from prime.bank.bank import AdapterBank
from prime.bank.dp import Mechanism, add_clipped, add_noise, one_slice_per_row
from prime.bank.encoding import EncodedRecord
from prime.bank.passes import Passes, Scalers, TrainRow
from prime.errors import InputError
from prime.seeds import derive_seed
from prime.settings import TrainingSettings

BETAS = (0.9, 0.95)  # of AdamW, as published
TRAIN_BATCH_TOKENS = 2048  # tokens of one forward and backward pass


@dataclass(frozen=True)
class Learner:
    """One adapter's task."""

    slot: int  # of the adapter in the bank
    name: str  # for messages
    seed: int
    records: Sequence[EncodedRecord]
    mechanism: Mechanism | None = None  # then every record is one protected item

    def batches(self, settings: TrainingSettings) -> list[list[EncodedRecord]]:
        """The batches of all epochs, at most `max_step`, in this learner's own order; a mechanism draws its own."""
        if self.mechanism:
            return self.mechanism.batches(self.records)
        batches = []
        for epoch in range(settings.epochs):
            stream = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
            order = torch.randperm(len(self.records), generator=stream).tolist()
            for start in range(0, len(order), settings.batch_size):
                batches.append([self.records[i] for i in order[start : start + settings.batch_size]])
        return batches[: settings.max_step or None]


def cosine_lr(settings: TrainingSettings, step: int, steps: int) -> float:
    """Cosine decay from lr to min_lr, no warm-up; `step` counts from 0 (published: one step late)."""
    if settings.lr_schedule == "published":
        step = max(0, step - 1)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    bank: AdapterBank,
    learners: Sequence[Learner],
    settings: TrainingSettings,
    max_batch_tokens: int = 0,
    progress: Callable[[int], object] | None = None,
    stacks: Sequence[Tensor] | None = None,
    scalers: Scalers | None = None,
) -> list[list[float | None]]:
    """Train the bank's adapters, or what stands in front of them, in place.

    Args:
        bank: filled by `bank.allocate`, or by `bank.load` where the adapters are frozen; learner.slot is its place.
        max_batch_tokens: tokens of a forward and backward pass; 0 = chosen for the device.
        progress: called with the number of batches just done.
        stacks: the trained tensors `[n, ...]`, one slice per adapter; None: the bank's trainable factors.
        scalers: gates in front of the factor pairs; dropout follows behind them.

    Returns:
        Per learner, the loss of every step: mean over the target tokens of its batch, before the update. With a
        mechanism: mean over the batch's items of the mean over their target tokens; None for a step without items.

    Raises:
        InputError: a loss that is not finite, naming the learner.
    """
    batches = [learner.batches(settings) for learner in learners]  # [learners][steps][records]
    trained = [p for p in bank.parameters() if p.requires_grad] if stacks is None else list(stacks)
    optimizers = [
        _Optimizer(trained, learner.slot, len(steps), settings)
        for learner, steps in zip(learners, batches, strict=True)
    ]
    passes = Passes(bank, settings.lora_dropout, max_batch_tokens or TRAIN_BATCH_TOKENS, scalers, trained)
    mechanisms = _mechanisms(learners)
    losses: list[list[float | None]] = [[] for _ in learners]
    with bank.checkpointing(settings.gradient_checkpointing):
        for step in range(max(map(len, batches), default=0)):
            active = [i for i in range(len(learners)) if step < len(batches[i])]
            rows: list[TrainRow] = []
            for i in active:
                rows += _rows(i, learners[i], step, batches[i][step])
            if mechanisms:
                step_losses = _accumulate_clipped(passes, rows, mechanisms)
                for i in active:
                    add_noise([_grad(stack) for stack in trained], learners[i].slot, mechanisms[i], step)
            else:
                step_losses = _accumulate(passes, rows, len(learners))
            norms = clip_by_adapter(trained, math.inf if mechanisms else settings.clip)
            for i in active:
                _check_finite(learners[i], step, step_losses[i], float(norms[learners[i].slot]))
                losses[i].append(step_losses[i] if batches[i][step] else None)
                optimizers[i].step(step)
            for stack in trained:
                stack.grad = None
            if progress:
                progress(len(active))
    return losses


def _check_finite(learner: Learner, step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        values = f"the training loss is {loss}, its gradient's norm {norm}"
        raise InputError(f"{learner.name}: step {step}: {values}; lower --lr")


def _mechanisms(learners: Sequence[Learner]) -> list[Mechanism]:
    """The learners' mechanisms, or none at all."""
    mechanisms = [learner.mechanism for learner in learners if learner.mechanism]
    if mechanisms and len(mechanisms) < len(learners):
        raise ValueError("private and plain learners cannot be trained together")
    return mechanisms


def _rows(number: int, learner: Learner, step: int, batch: Sequence[EncodedRecord]) -> list[TrainRow]:
    """The rows of the batch of learner `number` of all.

    Dropout of a private item belongs to the item: a number in the batch would let one item change another's mask.
    """
    rows = []
    for in_batch, record in enumerate(batch):
        noise = derive_seed("dropout", learner.seed, step, record.id if learner.mechanism else in_batch)
        rows.append(TrainRow(number, learner.slot, in_batch, noise, record))
    return rows


def _accumulate(passes: Passes, rows: list[TrainRow], n: int) -> list[float]:
    """Forward and backward over one batch of every learner; returns each one's loss, gradients stay in the stacks."""
    tokens = [0] * n
    for row in rows:
        tokens[row.learner] += len(row.record.target)
    losses = [0.0] * n
    for part in passes.parts(rows):
        row_losses = passes.backward(part, [1 / tokens[row.learner] for row in part])
        for row, loss in zip(part, row_losses, strict=True):
            losses[row.learner] += loss
    return losses


def _accumulate_clipped(passes: Passes, rows: list[TrainRow], mechanisms: Sequence[Mechanism]) -> list[float]:
    """As `_accumulate`, for items whose own gradients are clipped before they are summed.

    An item's loss is the mean over its own target tokens, so no item changes what another contributes. Returns the
    mean loss of each learner's items.
    """
    gradient_sums = [torch.zeros_like(stack) for stack in passes.trained]
    sums, counts = [0.0] * len(mechanisms), [0] * len(mechanisms)
    everything = [*passes.bank.stacks(), *passes.trained]
    for part in passes.parts(rows):
        slots = [row.slot for row in part]
        with one_slice_per_row(everything, slots):
            rerouted = [replace(row, slot=slot) for slot, row in enumerate(part)]
            item_losses = passes.backward(rerouted, [1 / len(row.record.target) for row in part])
            limits = [mechanisms[row.learner].max_norm for row in part]
            add_clipped(gradient_sums, [_grad(stack) for stack in passes.trained], slots, limits)
        for row, loss in zip(part, item_losses, strict=True):
            sums[row.learner] += loss
            counts[row.learner] += 1
    for stack, gradient_sum in zip(passes.trained, gradient_sums, strict=True):
        stack.grad = gradient_sum
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]


def _grad(stack: Tensor) -> Tensor:
    if stack.grad is None:
        raise ValueError("a trained tensor that no row went through")
    return stack.grad


def clip_by_adapter(parameters: list[Tensor], limit: float) -> Tensor:
    """Scale each adapter's gradient to norm at most `limit` over all its tensors, as clip_grad_norm_ does for one.

    Returns:
        The norms before, `[n]`.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # One adapter after the other: a sum over all at once would be rounded otherwise for other numbers of them.
    norms = torch.stack([get_total_norm([grad[slot] for grad in grads]) for slot in range(len(grads[0]))])
    factor = (limit / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.view(-1, *[1] * (grad.dim() - 1)))
    return norms


class _Optimizer:
    """AdamW over one adapter's slices of the stacked tensors, with its own cosine schedule."""

    def __init__(self, stacks: list[Tensor], slot: int, steps: int, settings: TrainingSettings):
        self.stacks, self.slot, self.steps, self.settings = stacks, slot, steps, settings
        self.slices = [torch.nn.Parameter(stack.data[slot]) for stack in self.stacks]
        self.adamw = torch.optim.AdamW(
            self.slices, lr=settings.lr, betas=BETAS, weight_decay=settings.weight_decay, fused=True
        )

    def step(self, step: int) -> None:
        self.adamw.param_groups[0]["lr"] = cosine_lr(self.settings, step, self.steps)
        for part, stack in zip(self.slices, self.stacks, strict=True):
            part.grad = None if stack.grad is None else stack.grad[self.slot]
        self.adamw.step()
