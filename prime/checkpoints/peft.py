"""LoRA adapters as PEFT directories: adapter_config.json, adapter_model.safetensors (or .bin), and a card."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from prime.bank.lora import Adapter, Factors, pad_rank
from prime.checkpoints.adapter_config import FILE as CONFIG_FILE
from prime.checkpoints.adapter_config import LoraSettings, peft_config, read_config, warn_of_base
from prime.checkpoints.tensors import finite_problem, load_named, read_safetensors, shown
from prime.errors import InputError
from prime.runs.files import write_bytes, write_json, write_text
from prime.runs.forms import read_form

WEIGHT_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
# Bounds the Frobenius norms of A and scale * B in each module, and the product of the two, which bounds the update's.
# Trained adapters stay below 20, and a whole projection of a 7B model has about 80: an update of 10,000 would drown
# whatever it is merged with.
MAX_NORM = 1e4

# -- reading --------------------------------------------------------------------------------------------------------


def adapter_dir(path: Path | str) -> Path:
    """The PEFT directory meant by `path`: itself, or its parent for the announcement's `.../lora_ckpt.pt`."""
    path = Path(path)
    for candidate in (path, path.parent) if path.suffix == ".pt" else (path,):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    raise InputError(f"{path}: no adapter there (adapter_config.json and adapter_model.safetensors expected)")


def load_adapter(path: Path | str, used_on: str = "") -> Adapter:
    """Read a PEFT LoRA directory (adapter_config.json, and adapter_model.safetensors or else adapter_model.bin).

    Args:
        used_on: the base it is used on; a configuration that names another is warned of. "": not looked at.

    Raises:
        InputError: missing or broken files, a config that is not plain LoRA, unknown, repeated, unpaired or misshapen
            tensors, values that are not finite or norms above `MAX_NORM`; names the file and every such tensor.
    """
    folder = adapter_dir(path)
    config = read_config(folder / CONFIG_FILE)
    file = folder / "adapter_model.safetensors"
    pickled = folder / "adapter_model.bin"  # as PEFT wrote before 0.6
    if pickled.is_file() and not file.exists():
        file = pickled
    tensors = load_named(file) if file == pickled else read_safetensors(file)
    halves, problems = named_halves(tensors, WEIGHT_KEY, lambda match: (match["module"], match["factor"]))
    factors, unpaired = paired(halves, ("A", "B"))
    problems += unpaired
    for module, (a, _) in factors.items():
        if a.shape[0] != config.rank and not config.ranks:
            told = f"lora_A {tuple(a.shape)} has not the rank {config.rank} of the configuration"
            problems.append(f"{shown(module)}: {told}")
    factors, scale = _scaled(factors, config)
    problems += factor_problems(factors, scale)
    if problems:
        raise InputError.many([f"{file}: {problem}" for problem in problems])
    if used_on:
        warn_of_base(folder / CONFIG_FILE, config.base, used_on)
    card = folder / "card.json"
    return Adapter(factors, scale, read_form(card, {}) if card.exists() else {}, str(folder))


def _scaled(factors: Factors, config: LoraSettings) -> tuple[Factors, float]:
    """Factors and the one scale of all modules; where modules differ in it, it goes into B and is 1."""
    if not config.ranks and not config.alphas:
        return factors, config.scale("", config.rank)
    return {name: (a, b * config.scale(name, a.shape[0])) for name, (a, b) in factors.items()}, 1.0


def named_halves(
    tensors: Mapping[str, Tensor], pattern: re.Pattern, module_and_side: Callable[[re.Match], tuple[str, str]]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Factors in fp32 by module and side, and what is wrong with the tensors of a file, one line each.

    Args:
        pattern: of the names of tensors.
        module_and_side: takes a match of it apart; the side is the name of A or B.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    problems = [] if tensors else ["holds no LoRA tensors"]
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if not match:
            problems.append(f"unexpected tensor {shown(name)}")
            continue
        module, side = module_and_side(match)
        if side in halves.setdefault(module, {}):
            problems.append(f"{shown(name)} is the second lora_{side} of its module")
        factor = tensor.float()
        halves[module][side] = factor
        if problem := finite_problem(tensor) or finite_problem(factor):
            problems.append(f"{shown(name)} {problem}")
    return halves, problems


def paired(halves: Mapping[str, Mapping[str, Tensor]], sides: tuple[str, str]) -> tuple[Factors, list[str]]:
    """(A, B) of the modules that have both, and what is wrong with the others; `sides` are the names of A and B."""
    factors: Factors = {}
    problems = []
    for module, factor_of in halves.items():
        if len(factor_of) != 2:
            problems.append(f"{shown(module)} has only lora_{''.join(factor_of)}")
            continue
        a, b = (factor_of[side] for side in sides)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            shapes = f"lora_{sides[0]} {tuple(a.shape)} and lora_{sides[1]} {tuple(b.shape)}"
            problems.append(f"{shown(module)}: {shapes} do not fit")
            continue
        factors[module] = (a, b)
    return factors, problems


def factor_problems(factors: Factors, scale: float) -> list[str]:
    """The modules whose factors, or the bound of their update, exceed `MAX_NORM`."""
    problems = []
    for module, (a, b) in factors.items():
        norm_a, norm_b = float(a.double().norm()), scale * float(b.double().norm())
        if max(norm_a, norm_b, norm_a * norm_b) > MAX_NORM:
            problems.append(
                f"{shown(module)}: norms of {norm_a:.3g} and {norm_b:.3g}, above the limit of {MAX_NORM:g}"
            )
    return problems


# -- writing --------------------------------------------------------------------------------------------------------


def save_adapter(adapter: Adapter, folder: Path | str, base_model: str, card: Mapping | None = None) -> None:
    """Write an adapter as a PEFT directory, its configuration last; `card` becomes card.json and README.md.

    The rank in the configuration is that of the factors, and lora_alpha makes PEFT's scale equal the adapter's.
    """
    folder = Path(folder)
    tensors = {}
    for name, (a, b) in sorted(_equal_rank(adapter).items()):
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().cpu().float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().cpu().float().contiguous()
    write_bytes(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    if card is not None:
        write_card(folder, card)
    write_json(folder / CONFIG_FILE, peft_config(adapter, base_model))


def _equal_rank(adapter: Adapter) -> Factors:
    """Factors padded with zero rows and columns to one rank (PEFT's config has one `r` for all modules)."""
    return {name: pad_rank(a, b, adapter.rank) for name, (a, b) in adapter.factors.items()}


def write_card(folder: Path, card: Mapping) -> None:
    """Write the card as README.md (a table, and one more for each group of values), then as card.json."""
    write_text(folder / "README.md", _card_text(card))
    write_json(folder / "card.json", card)


def _card_text(card: Mapping) -> str:
    groups = {key: value for key, value in card.items() if isinstance(value, Mapping)}
    parts = [_table({key: value for key, value in card.items() if key not in groups})]
    parts += [f"## {name}\n\n{_table(group)}" for name, group in groups.items()]
    header = {"library_name": "peft"} | ({"base_model": card["base_model"]} if "base_model" in card else {})
    lines = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items())
    return f"---\n{lines}\n---\n# Personal adapter\n\n" + "\n".join(parts)


def _table(values: Mapping) -> str:
    rows = "".join(f"| {_quoted(key)[1:-1]} | `{_quoted(value)}` |\n" for key, value in values.items())
    return f"| | |\n|---|---|\n{rows}"


def _quoted(value: object) -> str:
    """A value as JSON that can neither end a Markdown cell or code span nor begin HTML: ids may come from anybody."""
    return json.dumps(value, ensure_ascii=False).translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "`|<>&"})
