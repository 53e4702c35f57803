"""One model on several devices: accelerate's device_map, for stages that do not train.

The task adapter is folded in before the model is dispatched, so offloaded weights carry it too; until then the whole
model lies in the memory of the machine. Factors of the adapters lie where their layer computes (`place_of`), keys and
values where the layer left them.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import check_device_map, get_balanced_memory, get_max_memory
from torch import nn

from prime.errors import InputError
from prime.runs.files import read_json
from prime.runs.workers import world

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # transformers' names

DeviceMap = Mapping[str, int | str]  # module -> number of a GPU, or cpu, cuda:1, disk


def read_map(wanted: str) -> str | DeviceMap:
    """One of STRATEGIES, or the map in a JSON file: {"model.embed_tokens": 0, "model.layers.0": "cuda:1", ...}.

    Raises:
        InputError: none of them, a device that is not here, or several processes.
    """
    if world().local_size > 1:
        raise InputError("--device_map: one process uses all devices; start no others beside it")
    if wanted in STRATEGIES:
        return wanted
    if not Path(wanted).is_file():
        raise InputError(f"--device_map {wanted}: none of {', '.join(STRATEGIES)}, and no JSON file of a map")
    found = read_json(wanted)
    if not isinstance(found, dict):
        raise InputError(f"--device_map {wanted}: expected an object, module to device; found {type(found).__name__}")
    odd = [f"{name}: no device {value!r} here" for name, value in found.items() if not _exists(value)]
    if odd:
        raise InputError.many([f"--device_map {wanted}: {problem}" for problem in odd])
    return found


def dispatched(model: nn.Module, wanted: str | DeviceMap, place: torch.device) -> nn.Module:
    """The model with each part on its device, and hooks that move what goes from one to the next.

    Args:
        model: whole, in the memory of the machine.
        wanted: what `read_map` read.
        place: the device of `--device`; on a CPU a strategy has nothing to part.

    Raises:
        InputError: a map of other modules than the model's, or of not all of them.
    """
    found = planned(model, wanted, place) if isinstance(wanted, str) else dict(wanted)
    _check(found, model)
    offload: Any = tempfile.TemporaryDirectory(prefix="offload-") if "disk" in found.values() else None
    own: Any = model
    embedding = next(name for name, module in model.named_modules() if module is own.get_input_embeddings())
    first = _device_of(embedding, found)
    own = dispatch_model(
        own, found, main_device=None if first in ("cpu", "disk") else first, offload_dir=offload and offload.name,
        skip_keys=getattr(own, "_skip_keys_device_placement", None),
    )  # fmt: skip
    own.offload_folder = offload  # removed with the model
    return cast(nn.Module, own)


def planned(model: Any, strategy: str, place: torch.device) -> dict[str, int | str]:
    """The map of a strategy: layers are never parted, and what no GPU has room for stays in memory or goes to disk."""
    if place.type == "cpu":
        return {"": "cpu"}
    memory = get_max_memory()
    memory["cpu"] += sum(p.numel() * p.element_size() for p in model.parameters())  # what stays there is there already
    whole = list(model._no_split_modules or ())
    if strategy != "sequential":
        low = strategy == "balanced_low_0"
        memory = get_balanced_memory(model, memory, no_split_module_classes=whole, low_zero=low)
    return dict(infer_auto_device_map(model, memory, no_split_module_classes=whole))


def _check(found: dict[str, int | str], model: nn.Module) -> None:
    names = {name for name, _ in model.named_modules()}
    odd = [f"--device_map: the model has no module {name}" for name in found if name not in names]
    odd += ["--device_map: the whole model cannot go to disk; name its parts"] if found.get("") == "disk" else []
    if odd:
        raise InputError.many(odd)
    try:
        check_device_map(model, found)
    except ValueError as error:
        raise InputError(f"--device_map: {error}") from None


def _exists(value: object) -> bool:
    if value in ("cpu", "disk"):
        return True
    try:
        device = torch.device(f"cuda:{value}" if type(value) is int else cast(str, value))
    except (RuntimeError, TypeError):
        return False
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()


def _device_of(name: str, found: DeviceMap) -> int | str:
    """The device of a module: its own entry, or that of the nearest one around it."""
    while name and name not in found:
        name = name.rpartition(".")[0]
    return found[name]
