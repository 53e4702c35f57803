"""Forward and backward passes over training rows: padding, dropout, losses, and parts within a token budget.

Shapes: `b` rows, `t` tokens, `d` width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from prime.bank.bank import AdapterBank
from prime.bank.encoding import EncodedRecord
from prime.bank.linear import InputScaler

# For the adapters of a batch's rows, what stands in front of their factor pairs: `prime.merging.gates.Gates.scaler`.
Scalers = Callable[[list[int]], InputScaler]


@dataclass(frozen=True)
class TrainRow:
    """One record of a step, under the adapter that learns from it."""

    learner: int
    slot: int  # of its adapter in the bank
    number: int  # within the learner's batch
    noise: int  # seed of this row's dropout
    record: EncodedRecord

    @property
    def length(self) -> int:
        """Tokens that are fed: nothing is predicted behind the last one."""
        return len(self.record.ids) + len(self.record.target) - 1


@dataclass(frozen=True)
class Passes:
    """How rows go forward and backward, and the tensors that then hold gradients."""

    bank: AdapterBank
    dropout: float
    budget: int  # tokens of one pass
    scalers: Scalers | None  # gates in front of the factor pairs
    trained: Sequence[Tensor]  # stacks [n, ...], one slice per adapter

    def parts(self, rows: list[TrainRow]) -> Iterator[list[TrainRow]]:
        """Rows in ascending length, parted so that rows x longest stays within the budget; at least one row each.

        On a CPU each learner's rows go alone: rounding depends on a pass's shape, so that what a learner becomes would
        depend on its neighbours. A GPU would wait between so small passes.
        """
        alone = self.bank.device.type == "cpu"
        part: list[TrainRow] = []
        for row in sorted(rows, key=lambda row: (alone * row.learner, row.length, row.learner, row.number)):
            full = (len(part) + 1) * row.length > self.budget
            if part and (full or (alone and row.learner != part[0].learner)):
                yield part
                part = []
            part.append(row)
        if part:
            yield part

    def backward(self, rows: list[TrainRow], weights: Sequence[float]) -> list[float]:
        """One pass of the rows' summed losses, each times its weight; returns these products."""
        nll = row_losses(self.bank, rows, self.dropout, self.scalers)
        share = torch.tensor(weights, device=nll.device)
        (nll * share).sum().backward()
        return (nll.detach() * share).tolist()


def row_losses(bank: AdapterBank, rows: list[TrainRow], dropout: float, scalers: Scalers | None = None) -> Tensor:
    """Summed negative log-likelihood of each row's target, `[b]`; rows are padded at the right, where no one looks.

    Raises:
        InputError: a record has more tokens than the model has positions.
    """
    for row in rows:
        bank.check_length(row.record.id, len(row.record.ids), len(row.record.target))
    texts = [[*row.record.ids, *row.record.target[:-1]] for row in rows]
    width = bank.width(max(len(text) for text in texts))
    first = min(len(row.record.ids) for row in rows) - 1  # first column that predicts a target token
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=bank.device)
    labels = torch.tensor([_labels(row.record, first, width) for row in rows], device=bank.device)
    with bank.routed([row.slot for row in rows], _in_front(rows, dropout, scalers)):
        logits = bank.model(input_ids=ids, logits_to_keep=width - first, use_cache=False).logits
    nll = functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return nll.sum(1)


def _in_front(rows: list[TrainRow], dropout: float, scalers: Scalers | None) -> InputScaler | None:
    """What the input of a factor pair goes through: its gate, then dropout. None where there is neither."""
    in_order: list[InputScaler] = []
    if scalers:
        in_order.append(scalers([row.slot for row in rows]))
    if dropout:
        in_order.append(dropout_scaler(rows, dropout))

    def scale(module: int, x: Tensor) -> Tensor:
        for scaler in in_order:
            x = scaler(module, x)
        return x

    return scale if in_order else None


def _labels(record: EncodedRecord, first: int, width: int) -> list[int]:
    """Next-token targets of columns first .. width - 1; -100 where nothing counts."""
    before = len(record.ids) - 1 - first
    return [-100] * before + list(record.target) + [-100] * (width - first - before - len(record.target))


def dropout_scaler(rows: list[TrainRow], rate: float) -> InputScaler:
    """LoRA dropout whose noise belongs to (adapter seed, step, row, module): the same in any batch."""

    def scale(module: int, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        stream = torch.Generator(device=x.device)
        for place, row in enumerate(rows):
            stream.manual_seed((row.noise + module) % 2**63)
            kept = torch.empty(row.length, x.shape[-1], dtype=x.dtype, device=x.device)
            mask[place, : row.length] = kept.bernoulli_(1 - rate, generator=stream)
        return x * mask.div_(1 - rate)

    return scale
