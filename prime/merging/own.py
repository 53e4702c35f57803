"""Adapters of one's own: opened, and held against the model that they are said to be for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from prime.bank.lora import Adapter
from prime.checkpoints.identity import ADAPTER_FILES
from prime.checkpoints.loading import check_model_dir, model_config
from prime.checkpoints.published import has_adapter, open_adapter
from prime.engine import Engine, load_engine
from prime.errors import InputError
from prime.settings import ModelSettings, PromptSettings


def open_own(paths: Sequence[str], model: ModelSettings) -> list[Adapter]:
    """Adapters of directories (or of the files in them), every problem told at once."""
    check_model_dir(model.llama_model_path)
    adapters, problems, seen = [], list[str](), dict[Path, str]()
    for path in paths:
        folder = own_folder(path)
        if folder.resolve() in seen:
            problems.append(f"{path}: given twice (as {seen[folder.resolve()]}); leave one out")
        seen.setdefault(folder.resolve(), path)
        try:
            _check_there(path, folder)
            adapter = open_adapter(folder, model.llama_model_path, model.adapted_base)
        except InputError as error:
            problems += str(error).splitlines()
        else:
            adapters.append(replace(adapter, source=path))
    if problems:
        raise InputError.many(problems)
    return adapters


def _check_there(path: str, folder: Path) -> None:
    if not folder.exists():
        hint = "; adapters are parted by spaces" if "," in path else ""
        raise InputError(f"{path}: no such directory{hint}")
    if folder.is_dir() and not has_adapter(folder) and (folder / "config.json").is_file():
        raise InputError(f"{path}: a model, not an adapter; --llama_model_path takes it, adapters come from PEFT")


def own_folder(path: str) -> Path:
    """The directory of an adapter, also where a file in it was named."""
    return Path(path).parent if Path(path).name in (*ADAPTER_FILES, "adapter_config.json") else Path(path)


def with_modules(model: ModelSettings, adapters: Sequence[Adapter]) -> ModelSettings:
    """The model with adapters wherever one of these has any."""
    names: set[str] = set()
    for adapter in adapters:
        names |= {module.rsplit(".", 1)[-1] for module in adapter.factors}
    return replace(model, target_modules=",".join(sorted(names)))


def check_base(model: ModelSettings, adapters: Sequence[Adapter]) -> None:
    """InputError, before any weight is read, naming the adapters that do not fit the model."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model_config(model.llama_model_path, torch.float32))
    linears = {name: module for name, module in empty.named_modules() if isinstance(module, nn.Linear)}
    widths = {name: (module.in_features, module.out_features) for name, module in linears.items()}
    problems = []
    for adapter in adapters:
        for name, (a, b) in adapter.factors.items():
            if widths.get(name) != (a.shape[1], b.shape[0]):
                there = f"{widths[name]} wide (in, out)" if name in widths else "not there"
                told = f"{name} is {a.shape[1], b.shape[0]} wide in the adapter, and {there} in the model"
                problems.append(f"{adapter.source}: made for another base than {model.llama_model_path}: {told}")
                break
    if problems:
        raise InputError.many(problems)


def own_engine(model: ModelSettings, prompts: PromptSettings, adapters: Sequence[Adapter], answer: int = 0) -> Engine:
    """The engine whose bank holds these adapters' modules."""
    check_base(model, adapters)
    return load_engine(with_modules(model, adapters), prompts, answer)
