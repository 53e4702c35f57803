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

from prime.checkpoints.tensors import WEIGHTS, first_line, load_named, weights_of
from prime.errors import InputError
from prime.runs.files import read_json

# Numbers that a model may have beyond twice those of its files: a head that a checkpoint lacks, tables of positions.
SLACK = 4 << 20

Sizes = Mapping[str, Mapping[str, int]]  # numbers in each tensor, by the tensor's name within the file's path


def weight_files(folder: str | Path) -> dict[str, dict[str, int]]:
    """How many numbers each tensor of each weight file has, by the headers of the files.

    The folder has to have passed `prime.checkpoints.tensors.check_hub_dir`.

    Raises:
        InputError: no weights, a file that is cut short, or one that lacks tensors which the index places in it.
    """
    weights = weights_of(Path(folder))
    if weights is None:
        raise InputError(f"{folder}: no weights there: neither {' nor '.join(WEIGHTS)}, nor an index of several files")
    return _sharded(weights) if weights.suffix == ".json" else {str(weights): tensor_sizes(weights)}


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


def check_loaded(path: str, files: Sizes, info: dict[str, Any], model: Any) -> None:
    """InputError for tensors that transformers found missing, of another shape, or in layers that config.json lacks.

    Args:
        path: the model's directory.
        files: as `weight_files` returned them.
        info: the loading information of `from_pretrained` with mismatched sizes ignored.
        model: what was loaded.
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
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    own = {_layer(name)[0] for name in model.state_dict()}
    beyond = []
    for name in sorted(info["unexpected_keys"]):
        stem, layer = _layer(name)
        if stem in own and layer >= layers + _predicting_layers(model.config):
            beyond.append(name)
    if beyond:
        problem = f"{beyond[0]} is of a layer that config.json does not have (num_hidden_layers {layers})"
        problems.append(f"{file_of.get(beyond[0], path)}: {problem}")
    if problems:
        raise InputError.many(problems)


def _layer(name: str) -> tuple[str, int]:
    """What stands before the number of a layer in a tensor's name, and that number; -1 without one."""
    match = re.match(r"((?:.*\.)?layers)\.(\d+)(?:\.|$)", name)
    return (match[1], int(match[2])) if match else ("", -1)


def _predicting_layers(config: Any) -> int:
    """Layers behind the model's own that predict further tokens (DeepSeek, GLM); they are not loaded."""
    counts = [value for name, value in config.get_text_config(decoder=True).to_dict().items()
              if re.search("nextn|mtp", name) and type(value) is int]  # fmt: skip
    return max(counts, default=0)
