"""Checkpoints as Meta publishes them: `params.json` and `consolidated.*.pth`, read tensor by tensor.

A directory holds one file per model-parallel shard. A weight is cut along its rows (column-parallel layers) or along
its columns (row-parallel ones); norms are whole in every shard. Meta's wq and wk keep the two halves of each rotary
pair in neighbouring rows, Hugging Face's q_proj and k_proj half a head apart, so their rows are permuted (`rope_rows`);
so are those of lora_B of adapters that were trained on Meta's layout.

Letters: `d` width, `v` vocabulary.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig

from prime.checkpoints.meta_params import PARAMS, Params, llama_config, read_params
from prime.checkpoints.tensors import load_named
from prime.errors import InputError

SHARD = re.compile(r"consolidated\.(\d+)\.pth")
EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"  # Meta's names


def rope_rows(tensor: Tensor, heads: int) -> Tensor:
    """Rows `[heads * head_dim, ...]` from Meta's order (pairs side by side) to Hugging Face's (half a head apart)."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


class MetaWeight(NamedTuple):
    """Where a weight is found in the shards."""

    name: str  # Meta's
    shape: tuple[int, ...]  # of the whole weight
    cut: int | None  # the dimension that model parallelism divides among the shards; None: every shard holds it whole


def layer_weights(params: Params) -> dict[str, MetaWeight]:
    """The weights of one layer, by Hugging Face's name; both names are relative to the layer."""
    d, hidden, kv = params.dim, params.hidden, params.n_kv_heads * params.head_dim
    return {
        "self_attn.q_proj": MetaWeight("attention.wq", (d, d), 0),
        "self_attn.k_proj": MetaWeight("attention.wk", (kv, d), 0),
        "self_attn.v_proj": MetaWeight("attention.wv", (kv, d), 0),
        "self_attn.o_proj": MetaWeight("attention.wo", (d, d), 1),
        "mlp.gate_proj": MetaWeight("feed_forward.w1", (hidden, d), 0),
        "mlp.down_proj": MetaWeight("feed_forward.w2", (d, hidden), 1),
        "mlp.up_proj": MetaWeight("feed_forward.w3", (hidden, d), 0),
        "input_layernorm": MetaWeight("attention_norm", (d,), None),
        "post_attention_layernorm": MetaWeight("ffn_norm", (d,), None),
    }


