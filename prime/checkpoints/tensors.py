"""Files of tensors, read so that nothing in them runs and nothing in them grows: `.pt`, `.pth`, `.bin`, safetensors.

A `.pt` file is a pickle, mostly inside a zip archive. It may come from anybody, so it is read by torch's restricted
unpickler, which builds tensors, plain containers and numbers and nothing else. The archive is checked before that:
torch stores its parts uncompressed, so parts that claim more than the file holds are a bomb. Every tensor is checked
after it: a view with stride 0 can claim any shape over a storage of four bytes.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prime.errors import InputError
from prime.runs.files import read_json

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_CLAIM = 2  # times the file's bytes: two names may share one storage (tied embeddings)
MAX_LAYERS = 10_000
COUNTED = re.compile("layer|block|expert|label|head")  # in names of a configuration's numbers: parts made one by one
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them

# -- pickles --------------------------------------------------------------------------------------------------------


def load_pickled(path: Path | str, extra: Sequence[Any] = (), mmap: bool = False) -> Any:
    """The content of a file written by `torch.save`.

    Args:
        extra: further names the pickle may use, as for `torch.serialization.safe_globals`.
        mmap: leave tensors in the file until they are used; ignored for torch's old format, which cannot be mapped.

    Raises:
        InputError: no such file, an archive that claims more bytes than it has, or a pickle that holds anything else
            than tensors, containers and numbers.
    """
    path = Path(path)
    check_pickled(path)
    try:
        with torch.serialization.safe_globals(list(extra)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:  # a hostile pickle can make the unpickler raise whatever it likes
        raise InputError(f"{path}: cut short, or not a file of tensors: {first_line(error)}") from error


def check_pickled(path: Path) -> None:
    """InputError unless `path` is a regular file that, if it is an archive, holds the bytes it claims."""
    check_file(path)
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except Exception as error:  # as above
        raise InputError(f"{path}: a broken archive: {first_line(error)}") from error
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise InputError(f"{path}: {shown(packed[0])} is compressed; torch stores its parts as they are")
    claimed, size = sum(part.file_size for part in parts), path.stat().st_size
    if claimed > size:
        raise InputError(f"{path}: claims {claimed:,} bytes inside a file of {size:,}")


# -- tensors --------------------------------------------------------------------------------------------------------


def check_file(path: Path) -> None:
    """InputError unless `path` is a regular file; a pipe or a device could be read for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file")


def load_named(path: Path | str, mmap: bool = False) -> dict[str, Tensor]:
    """A pickle that is a dictionary of plain tensors, by name; one InputError lists all its problems."""
    tensors = load_pickled(path, mmap=mmap)
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(name, str) for name in tensors):
        raise InputError(f"{path}: expected a dictionary of tensors, by name, found {shown_value(tensors)}")
    check_plain(path, tensors)
    return tensors


def check_plain(path: Path | str, tensors: Mapping[str, Any]) -> None:
    """InputError for values that are no plain tensors, or that claim more bytes than the file can hold."""
    problems = [f"{path}: {shown(name)} {problem}" for name, value in tensors.items() if (problem := _problem(value))]
    if problems:
        raise InputError.many(problems)
    claimed, size = sum(tensor.nbytes for tensor in tensors.values()), os.path.getsize(path)
    if claimed > MAX_CLAIM * size:
        raise InputError(f"{path}: tensors that claim {claimed:,} bytes in a file of {size:,}")


def _problem(value: Any) -> str:
    """What keeps a value from being a dense tensor with a storage of its own; "" if nothing does."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.__dict__:
        return f"is {shown_value(value)}, expected a tensor"
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        return "is a sparse, quantized, nested or empty-handed tensor"
    return ""


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a safetensors file as they are stored, in the order of their names."""
    path = Path(path)
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {first_line(error)}") from error


def finite_problem(tensor: Tensor) -> str:
    """What is wrong with a tensor that has to consist of finite floats; "" if nothing is."""
    if tensor.dtype not in FLOATS:
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}, expected floating point"
    return "" if torch.isfinite(tensor).all() else "holds values that are not finite"


