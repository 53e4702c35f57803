"""Adapters and gates of the published code: `lora_ckpt.pt` and gate files, trained on Meta's layout of Llama.

Keys are `layers.{i}.attention.lora_w{q,k,v,o}.lora_{down,up}.weight`, down = A `[r, in]`, up = B `[out, r]`. Rows of
B for wq and wk are in Meta's rotary order and are permuted like the weights (`prime.meta.rope_rows`); A and gates
face a module's input and stay as they are. The files do not tell alpha; it is 8 as published, so the scale is 8 / r.
"""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from prime.data import read_json
from prime.errors import InputError
from prime.lora import Adapter, Factors, load_adapter
from prime.meta import is_meta_dir, read_params, rope_rows

FILE = "lora_ckpt.pt"
PUBLISHED_ALPHA = 8
LORA_KEY = re.compile(
    r"(?:.+\.)?layers\.(?P<layer>\d+)\.attention\.lora_w(?P<kind>[qkvo])\.lora_(?P<side>down|up)\.weight"
)
GATE_KEY = re.compile(
    r"(?:.+\.)?layers\.(?P<layer>\d+)\.attention\.(?=.*gate)(?:[a-z]+[._])*w?(?P<kind>[qkvo])(?:_proj)?(?:[._][a-z]+)*"
)


def open_adapter(path: str | Path, base: str) -> Adapter:
    """A PEFT directory, or a published `.pt` file (or a directory that holds only that).

    Args:
        base: directory of the model it was trained on; a published file needs to know its heads.
    """
    path = Path(path)
    inside = path / FILE
    if inside.is_file() and not (path / "adapter_config.json").is_file():
        path = inside
    return load_published(path, *heads_of(base)) if path.is_file() else load_adapter(path)


def has_adapter(folder: Path) -> bool:
    """A PEFT directory, or one with a published file in it."""
    return any((folder / name).is_file() for name in ("adapter_config.json", FILE))


def heads_of(base: str) -> tuple[int, int]:
    """(query heads, key-value heads) of a model directory, without loading it."""
    if is_meta_dir(base):
        params = read_params(base)
        return params.n_heads, params.n_kv_heads
    path = Path(base) / "config.json"
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("num_attention_heads"), int):
        raise InputError(f"{path}: num_attention_heads is missing; a published adapter needs a Llama")
    return found["num_attention_heads"], found.get("num_key_value_heads") or found["num_attention_heads"]


def load_published(path: Path, heads: int, kv_heads: int) -> Adapter:
    """Read a published lora_ckpt.pt.

    Raises:
        InputError: not a file of tensors, tensors unknown, unpaired, misshapen or not finite; names file and tensor.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read(path).items():
        found = LORA_KEY.fullmatch(key)
        if not found:
            raise InputError(f"{path}: {key} is no tensor of a published adapter (layers.0.attention.lora_wq...)")
        halves.setdefault(_module(found), {})[found["side"]] = tensor
    factors: Factors = {}
    for module, half in sorted(halves.items()):
        if len(half) != 2:
            raise InputError(f"{path}: {module} has only lora_{''.join(half)}")
        factors[module] = _pair(path, module, half["down"], half["up"], heads, kv_heads)
    ranks = {a.shape[0] for a, _ in factors.values()}
    if len(ranks) != 1:
        raise InputError(f"{path}: ranks {sorted(ranks)} in one adapter")
    return Adapter(factors, PUBLISHED_ALPHA / ranks.pop(), {"imported_from": path.name})


def _pair(path: Path, module: str, a: Tensor, b: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise InputError(f"{path}: {module}: lora_down {tuple(a.shape)} and lora_up {tuple(b.shape)} do not fit")
    count = {"q_proj": heads, "k_proj": kv_heads}.get(module.rsplit(".", 1)[-1])
    if count is None:
        return a, b
    if b.shape[0] % (2 * count):
        raise InputError(f"{path}: {module}: lora_up {tuple(b.shape)} cannot be parted into the model's {count} heads")
    return a, rope_rows(b, count)


def load_published_gate(path: Path) -> dict[str, Tensor]:
    """Read a published gate file: module name -> gate `[in]`, for `prime.gates`.

    Any key of an attention layer with a part `gate` and a part q, k, v, o (wq, q_proj, ...) is taken, vectors `[in]`,
    `[1, in]` or `[in, 1]`.
    """
    gates: dict[str, Tensor] = {}
    for key, tensor in _read(path).items():
        found = GATE_KEY.fullmatch(key)
        if not found or tensor.numel() != max(tensor.shape, default=0):
            raise InputError(f"{path}: {key} {tuple(tensor.shape)} is no gate vector of a published file")
        gates[_module(found)] = tensor.flatten()
    return gates


def _module(found: re.Match) -> str:
    return f"model.layers.{found['layer']}.self_attn.{found['kind']}_proj"


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cut short, or not a file of tensors: {reason}") from None
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path}: expected a dictionary of tensors, by name")
    for key, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {key} holds values that are not finite")
    return {key: tensor.float() for key, tensor in found.items()}