class MetaCheckpoint:
    """The weights of a Meta directory under Hugging Face's names; nothing is read before it is asked for.

    Raises:
        InputError: no shard or a gap in their numbers, a file that is cut short, tensors missing, too many, or of
            another shape than params.json says; names file and tensor with both shapes.
    """

    def __init__(self, folder: str | Path):
        self.params = read_params(folder)
        self.files = shard_files(Path(folder))
        self.shards = [load_named(file, mmap=True) for file in self.files]
        self.vocab_size = self._vocabulary()
        self.weights = self._weights()  # by Hugging Face's name
        self._check()
        self.tied = self._is_tied()
        if self.tied:
            self.weights.pop("lm_head.weight", None)
        self.dtype = self.shards[0][EMBEDDINGS].dtype

    def _vocabulary(self) -> int:
        """Rows of the whole embeddings: Llama 2 cuts them along d, Llama 3 along v."""
        file, shard, n = self.files[0], self.shards[0], len(self.files)
        if EMBEDDINGS not in shard:
            raise InputError(f"{file}: lacks {EMBEDDINGS}")
        shape = tuple(shard[EMBEDDINGS].shape)
        if len(shape) != 2:
            raise InputError(f"{file}: {EMBEDDINGS} is {shape}, expected two dimensions")
        rows = shape[0] * n if shape[1] == self.params.dim else shape[0]
        if self.params.vocab_size not in (-1, rows):
            raise InputError(
                f"{file}: {EMBEDDINGS} is {shape}, so {n} shards hold {rows} tokens; "
                f"{PARAMS} says vocab_size {self.params.vocab_size}"
            )
        return rows

    def _weights(self) -> dict[str, MetaWeight]:
        d, v = self.params.dim, self.vocab_size
        by_rows = self.shards[0][EMBEDDINGS].shape[1] == d
        weights = {"model.embed_tokens.weight": MetaWeight(EMBEDDINGS, (v, d), 0 if by_rows else 1)}
        for layer in range(self.params.n_layers):
            for name, (meta_name, shape, cut) in layer_weights(self.params).items():
                weight = MetaWeight(f"layers.{layer}.{meta_name}.weight", shape, cut)
                weights[f"model.layers.{layer}.{name}.weight"] = weight
        weights["model.norm.weight"] = MetaWeight("norm.weight", (d,), None)
        if OUTPUT in self.shards[0]:
            weights["lm_head.weight"] = MetaWeight(OUTPUT, (v, d), 0)
        return weights

    def _check(self) -> None:
        problems: list[str] = []
        for file, shard in zip(self.files, self.shards, strict=True):
            problems += [f"{file}: {problem}" for problem in self._shard_problems(shard)]
        if problems:
            raise InputError.many(problems)

    def _shard_problems(self, shard: Mapping[str, Tensor]) -> list[str]:
        problems = []
        n = len(self.files)
        for name, shape, cut in self.weights.values():
            expected = tuple(size // n if dim == cut else size for dim, size in enumerate(shape))
            if name not in shard:
                problems.append(f"lacks {name} {expected}")
            elif tuple(shard[name].shape) != expected:
                reason = f"{PARAMS} and {n} shard{'s' * (n > 1)} make it {expected}"
                hint = _shard_count_hint(shard[name], shape, n)
                problems.append(f"{name} is {tuple(shard[name].shape)}, {reason}{hint}")
        known = {weight.name for weight in self.weights.values()} | {"rope.freqs"}
        return problems + [f"{name} is no tensor of a Llama" for name in sorted(shard.keys() - known)]

    def _is_tied(self) -> bool:
        """The sizes of Llama 3.2 have no output layer of their own, or one that repeats the embeddings."""
        if "lm_head.weight" not in self.weights:
            return True
        for shard in self.shards:
            output, embeddings = shard[OUTPUT], shard[EMBEDDINGS]
            # The first rows alone tell most models apart, without reading the rest from disk.
            same_shape = output.shape == embeddings.shape
            if not (same_shape and torch.equal(output[:64], embeddings[:64]) and torch.equal(output, embeddings)):
                return False
        return True

    def config(self) -> LlamaConfig:
        return llama_config(self.params, self.vocab_size, self.tied, self.dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face's name, whole tensor), one at a time."""
        for name, (meta_name, _, cut) in self.weights.items():
            if cut is None or len(self.shards) == 1:
                whole = self.shards[0][meta_name]
            else:
                whole = torch.cat([shard[meta_name] for shard in self.shards], dim=cut)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                whole = rope_rows(whole, whole.shape[0] // self.params.head_dim)
            yield name, whole


def shard_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, .01, ... in order; InputError for none, or a gap."""
    numbered = sorted((int(match[1]), path) for path in folder.iterdir() if (match := SHARD.fullmatch(path.name)))
    if not numbered:
        raise InputError(f"{folder}: params.json without consolidated.00.pth; the weights are missing")
    for expected, (number, path) in enumerate(numbered):
        if number != expected:
            raise InputError(f"{folder}: consolidated.{expected:02d}.pth is missing, {path.name} is there")
    return [path for _, path in numbered]


def _shard_count_hint(part: Tensor, whole: tuple[int, ...], n: int) -> str:
    """A hint where a tensor's shape would fit another number of shards than the `n` that are there."""
    if part.dim() != len(whole):
        return ""
    sizes = zip(whole, part.shape, strict=True)
    counts = {size // part_size for size, part_size in sizes if part_size and size % part_size == 0} - {1}
    if len(counts) != 1 or counts == {n}:
        return ""
    return f"; with {counts.pop()} shards it would fit: is one missing?"
