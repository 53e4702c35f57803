"""The shape of a Llama as Meta publishes it, `params.json`, and the same as a Hugging Face configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from prime.checkpoints.tensors import layers_problem, number_problem, shown
from prime.errors import InputError
from prime.runs.files import read_json

PARAMS = "params.json"
LLAMA2_VOCABULARY = 32_000

# Meta's params.json says `use_scaled_rope` but not the factor: 8 in Llama 3.1, 32 in the text models of 3.2, which
# are known by (width, layers). Source: the config.json that Meta publishes on the hub for each.
ROPE_FACTOR, ROPE_FACTORS = 8.0, {(2048, 16): 32.0, (3072, 28): 32.0}


def is_meta_dir(path: str | Path) -> bool:
    """A directory with params.json and without config.json, which would make it a Hugging Face one."""
    return (Path(path) / PARAMS).is_file() and not (Path(path) / "config.json").is_file()


@dataclass(frozen=True)
class Params:
    """The shape of a Llama as its params.json tells it; `vocab_size` -1 (Llama 2): as many as the embeddings have."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_factor: float | None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def positions(self) -> int:
        """Context length: not in params.json, but Llama 2 (4,096), 3 (8,192) and 3.1 (131,072) differ in RoPE."""
        if self.rope_factor is not None:
            return 131_072
        return 8192 if self.rope_theta >= 500_000 else 4096


WHOLE = ("dim", "n_layers", "n_heads", "multiple_of")
REAL = ("norm_eps", "rope_theta")
OPTIONAL_REAL = ("ffn_dim_multiplier", "rope_scaling_factor")
PARAMS_DEFAULTS = {"multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1, "rope_theta": 10_000.0}


def read_params(folder: str | Path) -> Params:
    """Read params.json; InputError names each field that is missing or not a number that a model could have."""
    path = Path(folder) / PARAMS
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of numbers, found {type(content).__name__}")
    fields: dict[str, Any] = PARAMS_DEFAULTS | content
    if problems := _params_problems(fields):
        raise InputError.many([f"{path}: {problem}" for problem in problems])
    dim, heads = fields["dim"], fields["n_heads"]
    kv_heads = fields.get("n_kv_heads") or heads
    if dim % heads or heads % kv_heads:
        raise InputError(f"{path}: dim {dim} is no multiple of n_heads {heads}, or that not of n_kv_heads {kv_heads}")
    return Params(
        dim=dim,
        n_layers=fields["n_layers"],
        n_heads=heads,
        n_kv_heads=kv_heads,
        hidden=_hidden(fields),
        vocab_size=fields["vocab_size"],
        norm_eps=fields["norm_eps"],
        rope_theta=fields["rope_theta"],
        rope_factor=_rope_factor(fields),
    )


def _params_problems(fields: Mapping[str, Any]) -> list[str]:
    wholes = [*WHOLE, *(["n_kv_heads"] if fields.get("n_kv_heads") else [])]
    numbers = [*REAL, *(key for key in OPTIONAL_REAL if fields.get(key))]
    problems = [number_problem(fields, key, int) for key in wholes]
    problems += [number_problem(fields, key, int | float) for key in numbers]
    vocab_size = fields["vocab_size"]
    if type(vocab_size) is not int or not (vocab_size == -1 or vocab_size > 0):
        problems.append(f"vocab_size is {shown(repr(vocab_size))}, expected a whole number, or -1")
    problems.append(layers_problem(fields, "n_layers"))
    return [problem for problem in problems if problem]


def _hidden(fields: Mapping[str, Any]) -> int:
    """Width of the feed-forward layer: two thirds of 4 d, times a multiplier, rounded up (Touvron et al. 2023)."""
    width = int(2 * (4 * fields["dim"]) / 3)
    width = int((fields.get("ffn_dim_multiplier") or 1) * width)
    return fields["multiple_of"] * math.ceil(width / fields["multiple_of"])


def _rope_factor(fields: Mapping[str, Any]) -> float | None:
    """By how much the slow rotary frequencies are slowed down further; None: they are not."""
    if not fields.get("use_scaled_rope"):
        return None
    published = ROPE_FACTORS.get((fields["dim"], fields["n_layers"]), ROPE_FACTOR)
    return float(fields.get("rope_scaling_factor") or published)


def llama_config(params: Params, vocab_size: int, tied: bool, dtype: torch.dtype | None = None) -> LlamaConfig:
    """The Hugging Face configuration of the same model; ids of BOS and EOS are the tokenizer's to set."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(params.rope_theta)}
    if params.rope_factor is not None:
        rope |= {"rope_type": "llama3", "factor": params.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 8192}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=params.dim,
        intermediate_size=params.hidden,
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.n_kv_heads,
        max_position_embeddings=params.positions,
        rms_norm_eps=params.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        dtype=dtype,
    )


def config_of_params(folder: str | Path, dtype: torch.dtype) -> LlamaConfig:
    """The configuration by params.json alone, without reading the weights.

    Where params.json leaves the vocabulary open it is Llama 2's; the sizes of Llama 3.2 have tied embeddings.
    """
    params = read_params(folder)
    vocab_size = LLAMA2_VOCABULARY if params.vocab_size == -1 else params.vocab_size
    return llama_config(params, vocab_size, (params.dim, params.n_layers) in ROPE_FACTORS, dtype)
