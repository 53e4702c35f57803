"""Checkpoints as Meta publishes them: `params.json` and `consolidated.*.pth`, read tensor by tensor.

A directory holds one file per model-parallel shard; a weight is cut along its rows (column-parallel layers) or along
its columns (row-parallel ones), norms are whole in every shard. Meta's wq and wk keep the two halves of each rotary
pair in neighbouring rows, Hugging Face's q_proj and k_proj half a head apart, so their rows are permuted; so are
those of lora_B of adapters trained on Meta's layout (`rope_rows`).

Letters: `d` width, `v` vocabulary.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from prime.checkpoints.tensors import layers_problem, load_named, shown
from prime.errors import InputError
from prime.runs.files import read_json, replacing, write_json

PARAMS, SHARD = "params.json", re.compile(r"consolidated\.(\d+)\.pth")
SOURCE = "converted_from.json"  # beside a kept conversion: what it was made of
FILE_BYTES = 4 << 30  # of one safetensors file at most (or one tensor)
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Meta's name of a weight in a layer -> Hugging Face's, and the dimension that model parallelism cuts (None: none).
IN_LAYER: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
# Meta's params.json says `use_scaled_rope` but not the factor: 8 in Llama 3.1, 32 in the text models of 3.2, which
# are known by (width, layers). Source: the config.json that Meta publishes on the hub for each.
LLAMA2_VOCABULARY = 32_000
ROPE_FACTOR, ROPE_FACTORS = 8.0, {(2048, 16): 32.0, (3072, 28): 32.0}


def is_meta_dir(path: str | Path) -> bool:
    """A directory with params.json and without config.json, which would make it a Hugging Face one."""
    return (Path(path) / PARAMS).is_file() and not (Path(path) / "config.json").is_file()


@dataclass(frozen=True)
class Params:
    """The shape of a Llama as its params.json tells it; `vocab_size` -1 (Llama 2): that of the embeddings."""

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


def read_params(folder: str | Path) -> Params:
    """Read params.json; InputError names the field that is missing or no number."""
    path = Path(folder) / PARAMS
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object of numbers, found {type(found).__name__}")
    numbers: dict[str, Any] = {"multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1, "rope_theta": 10_000.0} | found
    wholes, reals = ("dim", "n_layers", "n_heads", "multiple_of"), ("norm_eps", "rope_theta")
    optional = [key for key in ("n_kv_heads", "ffn_dim_multiplier", "rope_scaling_factor") if numbers.get(key)]
    problems = [_number_problem(numbers, key, int) for key in (*wholes, *(k for k in optional if k == "n_kv_heads"))]
    problems += [_number_problem(numbers, key, int | float) for key in (*reals, *optional)]
    if type(numbers["vocab_size"]) is not int or not (numbers["vocab_size"] == -1 or numbers["vocab_size"] > 0):
        problems.append(f"vocab_size is {shown(repr(numbers['vocab_size']))}, expected a whole number, or -1")
    problems += [layers_problem(numbers, "n_layers")]
    if any(problems):
        raise InputError.many([f"{path}: {problem}" for problem in problems if problem])
    dim, heads = numbers["dim"], numbers["n_heads"]
    kv_heads = numbers.get("n_kv_heads") or heads
    if dim % heads or heads % kv_heads:
        raise InputError(f"{path}: dim {dim} is no multiple of n_heads {heads}, or that not of n_kv_heads {kv_heads}")
    factor = None
    if numbers.get("use_scaled_rope"):
        known = ROPE_FACTORS.get((dim, numbers["n_layers"]), ROPE_FACTOR)
        factor = float(numbers.get("rope_scaling_factor") or known)
    return Params(
        dim, numbers["n_layers"], heads, kv_heads, _hidden(numbers), numbers["vocab_size"],
        numbers["norm_eps"], numbers["rope_theta"], factor,
    )  # fmt: skip


def _number_problem(numbers: Mapping[str, Any], key: str, kind: Any) -> str:
    """What keeps a field from being a positive number that a model could have; empty if nothing does."""
    value = numbers.get(key)
    if isinstance(value, kind) and not isinstance(value, bool) and 0 < value < 2**31:
        return ""
    return f"{key} is {shown(repr(value))}, expected a positive {'whole number' if kind is int else 'number'}"


def _hidden(numbers: Mapping[str, Any]) -> int:
    """Width of the feed-forward layer: two thirds of 4 d, times a multiplier, rounded up (Touvron et al. 2023)."""
    width = int(2 * (4 * numbers["dim"]) / 3)
    width = int((numbers.get("ffn_dim_multiplier") or 1) * width)
    return numbers["multiple_of"] * math.ceil(width / numbers["multiple_of"])


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
    """The configuration by params.json alone, without a look at the weights.

    Vocabulary of a Llama 2, whose params.json does not tell it: its 32,000. Tied embeddings: the 3.2 sizes.
    """
    params = read_params(folder)
    vocab_size = LLAMA2_VOCABULARY if params.vocab_size == -1 else params.vocab_size
    return llama_config(params, vocab_size, (params.dim, params.n_layers) in ROPE_FACTORS, dtype)


def rope_rows(tensor: Tensor, heads: int) -> Tensor:
    """Rows `[heads * head_dim, ...]` from Meta's order (pairs side by side) to Hugging Face's (half a head apart)."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


