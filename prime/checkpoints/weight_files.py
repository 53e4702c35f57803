"""The weight files of a Hugging Face directory, looked at before transformers reads them: what is wrong is named.

One file or several with an index, safetensors or .bin (pickles of tensors; nothing else in them is run).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prime.checkpoints.tensors import first_line, load_named
from prime.errors import InputError
from prime.runs.files import read_json

NAMES = ("model.safetensors", "pytorch_model.bin")  # in the order that transformers looks for them


def weight_files(folder: str | Path) -> dict[str, list[str]]:
    """The files that hold the weights, by path, and the tensors in each; indices have been checked
    (`prime.checkpoints.tensors.check_hub_dir`).

    Raises:
        InputError: no weights, a file that is cut short, or one that lacks tensors which the index looks for in it.
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
    named = read_json(index)["weight_map"]
    files: dict[str, list[str]] = {}
    for tensor, file in named.items():
        files.setdefault(file, []).append(tensor)
    problems = [problem for file, tensors in sorted(files.items()) for problem in _missing(index, file, tensors)]
    if problems:
        raise InputError.many(problems)
    return {str(index.parent / file): tensors for file, tensors in files.items()}


def _missing(index: Path, file: str, tensors: list[str]) -> list[str]:
    """What a shard lacks of the tensors that the index looks for in it."""
    path = index.parent / file
    absent = sorted(set(tensors) - set(tensor_names(path)))
    return [f"{path}: lacks {absent[0]} and {len(absent) - 1} other tensors that {index.name} names"] if absent else []


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
        files: of `weight_files`.
        info: the loading information of `from_pretrained` with mismatched sizes ignored.
    """
    home = {tensor: file for file, tensors in files.items() for tensor in tensors}
    problems = [
        f"{home.get(name, path)}: {name} is {tuple(found)}, config.json makes it {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        problems.append(f"{path}: the checkpoint lacks {len(missing)} tensors, {missing[0]} for one")
    beyond = [name for name in sorted(info["unexpected_keys"]) if _layer(name) >= layers]
    if beyond:
        told = f"{beyond[0]} is of a layer that config.json does not have (num_hidden_layers {layers})"
        problems.append(f"{home.get(beyond[0], path)}: {told}")
    if problems:
        raise InputError.many(problems)


def _layer(name: str) -> int:
    """The number behind `layers` in a tensor's name, -1 without one."""
    parts = name.split(".")
    place = parts.index("layers") + 1 if "layers" in parts else len(parts)
    return int(parts[place]) if place < len(parts) and parts[place].isdigit() else -1