# -- model directories -----------------------------------------------------------------------------------------------


def check_hub_dir(folder: Path) -> None:
    """InputError for a model directory that would make transformers read something else than its own files.

    An adapter_config.json in it names another model to load instead; an index names files by path; a `.bin` is a
    pickle in an archive. Only what would be read counts: many repositories hold the same weights in several formats,
    and indices of files that were not downloaded. (Code beside the weights is never run: `trust_remote_code` is off.)
    """
    problems = []
    if (folder / "adapter_config.json").is_file():
        problems.append(f"{folder}: adapter_config.json is there; this is an adapter, not a model")
    weights = weights_of(folder)
    if weights and weights.name.endswith(".index.json"):
        problems += _index_problems(weights)
    config = folder / "config.json"
    if config.is_file() and (problem := _config_problem(read_json(config))):
        problems.append(f"{config}: {problem}")
    if problems:
        raise InputError.many(problems)
    if weights and ".bin" in weights.name:
        names = [weights.name] if weights.suffix == ".bin" else read_json(weights)["weight_map"].values()
        for name in sorted(set(names)):
            check_pickled(folder / name)


def weights_of(folder: Path) -> Path | None:
    """The file of weights, or the index of several, that transformers reads in a model directory; None without one.

    Raises:
        InputError: config.json names a file of weights that is not in the directory.
    """
    config = folder / "config.json"
    content = read_json(config) if config.is_file() else {}
    named = content.get("transformers_weights") if isinstance(content, dict) else None
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or not (folder / named).is_file():
            raise InputError(f"{config}: transformers_weights is {shown(repr(named))}, no file of this folder")
        return folder / named
    for name in WEIGHTS:
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.is_file():
                return file
    return None


def _index_problems(index: Path) -> list[str]:
    """What is wrong with an index: files that are elsewhere, or not there at all."""
    content = read_json(index)
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        return [f"{index}: no weight_map of tensors to files"]
    problems = []
    for file in sorted(set(file_of.values())):
        tensors = sorted(tensor for tensor in file_of if file_of[tensor] == file)
        if Path(file).name != file or file in ("", ".."):
            problems.append(f"{index}: {shown(repr(file))} is no file of this folder")
        elif not (index.parent / file).is_file():
            reason = f"{index.name} names it for {len(tensors)} tensors, {shown(tensors[0])} for one"
            problems.append(f"{index.parent / file}: no such file; {reason}")
    return problems


def _config_problem(config: Any) -> str:
    """What is wrong with a configuration, or one inside it; "" if nothing is."""
    if not isinstance(config, dict):
        return "expected an object"
    inner = [_config_problem(value) for value in config.values() if isinstance(value, dict)]
    problems = [layers_problem(config, key) for key in config if COUNTED.search(key)]
    return next((problem for problem in [*problems, *inner] if problem), "")


def layers_problem(config: Mapping[str, Any], key: str) -> str:
    """What is wrong with a number of layers, experts or labels; "" if nothing is.

    transformers makes a list of as many before it looks for weights.
    """
    value = config.get(key, 1)
    return f"{key} is {value}, above {MAX_LAYERS:,}" if isinstance(value, int | float) and value > MAX_LAYERS else ""


def number_problem(config: Mapping[str, Any], key: str, kind: Any) -> str:
    """What keeps a configuration's field from being a positive number (`kind` int: a whole one); "" if nothing does."""
    value = config.get(key)
    if isinstance(value, kind) and not isinstance(value, bool) and 0 < value < 2**31:
        return ""
    return f"{key} is {shown(repr(value))}, expected a positive {'whole number' if kind is int else 'number'}"


# -- messages -------------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error).strip() else type(error).__name__


def shown_error(error: BaseException) -> str:
    """A library's error in at most four lines; its type if it has no text."""
    return "\n".join(str(error).strip().splitlines()[:4]) or type(error).__name__


def shown_value(value: Any) -> str:
    """A value's type and shape, never its content: what comes from a pickle can take for ever to print."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


def shown(name: str) -> str:
    """A name from a file, for a message: at most 80 characters."""
    return name if len(name) <= 80 else f"{name[:77]}..."
