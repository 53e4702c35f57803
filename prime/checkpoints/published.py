"""Adapters and gates of the published code: `lora_ckpt.pt` and gate files, trained on Meta's layout of Llama.

Keys are `layers.{i}.attention.lora_w{q,k,v,o}.lora_{down,up}.weight`, down = A `[r, in]`, up = B `[out, r]`. Rows of
B for wq and wk are in Meta's rotary order and are permuted like the weights (`meta.rope_rows`). A and the gates face a
module's input, so they stay as they are. The files do not hold alpha; it was 8 in the published code, so the scale is
8 / r.
"""

import re
from pathlib import Path

from torch import Tensor

from prime.bank.lora import Adapter
from prime.checkpoints.hub import local_dir
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


def open_adapter(path: str | Path, base: str, used_on: str = "") -> Adapter:
    """A PEFT directory, or a published `.pt` file (or a directory that holds only that).

    Args:
        base: directory of the model it was trained on, whose numbers of heads a published file is read by.
        used_on: as for `prime.checkpoints.peft.load_adapter`.
    """
    path = Path(path)
    inside = path / FILE
    if inside.is_file() and not (path / "adapter_config.json").is_file():
        path = inside
    return load_published(path, *heads_of(base)) if path.is_file() else load_adapter(path, used_on)


def has_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT directory, or holds a published file."""
    return any((folder / name).is_file() for name in ("adapter_config.json", FILE))


def heads_of(base: str) -> tuple[int, int]:
    """(query heads, key-value heads) of a model directory, without loading it."""
    base = local_dir(base, weights=False)
    if is_meta_dir(base):
        params = read_params(base)
        return params.n_heads, params.n_kv_heads
    path = Path(base) / "config.json"
    config = read_json(path)
    heads = config.get("num_attention_heads") if isinstance(config, dict) else None
    if type(heads) is not int or heads < 1:
        raise InputError(f"{path}: num_attention_heads is missing; a published adapter needs a Llama")
    kv_heads = config.get("num_key_value_heads") or heads
    if type(kv_heads) is not int or not 1 <= kv_heads <= heads:
        raise InputError(f"{path}: num_key_value_heads is {shown(repr(kv_heads))}, expected 1 to {heads}")
    return heads, kv_heads


def load_published(path: Path, heads: int, kv_heads: int) -> Adapter:
    """Read a published lora_ckpt.pt.

    Raises:
        InputError: not a file of tensors; tensors unknown, unpaired or misshapen, values not finite, norms above
            `prime.checkpoints.peft.MAX_NORM`; names the file and every such tensor.
    """
    halves, problems = named_halves(load_named(path), LORA_KEY, lambda match: (_module(match), match["side"]))
    factors, unpaired = paired(dict(sorted(halves.items())), ("down", "up"))
    problems += unpaired
    heads_of_kind = {"q_proj": heads, "k_proj": kv_heads}  # the others are not rotated
    for module, (a, b) in factors.items():
        count = heads_of_kind.get(module.rsplit(".", 1)[-1])
        if count and b.shape[0] % (2 * count):
            problems.append(f"{module}: lora_up {tuple(b.shape)} cannot be parted into the model's {count} heads")
        elif count:
            factors[module] = (a, rope_rows(b, count))
    ranks = {a.shape[0] for a, _ in factors.values()}
    if len(ranks) > 1:
        problems.append(f"ranks {sorted(ranks)} in one adapter")
    scale = PUBLISHED_ALPHA / max(ranks, default=PUBLISHED_ALPHA)
    problems += factor_problems(factors, scale)
    if problems:
        raise InputError.many([f"{path}: {problem}" for problem in problems])
    return Adapter(factors, scale, {"imported_from": path.name}, str(path))


def load_published_gate(path: Path) -> dict[str, Tensor]:
    """Read a published gate file: module name -> gate `[in]`, for `prime.merging.gates`.

    A key names an attention layer, `gate`, and one of q, k, v, o (as wq, q_proj, ...). Gates are vectors `[in]`,
    `[1, in]` or `[in, 1]`.
    """
    gates: dict[str, Tensor] = {}
    problems = []
    for key, tensor in load_named(path).items():
        match = GATE_KEY.fullmatch(key)
        if not match or tensor.numel() != max(tensor.shape, default=0):
            problems.append(f"{path}: {shown(key)} {tuple(tensor.shape)} is no gate vector of a published file")
        elif problem := finite_problem(tensor):
            problems.append(f"{path}: {shown(key)} {problem}")
        elif _module(match) in gates:
            problems.append(f"{path}: {shown(key)} is the second gate of its module")
        else:
            gates[_module(match)] = tensor.flatten()
    if problems:
        raise InputError.many(problems)
    return gates


def _module(match: re.Match) -> str:
    """Hugging Face's name of the module that a published key belongs to."""
    return f"model.layers.{match['layer']}.self_attn.{match['kind']}_proj"
