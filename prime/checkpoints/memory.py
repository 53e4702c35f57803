"""Bytes that passes of a stage take, by formulas over a model on the meta device, where tensors have no data.

Weights, adapters and key-value cache are exact. Activations follow what PyTorch keeps of a decoder layer: attention by
SDPA, a gated feed-forward part, LoRA with dropout. Not counted: per-item gradients of `--enable_dp`, experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from prime.bank.bank import AdapterBank
from prime.bank.budgets import cache_bytes
from prime.bank.cache import ROOM

MANY = 2**31  # rows, where nothing but the batches limits how many are in memory

# Assumed where only --max_length is known, which no prompt exceeds. On the demo a third to half of a prompt is shared.
SHORTEST = 64
SHARED = 0.5

# Bytes of a logit beside the model's own: the sampler's noise in float64; a loss's log-probabilities in float32 with
# two gradients. A score takes those of one row at a time.
LOGIT_BYTES = {"answering": 36, "training": 12, "scoring": 0}

HEAP_LAYERS = 4


@dataclass(frozen=True)
class Work:
    """Passes of one kind that a stage makes, at their largest. Lengths are in tokens."""

    kind: Literal["training", "answering", "scoring"]
    adapters: int  # in the bank together
    rank: int  # of each
    prompt: int  # length of the longest prompt
    answer: int  # length of the longest answer or target
    rows: int = MANY  # (adapter, record) pairs of one training step, or of one call that answers or scores
    shortest: int = SHORTEST  # length of the shortest prompt: it tells how many rows share a pass
    shared: float = SHARED  # share of a prompt that others begin with, too: cached for every row, but not fed
    other_ranks: int = 0  # of further adapters in memory, ranks added up
    gradient_checkpointing: bool = False

    @property
    def length(self) -> int:
        """Of the longest row."""
        return self.prompt + self.answer

    def rows_within(self, tokens: float, shared: float = 0.0) -> int:
        """Rows, `shared` of their prompts left out, that have so many tokens together; at least one."""
        shortest = (1 - shared) * min(self.shortest, self.prompt) + self.answer
        return max(1, min(self.rows, int(tokens / shortest)))


def meta_bank(config: Any, dtype: torch.dtype, targets: Sequence[str]) -> AdapterBank:
    """The bank over a model of this configuration, without data; InputError as for a real one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return AdapterBank(model, targets)


def itemsize(bank: AdapterBank) -> int:
    """Bytes of a weight and of an activation."""
    return next(bank.model.parameters()).element_size()


# -- what lasts -----------------------------------------------------------------------------------------------------


def factor_bytes(bank: AdapterBank) -> int:
    """Of an adapter of rank 1, in float32."""
    return sum(4 * (wrapper.base.in_features + wrapper.base.out_features) for wrapper in bank.wrappers.values())


def adapter_bytes(bank: AdapterBank, work: Work) -> int:
    """Adapters; in training with their gradients and AdamW's two moments."""
    copies = 4 if work.kind == "training" else 1
    return factor_bytes(bank) * (copies * work.adapters * work.rank + work.other_ranks)


def cached_bytes(bank: AdapterBank, work: Work, tokens: int, waiting: int) -> int:
    """Keys and values of rows that wait to be decoded together, and of a pass that feeds so many tokens beside them."""
    cached = min(work.rows * work.length, waiting + int(tokens / (1 - work.shared)))
    room = ROOM * work.rows_within(cached) if waiting else 0
    return (cached + room) * cache_bytes(bank.config, itemsize(bank))


# -- activations ----------------------------------------------------------------------------------------------------


def output_widths(bank: AdapterBank) -> list[int]:
    """Of all linear modules but the one that puts out logits."""
    model: Any = bank.model
    head = model.get_output_embeddings()
    return [module.out_features for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


def layer_bytes(bank: AdapterBank) -> int:
    """Of a token: what one layer needs while it computes, and gives back."""
    return itemsize(bank) * (3 * max(output_widths(bank)) + 4 * bank.config.hidden_size)


def forward_bytes(bank: AdapterBank, work: Work, tokens: int, waiting: int) -> int:
    """A pass over prompts and drafts, or the joining of all that waited, which copies one layer's cache at a time.

    The most logits are those of such a pass, or of a step of all that waited.
    """
    drafted = work.rows_within(tokens, work.shared) * (1 + work.answer)
    positions = min(tokens, max(drafted, work.rows_within(waiting)))
    logits = positions * bank.config.vocab_size * (2 * itemsize(bank) + LOGIT_BYTES[work.kind])
    mask = tokens * work.length * (3 + itemsize(bank))
    joined = cached_bytes(bank, work, tokens, waiting) // bank.layers if waiting else 0
    return max(logits, joined, tokens * layer_bytes(bank) + mask)


def kept_bytes(bank: AdapterBank) -> int:
    """Of a token: what all layers keep for the backward pass.

    In the model's own type what linear modules put out (but those that write to the residual stream), attention with
    keys and values for every head, and the activation function. In float32 the inputs of two norms, and of every
    adapter its input after dropout with the mask of that.
    """
    layers, width, widths = bank.layers, bank.config.hidden_size, output_widths(bank)
    outputs = sum(widths) + layers * (max(widths) + width) - cache_bytes(bank.config, 1)
    adapters = sum(wrapper.base.in_features for wrapper in bank.wrappers.values())
    return itemsize(bank) * outputs + 4 * (2 * layers * width + 2 * adapters)


def training_bytes(bank: AdapterBank, work: Work, tokens: int) -> int:
    """A forward and backward pass; every row has its own copy of its adapter's factors."""
    rows = work.rows_within(tokens)
    kept = tokens * kept_bytes(bank) + rows * work.rank * factor_bytes(bank)
    if work.gradient_checkpointing:
        kept = tokens * bank.layers * itemsize(bank) * bank.config.hidden_size + kept // bank.layers
    logits = rows * work.answer * bank.config.vocab_size * (itemsize(bank) + LOGIT_BYTES["training"])
    return kept + max(logits, tokens * layer_bytes(bank))


def heap_bytes(bank: AdapterBank, work: Work, tokens: int, waiting: int = 0) -> int:
    """On a CPU, what malloc holds beyond the tensors that are alive.

    An aligned block does not fit the hole that one of its size left, so the tensors of a layer lie in the heap several
    times (HEAP_LAYERS, measured with glibc). Rows that were joined leave the place of their first caches behind.
    """
    if work.kind != "training":
        return HEAP_LAYERS * tokens * layer_bytes(bank) + cached_bytes(bank, work, tokens, waiting)
    return HEAP_LAYERS * tokens * (layer_bytes(bank) + kept_bytes(bank) // bank.layers)
