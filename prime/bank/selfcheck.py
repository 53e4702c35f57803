"""A self-check of a model that was just loaded: rows in the batches that are made here, against each row alone in
a plain forward pass. It catches families that nobody thought of.

Two rows share a prefix, have unequal lengths, a refused guess, and adapters of their own; a shorter row joins them.
Training's batches are checked, too. All passes together take some hundred tokens.

Shapes: `t` tokens, `v` vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from prime.bank.bank import AdapterBank
from prime.bank.encoding import EncodedRecord, Tokens
from prime.bank.lora import Adapter
from prime.bank.passes import TrainRow, row_losses
from prime.bank.rows import Batch, Prefix, Row
from prime.errors import InputError, tell

# What other orders of a sum explain: root mean square of the differences between logits, in units of their spread.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}

PREFIX, GUESS = 4, 3  # tokens


def check_rows(bank: AdapterBank, source: str) -> None:
    """Check the model of a bank that is empty, and leave it so.

    Where rows are right only without holes among their tokens, the bank makes such batches.

    Args:
        source: the model's directory, for messages.

    Raises:
        InputError: rows would change each other's answers, or the model cannot be run in such batches at all.
    """
    model: Any = bank.model
    family = f"{source}: a model of the kind {model.config.model_type}"
    problem = _problem(bank)
    if problem and bank.lookback:
        bank.lookback = 0
        problem = _problem(bank)
        if not problem:
            tell(f"{family}: its attention counts padding, so prompts share no prefix and drafts are not used (slower)")
    if problem:
        raise InputError(f"{family} is not supported: {problem}")


def _problem(bank: AdapterBank) -> str:
    """What is wrong with the model's rows; "" if nothing is."""
    bank.load([_adapter(bank, seed) for seed in range(2)])
    try:
        difference, dtype = largest_difference(bank)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever a family does with a cache, a mask or positions that it does not know
        return f"its layers fail on batches with a shared cache ({type(error).__name__}: {str(error)[:200]})"
    finally:
        bank.clear()
    if math.isnan(difference):
        return f"its logits are not finite in {str(dtype).removeprefix('torch.')} (--dtype)"
    if difference > TOLERANCE.get(dtype, 0):
        return f"its logits depend on the other rows of a batch (by {difference:.1g} of their spread)"
    return ""


def _adapter(bank: AdapterBank, seed: int) -> Adapter:
    """One of rank 1 that changes logits visibly."""
    stream = torch.Generator().manual_seed(seed)
    factors = {}
    for name, wrapper in bank.wrappers.items():
        a = torch.randn(1, wrapper.base.in_features, generator=stream) / math.sqrt(wrapper.base.in_features)
        factors[name] = (a, torch.rand(wrapper.base.out_features, 1, generator=stream) - 0.5)
    return Adapter(factors, 1.0)


@torch.inference_mode()
def largest_difference(bank: AdapterBank) -> tuple[float, torch.dtype]:
    """How far the worst row is from itself alone, in units of its logits' spread; NaN where logits are not finite.

    The second value is the logits' type.
    """
    batch, texts = _batch(bank)
    answers = [_ids(bank, 5 + place, length) for place, length in enumerate((2, 1, 3))]
    logits = batch.feed([answer[:1] for answer in answers], [answer[1:] for answer in answers])
    rows = [TrainRow(0, row.adapter, 0, 0, EncodedRecord(row.name, *pair))
            for row, pair in zip(batch.rows, zip(texts, answers, strict=True), strict=True)]  # fmt: skip
    differences: list[Tensor] = []
    for row, together, loss in zip(rows, logits, row_losses(bank, rows, 0.0), strict=True):
        ids, answer = row.record.ids, row.record.target
        with bank.routed([row.slot]):
            whole = bank.model(input_ids=torch.tensor([ids + answer], device=bank.device), use_cache=False)
        alone = whole.logits[0].float()
        spread = alone.std()
        differences.append((together[: len(answer)].float() - alone[len(ids) :]).square().mean().sqrt() / spread)
        target = torch.tensor(answer, device=alone.device)[:, None]
        nll = -alone[len(ids) - 1 : -1].log_softmax(1).gather(1, target).sum()
        # A log-probability is about as far off as the two logits that it takes most of its value from.
        differences.append((loss - nll).abs() / len(answer) / spread / 2)
    return float(torch.stack(differences).max()), logits.dtype


def _batch(bank: AdapterBank) -> tuple[Batch, list[Tokens]]:
    """Three rows, with a shared prefix and holes where the bank allows them, and their tokens so far."""
    first, second, third = (_ids(bank, seed, length) for seed, length in enumerate((7, 12, 5)))
    length = PREFIX if bank.lookback else 0
    second = first[:length] + second[length:]
    guesses = [_ids(bank, seed, GUESS if length else 0) for seed in (3, 4)]
    prefix = Prefix(bank, first[:length], [0, 1]) if length else None
    rows = [Row(0, 0, first[length:], "first"), Row(1, 1, second[length:], "second")]
    pair = Batch.begin(bank, rows, prefix)
    pair.feed([row.text for row in rows], guesses)
    accepted = [0, 1 if length else 0]  # a whole guess refused, and all but one token of another
    pair.accept(torch.tensor(accepted, device=bank.device), len(guesses[0]))
    single = Batch.begin(bank, [Row(1, 2, third, "third")], None)
    single.feed([third], [()])
    return Batch.join([pair, single]), [first, second + guesses[1][: accepted[1]], third]


def _ids(bank: AdapterBank, seed: int, length: int) -> Tokens:
    """Tokens from the middle of the vocabulary, where none has a special meaning."""
    vocabulary: int = bank.config.vocab_size
    stream = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(vocabulary // 4, vocabulary * 3 // 4, (length,), generator=stream).tolist())
