"""The weight files of a Hugging Face directory: what transformers would read, and whether it found all it needs.

There is one file, or several with an index: safetensors, or .bin (pickles, of which only tensors are read).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from prime.checkpoints.tensors import first_line, load_named
from prime.errors import InputError
from prime.runs.files import read_json

NAMES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them


# Numbers that a model may have beyond twice those of its files: a head that a checkpoint lacks, tables of positions.
SLACK = 4 << 20

Sizes = Mapping[str, Mapping[str, int]]  # numbers in each tensor, by the tensor's name within the file's path


def weight_files(folder: str | Path) -> dict[str, dict[str, int]]:
    """How many numbers each tensor of each weight file has, by the headers of the files.

    The folder has to have passed `prime.checkpoints.tensors.check_hub_dir`.

    Raises:
        InputError: no weights, a file that is cut short, or one that lacks tensors which the index places in it.
    """
    folder = Path(folder)
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return {str(folder / name): tensor_sizes(folder / name)}
        if index.is_file():
            return _sharded(index)
    raise InputError(f"{folder}: no weights there: neither {' nor '.join(NAMES)}, nor an index of several files")


def _sharded(index: Path) -> dict[str, dict[str, int]]:
    """The same by an index of several files."""
    tensors_of: dict[str, list[str]] = {}
    for tensor, file in read_json(index)["weight_map"].items():
        tensors_of.setdefault(str(index.parent / file), []).append(tensor)
    files: dict[str, dict[str, int]] = {}
    problems = []
    for path, tensors in sorted(tensors_of.items()):
        sizes = tensor_sizes(Path(path))
        missing = sorted(set(tensors) - sizes.keys())
        files[path] = {name: sizes[name] for name in tensors if name in sizes}
        if missing:
            problems.append(f"{path}: lacks {missing[0]} and {len(missing) - 1} other tensors that {index.name} names")
    if problems:
        raise InputError.many(problems)
    return files


def tensor_sizes(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a file has, without reading them; InputError if it is cut short."""
    if path.suffix == ".bin":
        return {name: tensor.numel() for name, tensor in load_named(path, mmap=True).items()}
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: math.prod(tensors.get_slice(name).get_shape()) for name in sorted(tensors.keys())}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cut short, or not a safetensors file: {first_line(error)}") from error


def check_size(folder: str | Path, files: Sizes, auto: Any) -> None:
    """InputError for a configuration whose model is far larger than the weight files beside it.

    transformers allocates what it does not find in them, so the model is built before, on the meta device, without
    data. A configuration that cannot be built is told of by whoever loads it.

    Args:
        files: as `weight_files` returned them.
        auto: the class that is to load the model, such as `AutoModelForCausalLM`.
    """
    held: dict[str, int] = {}
    for tensors in files.values():
        held |= tensors
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        layers = getattr(config, "num_hidden_layers", 0)
        if layers <= len(held):
            with torch.device("meta"):
                model = auto.from_config(config, trust_remote_code=False)
            described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    except Exception:
        return
    if layers > len(held):
        what = f"config.json describes {layers:,} layers"
        raise InputError(f"{folder}: {what}, the weight files hold {len(held):,} tensors")
    if described > 2 * sum(held.values()) + SLACK:
        what = f"config.json describes a model of {described:,} numbers"
        raise InputError(f"{folder}: {what}, the weight files hold {sum(held.values()):,}")


def check_loaded(path: str, files: Sizes, info: dict[str, Any], layers: int) -> None:
    """InputError for tensors that transformers found missing, of another shape, or in layers that config.json lacks.

    Args:
        path: the model's directory.
        files: as `weight_files` returned them.
        info: the loading information of `from_pretrained` with mismatched sizes ignored.
        layers: of the model by config.json.
    """
    file_of: dict[str, str] = {}
    for file, tensors in files.items():
        file_of |= dict.fromkeys(tensors, file)
    problems = [
        f"{file_of.get(name, path)}: {name} is {tuple(shape)}, config.json makes it {tuple(expected)}"
        for name, shape, expected in sorted(info["mismatched_keys"])
    ]
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        problems.append(f"{path}: the checkpoint lacks {len(missing)} tensors, {missing[0]} for one")
    beyond = [name for name in sorted(info["unexpected_keys"]) if _layer(name) >= layers]
    if beyond:
        problem = f"{beyond[0]} is of a layer that config.json does not have (num_hidden_layers {layers})"
        problems.append(f"{file_of.get(beyond[0], path)}: {problem}")
    if problems:
        raise InputError.many(problems)


def _layer(name: str) -> int:
    """The number behind `layers` in a tensor's name; -1 without one."""
    match = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
    return int(match[1]) if match else -1
