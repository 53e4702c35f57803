"""LoRA adapters as data: reading and writing PEFT directories, and the algebra of merging.

Shapes: A `[r, in]`, B `[out, r]` of one module; an adapter is one such pair per module name. The update of a
module's weight is `scale * B @ A` (Hu et al. 2022). `n` adapters are merged by weights `w [n]`, or by
`w [n, l]`, one weight per adapter and layer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prime.data import read_json
from prime.errors import InputError
from prime.runs import write_bytes, write_json, write_text

Factors = dict[str, tuple[Tensor, Tensor]]

RULES = ("factor", "delta")
LAYER = re.compile(r"\.(\d+)\.")
WEIGHT_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: `factors[module] = (A [r, in], B [out, r])`, update `scale * B @ A`."""

    factors: Factors
    scale: float = 1.0
    card: Mapping = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.factors.values())

    def folded(self) -> "Adapter":
        """The same update with the scale moved into B, so that scale is 1."""
        if self.scale == 1.0:
            return self
        return Adapter({name: (a, b * self.scale) for name, (a, b) in self.factors.items()}, 1.0, self.card)


def layer_of(module: str) -> int:
    """Index of the decoder layer in a module name; 0 for a module outside the layers."""
    found = LAYER.search(module)
    return int(found.group(1)) if found else 0


def merge(adapters: Sequence[Adapter], weights: Tensor, rule: str) -> Adapter:
    """One adapter out of n by weights `[n]` or `[n, l]`.

    `factor` (PriME and LoraHub as published): A = sum w_i A_i, B = sum w_i B_i; even and quadratic in w, with
    cross terms B_i A_j. `delta`: dW = sum w_i B_i A_i, exact, held as stacked factors, ranks added up; sharers of
    weight zero are left out, so one-hot weights give that adapter bit for bit under both rules.

    Raises:
        InputError: the adapters hold different modules or shapes.
    """
    check_alike(adapters)
    parts = [adapter.folded().factors for adapter in adapters]
    return Adapter({name: _merge_module([part[name] for part in parts], weights, name, rule) for name in parts[0]})


