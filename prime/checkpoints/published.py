"""Adapters and gates of the published code: `lora_ckpt.pt` and gate files, trained on Meta's layout of Llama.

Keys are `layers.{i}.attention.lora_w{q,k,v,o}.lora_{down,up}.weight`, down = A `[r, in]`, up = B `[out, r]`. Rows of
B for wq and wk are in Meta's rotary order and are permuted like the weights (`meta.rope_rows`); A and gates
face a module's input and stay as they are. The files do not tell alpha; it is 8 as published, so the scale is 8 / r.
"""

import re
from pathlib import Path

from torch import Tensor

from prime.bank.lora import Adapter
from prime.checkpoints.meta import rope_rows
from prime.checkpoints.meta_params import is_meta_dir, read_params
from prime.checkpoints.peft import factor_problems, load_adapter, named_halves, paired
from prime.checkpoints.tensors import finite_problem, load_named, shown
from prime.errors import InputError
from prime.runs.files import read_json

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
    heads = found.get("num_attention_heads") if isinstance(found, dict) else None
    if type(heads) is not int or heads < 1:
        raise InputError(f"{path}: num_attention_heads is missing; a published adapter needs a Llama")
    kv_heads = found.get("num_key_value_heads") or heads
    if type(kv_heads) is not int or not 1 <= kv_heads <= heads:
        raise InputError(f"{path}: num_key_value_heads is {shown(repr(kv_heads))}, expected 1 to {heads}")
    return heads, kv_heads


def load_published(path: Path, heads: int, kv_heads: int) -> Adapter:
    """Read a published lora_ckpt.pt.

    Raises:
        InputError: not a file of tensors; tensors unknown, unpaired or misshapen, values not finite, norms above
            `prime.checkpoints.peft.MAX_NORM`; names the file and every such tensor.
    """
    halves, problems = named_halves(load_named(path), LORA_KEY, lambda found: (_module(found), found["side"]))
    factors, unpaired = paired(dict(sorted(halves.items())), ("down", "up"))
    problems += unpaired
    counts = {"q_proj": heads, "k_proj": kv_heads}
    for module, (a, b) in factors.items():
        count = counts.get(module.rsplit(".", 1)[-1])
        if count and b.shape[0] % (2 * count):
            told = f"lora_up {tuple(b.shape)} cannot be parted into the model's {count} heads"
            problems.append(f"{module}: {told}")
        elif count:
            factors[module] = (a, rope_rows(b, count))
    ranks = {a.shape[0] for a, _ in factors.values()}
    if len(ranks) > 1:
        problems.append(f"ranks {sorted(ranks)} in one adapter")
    scale = PUBLISHED_ALPHA / max(ranks, default=PUBLISHED_ALPHA)
    problems += factor_problems(factors, scale)
    if problems:
        raise InputError.many([f"{path}: {problem}" for problem in problems])
    return Adapter(factors, scale, {"imported_from": path.name})


def load_published_gate(path: Path) -> dict[str, Tensor]:
    """Read a published gate file: module name -> gate `[in]`, for `prime.merging.gates`.

    Any key of an attention layer with a part `gate` and a part q, k, v, o (wq, q_proj, ...) is taken, vectors `[in]`,
    `[1, in]` or `[in, 1]`.
    """
    gates: dict[str, Tensor] = {}
    problems = []
    for key, tensor in load_named(path).items():
        found = GATE_KEY.fullmatch(key)
        if not found or tensor.numel() != max(tensor.shape, default=0):
            problems.append(f"{path}: {shown(key)} {tuple(tensor.shape)} is no gate vector of a published file")
        elif told := finite_problem(tensor):
            problems.append(f"{path}: {shown(key)} {told}")
        elif _module(found) in gates:
            problems.append(f"{path}: {shown(key)} is the second gate of its module")
        else:
            gates[_module(found)] = tensor.flatten()
    if problems:
        raise InputError.many(problems)
    return gates


def _module(found: re.Match) -> str:
    return f"model.layers.{found['layer']}.self_attn.{found['kind']}_proj"
