"""Matrix products of frozen linear layers on a CPU, by oneDNN.

PyTorch gives fp32 products of dense tensors to MKL, which leaves AVX-512 unused on processors that are not Intel's;
oneDNN asks what the processor can do. So oneDNN computes there; `benchmarks/products.py` measures both. Weights stay
as they are: packed in advance they would be a tenth faster for a few rows, and twice in memory.

oneDNN makes and keeps a kernel for every number of rows it meets: a millisecond, and half a megabyte. So layers of
fewer than `LEAST` weights stay with MKL, as do fewer than `FEWEST` rows; up to `PADDED` rows are padded to one of few
numbers, and passes over prompts are a multiple of `COLUMNS` wide where no attention window counts their padding.
"""

from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

LEAST = 2**18  # weights; smaller layers take less than the making of a kernel
FEWEST = 4  # rows; fewer are bound by reading the weights, and faster by MKL
PADDED = 512  # rows; to copy more of them would cost more than a kernel
COLUMNS = 8


class OneDnnLinear(nn.Linear):
    """A frozen `nn.Linear` that computes its product and its input's gradient by oneDNN where that is possible."""

    def forward(self, x: Tensor) -> Tensor:
        if not (_fits(self) and x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.enabled):
            return super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Product.apply(x, self.weight, self.bias))
        return product(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x W^T + b with W and b frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(grads[0], weight.t()), None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., in]` times the transpose of weight `[out, in]`, plus bias `[out]`: `[..., out]`; fp32, on a CPU."""
    rows = x.numel() // x.shape[-1]
    if rows < FEWEST:
        return linear(x, weight, bias)
    wanted = padded_rows(rows)
    if wanted == rows:
        return _onednn(x, weight, bias)
    padded = pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, wanted - rows))
    return _onednn(padded, weight, bias)[:rows].view(*x.shape[:-1], len(weight))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def padded_rows(rows: int) -> int:
    """Rows that are computed for so many: one of 40 numbers, at most an eighth more, up to `PADDED`; else as many."""
    step = max(4, 2 ** ((rows - 1).bit_length() - 4)) if 0 < rows <= PADDED else 1
    return round_up(rows, step)


def round_up(number: int, step: int) -> int:
    """The next multiple of step."""
    return -(-number // step) * step


def available() -> bool:
    """Whether oneDNN is there, and an AVX-512 that MKL leaves unused."""
    unused = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and "GenuineIntel" not in cpuinfo()
    return unused and built()


def built() -> bool:
    """Whether this PyTorch has oneDNN's products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def cpuinfo() -> str:
    """Linux' description of the processor; where there is none it is taken for Intel's, whose MKL needs no help."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return "vendor_id : GenuineIntel"


def quicken(model: nn.Module) -> int:
    """Let a model's frozen, large fp32 linear layers on a CPU compute by oneDNN, where that is available.

    Returns:
        What the width of a pass over prompts should be a multiple of.
    """
    if available():
        for module in model.modules():
            if type(module) is nn.Linear and _fits(module):
                module.__class__ = OneDnnLinear
    return COLUMNS if any(type(module) is OneDnnLinear for module in model.modules()) else 1


def restore(model: nn.Module) -> None:
    """Undo `quicken`."""
    for module in model.modules():
        if type(module) is OneDnnLinear:
            cast(nn.Module, module).__class__ = nn.Linear


def _fits(layer: nn.Linear) -> bool:
    """Whether the layer is frozen, large, on a CPU and fp32."""
    weight, bias = layer.weight, layer.bias
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return frozen and weight.numel() >= LEAST and weight.device.type == "cpu" and weight.dtype == torch.float32


def threads_of(model: nn.Module, cores: int) -> int:
    """Threads for a model's products: one per core, or a single one where most layers have fewer than `LEAST` weights.

    The demo's layers have 45,056 at most. Training 7 of its anchors for 2 epochs took 23 s with two threads and 26 s
    with one; beside two busy loops 67 s and 39 s.
    """
    weights = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)]
    return cores if weights and median(weights) >= LEAST else 1


def device_of(module: nn.Module) -> torch.device:
    """Where a layer computes: accelerate's hook brings an offloaded one's weight there."""
    execution_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return cast(Tensor, module.weight).device if execution_device is None else torch.device(execution_device)
