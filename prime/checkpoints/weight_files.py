"""The weight files of a Hugging Face directory: what transformers would read, and whether it found all it needs.

There is one file, or several with an index: safetensors, or .bin (pickles, of which only tensors are read).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prime.checkpoints.tensors import first_line, load_named
from prime.errors import InputError
from prime.runs.files import read_json

NAMES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them


def weight_files(folder: str | Path) -> dict[str, list[str]]:
    """The names of the tensors in each weight file, by the file's path.

    The folder has to have passed `prime.checkpoints.tensors.check_hub_dir`.

    Raises:
        InputError: no weights, a file that is cut short, or one that lacks tensors which the index places in it.
    """
    folder = Path(folder)
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return {str(folder / name): sorted(tensor_names(folder / name))}
        if index.is_file():
            return _sharded(index)
    raise InputError(f"{folder}: no weights there: neither {' nor '.join(NAMES)}, nor an index of several files")


def _sharded(index: Path) -> dict[str, list[str]]:
    """The same by an index of several files."""
    tensors_of: dict[str, list[str]] = {}
    for tensor, file in read_json(index)["weight_map"].items():
        tensors_of.setdefault(str(index.parent / file), []).append(tensor)
    problems = []
    for path, tensors in sorted(tensors_of.items()):
        missing = sorted(set(tensors) - set(tensor_names(Path(path))))
        if missing:
            problems.append(f"{path}: lacks {missing[0]} and {len(missing) - 1} other tensors that {index.name} names")
    if problems:
        raise InputError.many(problems)
    return tensors_of


def tensor_names(path: Path) -> Iterable[str]:
    """Names of the tensors in a file, without reading them; InputError if it is cut short."""
    if path.suffix == ".bin":
        return load_named(path, mmap=True)
    try:
        with safe_open(path, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cut short, or not a safetensors file: {first_line(error)}") from error


def check_loaded(path: str, files: dict[str, list[str]], info: dict[str, Any], layers: int) -> None:
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
