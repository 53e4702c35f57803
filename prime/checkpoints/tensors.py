"""Files of tensors, read so that nothing in them runs and nothing in them grows: `.pt`, `.pth`, `.bin`, safetensors.

A `.pt` file is a pickle, mostly inside a zip archive. It may come from anybody, so it is read by torch's restricted
unpickler, which builds tensors, plain containers and numbers and nothing else. Before that the archive is checked
(torch stores its parts uncompressed, so parts that claim more than the file holds are a bomb), and after it every
tensor is (a view with stride 0 claims any shape over a storage of four bytes).
"""

from __future__ import annotations

import os
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
# Two names may share one storage (tied embeddings), so tensors may claim the file's bytes twice.
CLAIM = 2
MAX_LAYERS = 10_000


def load_pickled(path: Path | str, extra: Sequence[Any] = (), mmap: bool = False) -> Any:
    """What a file written by `torch.save` holds.

    Args:
        extra: further names the pickle may use, as for `torch.serialization.safe_globals`.
        mmap: leave tensors in the file until they are used; ignored for torch's old format, which cannot be mapped.

    Raises:
        InputError: no such file, an archive that claims more bytes than it has, or a pickle of anything else than
            tensors, containers and numbers.
    """
    path = Path(path)
    check_pickled(path)
    try:
        with torch.serialization.safe_globals(list(extra)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:  # a hostile pickle can make the unpickler raise whatever it likes
        raise InputError(f"{path}: cut short, or not a file of tensors: {first_line(error)}") from error


def check_pickled(path: Path) -> None:
    """InputError unless `path` is a plain file that, if it is an archive, holds what it claims."""
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


def check_hub_dir(folder: Path) -> None:
    """InputError for a model directory that would have transformers read something else than its own files.

    An adapter_config.json in it names another model to load instead; an index names files by path; a `.bin` is a
    pickle in an archive. (Code beside the weights is never run: `trust_remote_code` is off everywhere.)
    """
    problems = []
    if (folder / "adapter_config.json").is_file():
        problems.append(f"{folder}: adapter_config.json is there; this is an adapter, not a model")
    for index in sorted(folder.glob("*.index.json")):
        found = read_json(index)
        names = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            problems.append(f"{index}: no weight_map of tensors to files")
            continue
        problems += _shard_problems(index, names)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(config, dict):
        problems.append(f"{folder / 'config.json'}: expected an object")
    elif told := layers_problem(config, "num_hidden_layers"):
        problems.append(f"{folder / 'config.json'}: {told}")
    if problems:
        raise InputError.many(problems)
    for file in sorted(folder.glob("*.bin")):
        check_pickled(file)


def _shard_problems(index: Path, names: Mapping[str, str]) -> list[str]:
    """Files that an index names and that are elsewhere, or not there at all."""
    problems = []
    for file in sorted(set(names.values())):
        held = sorted(name for name, home in names.items() if home == file)
        if Path(file).name != file or file in ("", ".."):
            problems.append(f"{index}: {shown(repr(file))} is no file of this folder")
        elif not (index.parent / file).is_file():
            told = f"no such file; {index.name} names it for {len(held)} tensors, {shown(held[0])} for one"
            problems.append(f"{index.parent / file}: {told}")
    return problems


def layers_problem(config: Mapping[str, Any], key: str) -> str:
    """A model is built before its weights are found missing, so layers that nobody has would be built for hours."""
    value = config.get(key, 1)
    return f"{key} is {value}, above {MAX_LAYERS:,}" if isinstance(value, int | float) and value > MAX_LAYERS else ""


def check_file(path: Path) -> None:
    """InputError unless `path` is a regular file; a pipe or a device could be read for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file")


def load_named(path: Path | str, mmap: bool = False) -> dict[str, Tensor]:
    """A file that is a dictionary of plain tensors, each within the file's size; all its problems in one InputError."""
    found = load_pickled(path, mmap=mmap)
    if not isinstance(found, dict) or not found or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path}: expected a dictionary of tensors, by name, found {kind_of(found)}")
    check_plain(path, found)
    return found


def check_plain(path: Path | str, tensors: Mapping[str, Any]) -> None:
    """InputError for values that are no plain tensors, or that claim more bytes than the file has."""
    problems = [f"{path}: {shown(key)} {told}" for key, value in tensors.items() if (told := _not_plain(value))]
    if problems:
        raise InputError.many(problems)
    claimed, size = sum(value.numel() * value.element_size() for value in tensors.values()), os.path.getsize(path)
    if claimed > CLAIM * size:
        raise InputError(f"{path}: tensors that claim {claimed:,} bytes in a file of {size:,}")


def _not_plain(value: Any) -> str:
    """What keeps a value from being a dense tensor with a storage of its own; empty if nothing does."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.__dict__:
        return f"is {kind_of(value)}, expected a tensor"
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        return "is a sparse, quantized, nested or empty-handed tensor"
    return ""


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in the order of their names, as they are stored."""
    path = Path(path)
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {first_line(error)}") from error


def finite_problem(tensor: Tensor) -> str:
    """What is wrong with the numbers of a tensor that has to be made of finite floats; empty if nothing is."""
    if tensor.dtype not in FLOATS:
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}, expected floating point"
    return "" if torch.isfinite(tensor).all() else "holds values that are not finite"


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error).strip() else type(error).__name__


def shown_error(error: BaseException) -> str:
    """An error of a library in a few lines; one without a text by its type."""
    return "\n".join(str(error).strip().splitlines()[:4]) or type(error).__name__


def kind_of(value: Any) -> str:
    """A value's type and shape, never its content: what comes from a pickle can be endless to print."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


def shown(name: str) -> str:
    """A name out of a file for a message: at most 80 characters."""
    return name if len(name) <= 80 else f"{name[:77]}..."
