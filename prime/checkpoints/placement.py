"""One model on several devices: accelerate's device_map, for stages that do not train.

The task adapter is folded in before the model is dispatched, so that offloaded weights carry it too; until then the
whole model is in the machine's memory. The factors of adapters are on the device where their layer computes
(`prime.bank.cpu.device_of`), keys and values where the layer left them.
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
        InputError: neither of them, a device that this machine does not have, or several processes on it.
    """
    if world().local_size > 1:
        raise InputError("--device_map: one process uses all devices; start no others beside it")
    if wanted in STRATEGIES:
        return wanted
    if not Path(wanted).is_file():
        raise InputError(f"--device_map {wanted}: none of {', '.join(STRATEGIES)}, and no JSON file of a map")
    device_of = read_json(wanted)
    if not isinstance(device_of, dict):
        kind = type(device_of).__name__
        raise InputError(f"--device_map {wanted}: expected an object, module to device; found {kind}")
    problems = [
        f"--device_map {wanted}: {name}: no device {device!r} here"
        for name, device in device_of.items()
        if not _exists(device)
    ]
    if problems:
        raise InputError.many(problems)
    return device_of


def dispatched(model: nn.Module, wanted: str | DeviceMap, main_device: torch.device) -> nn.Module:
    """The model with each part on its device, and hooks that move tensors from one device to the next.

    Args:
        model: all of it in the machine's memory.
        wanted: as `read_map` returned it.
        main_device: that of `--device`; on a CPU a strategy has nothing to divide.

    Raises:
        InputError: a map of other modules than the model's, or of not all of them.
    """
    device_of = planned(model, wanted, main_device) if isinstance(wanted, str) else dict(wanted)
    _check(device_of, model)
    offload: Any = tempfile.TemporaryDirectory(prefix="offload-") if "disk" in device_of.values() else None
    causal_lm: Any = model
    embeddings = causal_lm.get_input_embeddings()
    first = _device_of(next(name for name, module in model.named_modules() if module is embeddings), device_of)
    causal_lm = dispatch_model(
        causal_lm, device_of, main_device=None if first in ("cpu", "disk") else first,
        offload_dir=offload and offload.name, skip_keys=getattr(model, "_skip_keys_device_placement", None),
    )  # fmt: skip
    causal_lm.offload_folder = offload  # removed with the model
    return cast(nn.Module, causal_lm)


def planned(model: Any, strategy: str, main_device: torch.device) -> dict[str, int | str]:
    """The map of a strategy: layers are never divided, and what no GPU has room for stays in memory or goes to disk."""
    if main_device.type == "cpu":
        return {"": "cpu"}
    memory = get_max_memory()
    memory["cpu"] += sum(parameter.nbytes for parameter in model.parameters())  # already there, so not in what is free
    undivided = list(model._no_split_modules or ())
    if strategy != "sequential":
        low_zero = strategy == "balanced_low_0"
        memory = get_balanced_memory(model, memory, no_split_module_classes=undivided, low_zero=low_zero)
    return dict(infer_auto_device_map(model, memory, no_split_module_classes=undivided))


def _check(device_of: dict[str, int | str], model: nn.Module) -> None:
    """InputError for a map that names modules which the model does not have, or leaves some out."""
    names = {name for name, _ in model.named_modules()}
    problems = [f"--device_map: the model has no module {name}" for name in device_of if name not in names]
    if device_of.get("") == "disk":
        problems.append("--device_map: the whole model cannot go to disk; name its parts")
    if problems:
        raise InputError.many(problems)
    try:
        check_device_map(model, device_of)
    except ValueError as error:
        raise InputError(f"--device_map: {error}") from None


def _exists(name: object) -> bool:
    """Whether this machine has a device: cpu, disk, the number of a GPU, cuda:1, mps."""
    if name in ("cpu", "disk"):
        return True
    try:
        device = torch.device(f"cuda:{name}" if type(name) is int else cast(str, name))
    except (RuntimeError, TypeError):
        return False
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()


def _device_of(name: str, device_of: DeviceMap) -> int | str:
    """The device of a module: its own entry in the map, or that of the nearest module around it."""
    while name and name not in device_of:
        name = name.rpartition(".")[0]
    return device_of[name]