# -- reading --------------------------------------------------------------------------------------------------------


class MetaCheckpoint:
    """The weights of a Meta directory under Hugging Face's names; nothing is read before it is asked for.

    Raises:
        InputError: no shard or a gap in their numbers, a file that is cut short, tensors missing, too many, or of
            another shape than params.json says; names file and tensor with both shapes.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.params = read_params(folder)
        self.files = shard_files(self.folder)
        self.shards = [_open(file) for file in self.files]
        self.vocab_size = self._vocabulary()
        self.plan = self._plan()  # Hugging Face's name -> (Meta's name, whole shape, cut dimension)
        self._check()
        self.tied = self._is_tied()
        if self.tied:
            self.plan.pop("lm_head.weight", None)
        self.dtype = self.shards[0]["tok_embeddings.weight"].dtype

    def _vocabulary(self) -> int:
        """Rows of the whole embeddings: Llama 2 cuts them along d, Llama 3 along v."""
        name = "tok_embeddings.weight"
        if name not in self.shards[0]:
            raise InputError(f"{self.files[0]}: lacks {name}")
        shape = tuple(self.shards[0][name].shape)
        if len(shape) != 2:
            raise InputError(f"{self.files[0]}: {name} is {shape}, expected two dimensions")
        rows, width = shape
        found = rows * len(self.files) if width == self.params.dim else rows
        if self.params.vocab_size not in (-1, found):
            raise InputError(
                f"{self.files[0]}: {name} is {(rows, width)}, so {len(self.files)} shards hold {found} tokens; "
                f"{PARAMS} says vocab_size {self.params.vocab_size}"
            )
        return found

    def _plan(self) -> dict[str, tuple[str, tuple[int, ...], int | None]]:
        p, v = self.params, self.vocab_size
        kv = p.n_kv_heads * p.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "attention.wq": (p.dim, p.dim), "attention.wk": (kv, p.dim), "attention.wv": (kv, p.dim),
            "attention.wo": (p.dim, p.dim), "feed_forward.w1": (p.hidden, p.dim), "feed_forward.w3": (p.hidden, p.dim),
            "feed_forward.w2": (p.dim, p.hidden), "attention_norm": (p.dim,), "ffn_norm": (p.dim,),
        }  # fmt: skip
        by_rows = self.shards[0]["tok_embeddings.weight"].shape[1] == p.dim
        plan: dict[str, tuple[str, tuple[int, ...], int | None]] = {
            "model.embed_tokens.weight": ("tok_embeddings.weight", (v, p.dim), 0 if by_rows else 1)
        }
        for layer in range(p.n_layers):
            for meta, (own, cut) in IN_LAYER.items():
                plan[f"model.layers.{layer}.{own}.weight"] = (f"layers.{layer}.{meta}.weight", shapes[meta], cut)
        plan["model.norm.weight"] = ("norm.weight", (p.dim,), None)
        if "output.weight" in self.shards[0]:
            plan["lm_head.weight"] = ("output.weight", (v, p.dim), 0)
        return plan

    def _check(self) -> None:
        problems = []
        n = len(self.files)
        for file, shard in zip(self.files, self.shards, strict=True):
            for name, shape, cut in self.plan.values():
                expected = tuple(size // n if place == cut else size for place, size in enumerate(shape))
                if name not in shard:
                    problems.append(f"{file}: lacks {name} {expected}")
                elif tuple(shard[name].shape) != expected:
                    told = f"{PARAMS} and {n} shard{'s' * (n > 1)} make it {expected}"
                    found = f"{file}: {name} is {tuple(shard[name].shape)}, "
                    problems.append(found + told + _other_count(shard[name], shape, n))
            known = {name for name, _, _ in self.plan.values()} | {"rope.freqs"}
            problems += [f"{file}: {name} is no tensor of a Llama" for name in sorted(shard.keys() - known)]
        if problems:
            raise InputError.many(problems)

    def _is_tied(self) -> bool:
        """The 3.2 sizes have no output layer of their own, or one that repeats the embeddings."""
        if "lm_head.weight" not in self.plan:
            return True
        pairs = ((shard["output.weight"], shard["tok_embeddings.weight"]) for shard in self.shards)
        return all(a.shape == b.shape and torch.equal(a[:64], b[:64]) and torch.equal(a, b) for a, b in pairs)

    def config(self) -> LlamaConfig:
        return llama_config(self.params, self.vocab_size, self.tied, self.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.plan[name][1]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face's name, whole tensor), one at a time."""
        for name, (meta, _, cut) in self.plan.items():
            parts = [shard[meta] for shard in self.shards] if cut is not None else [self.shards[0][meta]]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=cut or 0)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                whole = rope_rows(whole, whole.shape[0] // self.params.head_dim)
            yield name, whole


def shard_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, .01, ... in order; InputError for none, or a gap."""
    found = sorted((int(match[1]), path) for path in folder.iterdir() if (match := SHARD.fullmatch(path.name)))
    if not found:
        raise InputError(f"{folder}: params.json without consolidated.00.pth; the weights are missing")
    for place, (number, path) in enumerate(found):
        if number != place:
            raise InputError(f"{folder}: consolidated.{place:02d}.pth is missing, {path.name} is there")
    return [path for _, path in found]


def _open(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard, mapped from disk."""
    return load_named(file, mmap=True)


def _other_count(found: Tensor, whole: tuple[int, ...], n: int) -> str:
    """A hint where the shape would fit another number of shards."""
    ratios = {size // have for size, have in zip(whole, found.shape, strict=False) if have and size % have == 0} - {1}
    if found.dim() == len(whole) and len(ratios) == 1 and (count := ratios.pop()) != n:
        return f"; with {count} shards it would fit: is one missing?"
    return ""


# -- writing --------------------------------------------------------------------------------------------------------


def convert(source: str | Path, target: str | Path, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
    """Write a Meta directory as a Hugging Face one, with one tensor in memory at a time.

    A finished conversion of the same files is left as it is; one of other files is refused.

    Args:
        ends: ids that end an answer, for generation_config.json.
    """
    source, target = Path(source), Path(target)
    made_of = {"params": read_json(source / PARAMS), "bytes": {f.name: f.stat().st_size for f in shard_files(source)}}
    if (target / "config.json").exists():  # written last
        if not (target / SOURCE).exists() or read_json(target / SOURCE) != made_of:
            raise InputError(f"{target}: holds another model than the conversion of {source} (--convert_to)")
        return
    checkpoint = MetaCheckpoint(source)
    target.mkdir(parents=True, exist_ok=True)
    write_weights(checkpoint, target)
    tokenizer.save_pretrained(target)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    write_json(target / "generation_config.json", {"bos_token_id": begin, "eos_token_id": ends})
    config = json.loads(checkpoint.config().to_json_string()) | {"bos_token_id": begin, "eos_token_id": end}
    write_json(target / SOURCE, made_of)
    write_json(target / "config.json", config)


def write_weights(checkpoint: MetaCheckpoint, target: Path) -> None:
    """The weights as safetensors files of at most FILE_BYTES, and their index."""
    groups = _groups(checkpoint)
    stream = checkpoint.tensors()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_safetensors(target / file, {name: checkpoint.shape(name) for name in names}, checkpoint.dtype, stream)
        weight_map |= dict.fromkeys(names, file)
    total = sum(_bytes(checkpoint, name) for name in checkpoint.plan)
    write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _bytes(checkpoint: MetaCheckpoint, name: str) -> int:
    return math.prod(checkpoint.shape(name)) * checkpoint.dtype.itemsize


def _groups(checkpoint: MetaCheckpoint) -> list[list[str]]:
    """The tensors' names in files of at most FILE_BYTES, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in checkpoint.plan:
        if groups[-1] and size + _bytes(checkpoint, name) > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(checkpoint, name)
    return groups


def _write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, stream: Iterator[tuple[str, Tensor]]
) -> None:
    """A safetensors file of the stream's next tensors; the library's own writer wants all of them in memory.

    Format: length of the header in 8 bytes, the header as JSON, the bytes (huggingface.co/docs/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected in shapes:
            name, tensor = next(stream)
            if name != expected:
                raise ValueError(f"{name} came where {expected} was due")
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().data)
