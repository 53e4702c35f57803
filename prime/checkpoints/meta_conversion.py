"""A Meta checkpoint written as a Hugging Face directory (`--convert_to`), with one tensor in memory at a time."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prime.checkpoints.loading import load_tokenizer
from prime.checkpoints.meta import MetaCheckpoint, shard_files
from prime.checkpoints.meta_params import PARAMS, is_meta_dir
from prime.checkpoints.meta_tokenizer import end_ids
from prime.errors import InputError
from prime.runs.files import read_json, replacing, write_json
from prime.runs.locks import turn

SOURCE = "converted_from.json"  # beside a conversion: what it was made of
FILE_BYTES = 4 << 30  # of one safetensors file at most (or one tensor)
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def kept_conversion(path: str, target: str, tokenizer_path: str | None) -> None:
    """Make `target` a Hugging Face directory out of a Meta one, once; other processes wait for it."""
    if not is_meta_dir(path):
        raise InputError(f"{path}: no Meta checkpoint (params.json, consolidated.*.pth) for --convert_to")
    tokenizer = load_tokenizer(tokenizer_path or path)
    with turn(Path(target) / "working" / "conversion.lock", "the converted model"):
        convert(path, target, tokenizer)


def convert(source: str | Path, target: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a Meta directory as a Hugging Face one.

    A finished conversion of the same files is left as it is; one of other files is refused.
    """
    source, target = Path(source), Path(target)
    made_of = {
        "params": read_json(source / PARAMS),
        "bytes": {file.name: file.stat().st_size for file in shard_files(source)},
    }
    if (target / "config.json").exists():  # written last
        if not (target / SOURCE).exists() or read_json(target / SOURCE) != made_of:
            raise InputError(f"{target}: holds another model than the conversion of {source} (--convert_to)")
        return
    checkpoint = MetaCheckpoint(source)
    target.mkdir(parents=True, exist_ok=True)
    write_weights(checkpoint, target)
    tokenizer.save_pretrained(target)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    write_json(target / "generation_config.json", {"bos_token_id": begin, "eos_token_id": end_ids(tokenizer)})
    config = json.loads(checkpoint.config().to_json_string()) | {"bos_token_id": begin, "eos_token_id": end}
    write_json(target / SOURCE, made_of)
    write_json(target / "config.json", config)


def write_weights(checkpoint: MetaCheckpoint, target: Path) -> None:
    """The weights as safetensors files of at most FILE_BYTES, and their index."""
    groups = _groups(checkpoint)
    tensors = checkpoint.tensors()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shapes = {name: checkpoint.weights[name].shape for name in names}
        _write_safetensors(target / file, shapes, checkpoint.dtype, tensors)
        weight_map |= dict.fromkeys(names, file)
    total = sum(_bytes(checkpoint, name) for name in checkpoint.weights)
    write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _bytes(checkpoint: MetaCheckpoint, name: str) -> int:
    return math.prod(checkpoint.weights[name].shape) * checkpoint.dtype.itemsize


def _groups(checkpoint: MetaCheckpoint) -> list[list[str]]:
    """The weights' names, divided into files of at most FILE_BYTES, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in checkpoint.weights:
        if groups[-1] and size + _bytes(checkpoint, name) > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(checkpoint, name)
    return groups


def _write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """A safetensors file of the next tensors of an iterator; the library's own writer wants all of them in memory.

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
            name, tensor = next(tensors)
            if name != expected:
                raise ValueError(f"{name} came where {expected} was due")
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().data)
