"""PEFT's adapter_config.json: what is read of it, and what is written.

The same tensors mean another update under another configuration, and new keys come with every version of PEFT. So a key
is read, or it says nothing about what the tensors compute, or it has to be unset (null, false, empty): everything else
is refused by name.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime.bank.lora import Adapter
from prime.checkpoints.tensors import number_problem, shown
from prime.errors import InputError, harmless
from prime.runs.files import read_json

FILE = "adapter_config.json"
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path"}
# Which modules were trained is seen from the tensors, which layout a weight has from the model.
HARMLESS = {
    "auto_mapping", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules",
}  # fmt: skip
# These initialisations leave the base's weights alone; others take what the adapter starts with out of them.
HARMLESS_VALUES: dict[str, tuple] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "task_type": ("CAUSAL_LM",),
}
MODULE = re.compile(r"\^?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")  # a pattern that is a plain name, or the end of one


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter_config.json says about its tensors."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]  # rank_pattern
    alphas: Mapping[str, float]  # alpha_pattern
    base: str  # the model it belongs to

    @property
    def largest_rank(self) -> int:
        return max([self.rank, *self.ranks.values()])

    def scale(self, module: str, rank: int) -> float:
        """What PEFT multiplies B A of a module of this rank by; the first pattern that fits counts."""
        alpha = next((self.alphas[pattern] for pattern in self.alphas if _fits(pattern, module)), self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)


def read_config(path: Path) -> LoraSettings:
    """What is read of an adapter_config.json.

    Raises:
        InputError: not the configuration of LoRA, or all keys that change what its tensors mean, by name.
    """
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: not the configuration of a LoRA adapter (peft_type LORA)")
    problems = [number_problem(config, "r", int), number_problem(config, "lora_alpha", int | float)]
    problems += [_key_problem(key, value) for key, value in config.items()]
    problems += _pattern_problems(config, "rank_pattern", int)
    problems += _pattern_problems(config, "alpha_pattern", int | float)
    if any(problems):
        raise InputError.many([f"{path}: {problem}" for problem in problems if problem])
    patterns = (config.get("rank_pattern") or {}, config.get("alpha_pattern") or {})
    named = config.get("base_model_name_or_path")
    base = named if isinstance(named, str) else ""
    return LoraSettings(config["r"], config["lora_alpha"], bool(config.get("use_rslora")), *patterns, base)


def _key_problem(key: str, value: Any) -> str:
    """Why a key keeps an adapter from being read as plain LoRA; "" if it does not."""
    if not value or key in READ or key in HARMLESS or value in HARMLESS_VALUES.get(key, ()):
        return ""
    return f"{shown(key)} is set ({shown(repr(value))}); only plain LoRA adapters can be merged"


def _pattern_problems(config: Mapping[str, Any], key: str, kind: Any) -> list[str]:
    """What is wrong with `rank_pattern` or `alpha_pattern`. Regular expressions of strangers are not run."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        return [f"{key} is {shown(repr(patterns))}, expected an object of modules"]
    problems = []
    for pattern in patterns:
        if not MODULE.fullmatch(pattern):
            problems.append(f"{key}: {shown(pattern)} is a regular expression; only names of modules are read")
        elif problem := number_problem(patterns, pattern, kind):
            problems.append(f"{key}: {problem}")
    return problems


def _fits(pattern: str, module: str) -> bool:
    """Whether a pattern is the module's name, or the end of it."""
    whole = pattern.removeprefix("^")
    return module == whole or (whole == pattern and module.endswith(f".{pattern}"))


def warn_of_base(path: Path, named: str, used_on: str) -> None:
    """Warn where an adapter names another base than the one it is used on; folders may differ, last names may not."""
    if named and _last_names(named) != _last_names(used_on):
        text = f"{path}: made for the base {shown(repr(named))}, and used on {shown(repr(used_on))}"
        warnings.warn(harmless(text), stacklevel=2)


def _last_names(base: str) -> list[str]:
    return [Path(part).name for part in base.split(" + ")]


def peft_config(adapter: Adapter, base_model: str) -> dict:
    """The adapter_config.json that makes PEFT compute the same update."""
    alpha = adapter.scale * adapter.rank
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in adapter.factors}),
        "task_type": "CAUSAL_LM",
    }