def concatenate(first: Adapter, second: Adapter) -> Adapter:
    """One adapter whose update is the sum of both, exactly: factors stacked to rank r1 + r2.

    A module that only one of them has keeps that one's factors.
    """
    parts = [first.folded().factors, second.folded().factors]
    shared = parts[0].keys() & parts[1].keys()
    check_alike([Adapter({name: part[name] for name in sorted(shared)}) for part in parts])
    names = dict.fromkeys(name for part in parts for name in part)
    factors: Factors = {}
    for name in names:
        pairs = [part[name] for part in parts if name in part]
        factors[name] = (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
    return Adapter(factors)


def _merge_module(pairs: list[tuple[Tensor, Tensor]], weights: Tensor, name: str, rule: str) -> tuple[Tensor, Tensor]:
    own = weights if weights.dim() == 1 else weights[:, layer_of(name)]
    kept = [(float(w), a, b) for w, (a, b) in zip(own, pairs, strict=True) if float(w) != 0.0]
    if not kept:
        a, b = pairs[0]
        return torch.zeros_like(a), torch.zeros_like(b)
    if rule == "delta":
        return torch.cat([a for _, a, _ in kept]), torch.cat([w * b for w, _, b in kept], dim=1)
    rank = max(a.shape[0] for a, _ in pairs)
    padded = [(w, *pad_rank(a, b, rank)) for w, a, b in kept]
    return sum_scaled([(w, a) for w, a, _ in padded]), sum_scaled([(w, b) for w, _, b in padded])


def sum_scaled(terms: list[tuple[float, Tensor]]) -> Tensor:
    """sum_i w_i t_i, in order, started from the first term so that a single term of weight 1 stays as it is."""
    weight, first = terms[0]
    total = first * weight
    for weight, tensor in terms[1:]:
        total = total + tensor * weight
    return total


def check_alike(adapters: Sequence[Adapter]) -> None:
    """InputError unless all adapters have the same modules with the same widths (ranks may differ)."""
    first = adapters[0].factors
    for number, adapter in enumerate(adapters[1:], start=1):
        if adapter.factors.keys() != first.keys():
            odd = sorted(adapter.factors.keys() ^ first.keys())[0]
            raise InputError(f"adapters 0 and {number} do not have the same modules: {odd} is in one only")
        for name, (a, b) in adapter.factors.items():
            widths, expected = (a.shape[1], b.shape[0]), (first[name][0].shape[1], first[name][1].shape[0])
            if widths != expected:
                raise InputError(f"{name}: adapter {number} is {widths} wide (in, out), adapter 0 is {expected}")


def adapter_dir(path: Path | str) -> Path:
    """The PEFT directory meant by `path`: itself, or its parent for the announcement's `.../lora_ckpt.pt`."""
    path = Path(path)
    for candidate in (path, path.parent) if path.suffix == ".pt" else (path,):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise InputError(f"{path}: no adapter there (adapter_config.json and adapter_model.safetensors expected)")


def load_adapter(path: Path | str) -> Adapter:
    """Read a PEFT LoRA directory (adapter_config.json + adapter_model.safetensors).

    Raises:
        InputError: missing or broken files, a config that is not plain LoRA, unknown, unpaired or misshapen
            tensors, values that are not finite; names the file and the tensor.
    """
    folder = adapter_dir(path)
    config = read_json(folder / "adapter_config.json")
    _check_config(config, folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    halves = _read_halves(file)
    factors: Factors = {}
    for module, half in halves.items():
        if set(half) != {"A", "B"}:
            raise InputError(f"{file}: {module} has only lora_{''.join(half)}")
        a, b = half["A"], half["B"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise InputError(f"{file}: {module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit")
        factors[module] = (a, b)
    rank = config["r"]
    for module, (a, _) in factors.items():
        if a.shape[0] != rank:
            raise InputError(f"{file}: {module}: lora_A {tuple(a.shape)} has not the rank {rank} of the configuration")
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    card_file = folder / "card.json"
    return Adapter(factors, scale, read_json(card_file) if card_file.exists() else {})


def _check_config(config: object, path: Path) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: not the configuration of a LoRA adapter (peft_type LORA)")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise InputError(f"{path}: {key} is {config.get(key)!r}, expected a positive number")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise InputError(f"{path}: {key} is set; only plain LoRA adapters can be merged")


def _read_halves(file: Path) -> dict[str, dict[str, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                found = WEIGHT_KEY.fullmatch(key)
                if not found:
                    raise InputError(f"{file}: unexpected tensor {key}")
                value = tensors.get_tensor(key).float()
                if not torch.isfinite(value).all():
                    raise InputError(f"{file}: {key} holds values that are not finite")
                halves.setdefault(found["module"], {})[found["factor"]] = value
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from None
    if not halves:
        raise InputError(f"{file}: holds no LoRA tensors")
    return halves


def save_adapter(adapter: Adapter, folder: Path | str, base_model: str, card: Mapping | None = None) -> None:
    """Write an adapter as a PEFT directory, the configuration last; `card` as card.json and README.md.

    The rank written is the factors' own, and lora_alpha is chosen so that PEFT's scale equals the adapter's.
    """
    folder = Path(folder)
    tensors = {}
    for name, (a, b) in sorted(_equal_rank(adapter).items()):
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().cpu().float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().cpu().float().contiguous()
    write_bytes(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    if card is not None:
        write_card(folder, card)
    write_json(folder / "adapter_config.json", peft_config(adapter, base_model))


def _equal_rank(adapter: Adapter) -> Factors:
    """Factors padded with zero rows and columns to one rank (PEFT's config has one `r` for all modules)."""
    return {name: pad_rank(a, b, adapter.rank) for name, (a, b) in adapter.factors.items()}


def pad_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `[r, in]`, B `[out, r]` padded with zeros to a larger rank; the update stays the same."""
    missing = rank - a.shape[0]
    if missing == 0:
        return a, b
    return torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)


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


def write_card(folder: Path, card: Mapping) -> None:
    """card.json, and the same as the README.md of a model: a table, and one more for each group of values."""
    write_json(folder / "card.json", card)
    write_text(folder / "README.md", _card_text(card))


def _card_text(card: Mapping) -> str:
    groups = {key: value for key, value in card.items() if isinstance(value, Mapping)}
    parts = [_table({key: value for key, value in card.items() if key not in groups})]
    parts += [f"## {name}\n\n{_table(group)}" for name, group in groups.items()]
    front = {"library_name": "peft"} | ({"base_model": card["base_model"]} if "base_model" in card else {})
    lines = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    return f"---\n{lines}\n---\n# Personal adapter\n\n" + "\n".join(parts)


def _table(values: Mapping) -> str:
    rows = "".join(f"| {key} | `{json.dumps(value, ensure_ascii=False)}` |\n" for key, value in values.items())
    return f"| | |\n|---|---|\n{rows}"
