"""How many tokens go through the model at once, as a function of model and device alone.

Batches therefore do not depend on what ran before, and neither does the order in which floating-point sums are taken.
"""

from typing import Any

import torch
from torch import nn

from prime.bank.bank import AdapterBank
from prime.bank.limits import numbers

WAITING_BUDGETS = 4  # cached tokens of waiting rows, in batch budgets, before they are decoded together
# On a CPU a step of few rows is bound by reading the weights, so more rows wait as long as their caches stay small.
CPU_WAITING_BUDGETS, CPU_WAITING_BYTES = 16, 2**29
CPU_BATCH_TOKENS = 1536  # about 1,500 beat 4,000 and 8,000 on a CPU: larger batches fall out of its cache
GPU_BATCH_TOKENS = 16_384  # at most


def auto_batch_tokens(bank: AdapterBank) -> int:
    """Tokens per forward pass that suit the bank's devices together; see `batch_tokens`."""
    gpus = {wrapper.device for wrapper in bank.wrappers.values()} if bank.device.type == "cuda" else ()
    memory = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus) or None
    return batch_tokens(bank.config, weight_bytes(bank.model), memory)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def batch_tokens(config: Any, weights: int, memory: int | None) -> int:
    """Tokens per forward pass.

    Args:
        config: the model's Hugging Face configuration.
        weights: bytes of the model's parameters.
        memory: bytes of the GPUs together; None on a CPU.

    Returns:
        A constant on a CPU. On a GPU what a tenth of the memory beside the weights holds: the caches of waiting rows
        take several times as much as one pass.
    """
    if memory is None:
        return CPU_BATCH_TOKENS
    hidden, inner = largest(config, "hidden_size"), largest(config, "intermediate_size")
    width = hidden * 12 + (inner or 4 * hidden) * 3
    per_token = 2 * (width + 2 * hidden * config.num_hidden_layers) + 4 * config.vocab_size
    return max(CPU_BATCH_TOKENS, min(GPU_BATCH_TOKENS, int((memory - weights) / 10 / per_token)))


def waiting_tokens(config: Any, budget: int, on_cpu: bool) -> int:
    """Cached tokens of rows that wait to be decoded together, given the token budget of one pass."""
    if not on_cpu:
        return WAITING_BUDGETS * budget
    per_token = cache_bytes(config, 4)
    return budget * max(WAITING_BUDGETS, min(CPU_WAITING_BUDGETS, CPU_WAITING_BYTES // (per_token * budget)))


def cache_bytes(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token in all layers, numbers of `itemsize` bytes each."""
    heads = largest(config, "num_attention_heads")
    head_width = largest(config, "head_dim") or largest(config, "hidden_size") // heads
    kv_heads = largest(config, "num_key_value_heads") or heads
    return 2 * config.num_hidden_layers * kv_heads * head_width * itemsize


def largest(config: Any, name: str) -> int:
    """A size of a configuration, that of the largest layer where they differ; 0 if it says none."""
    return max(numbers(config, name), default=0)
