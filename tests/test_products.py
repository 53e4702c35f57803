"""oneDNN's products of frozen layers against PyTorch's own, and against fp64."""

import copy

import pytest
import torch
from torch import Tensor, nn

from prime import products
from prime.bank import AdapterBank
from prime.products import OneDnnLinear, quicken, restore
from tests import tiny

needs_onednn = pytest.mark.skipif(not products.available(), reason="no oneDNN with AVX-512 here")
SHAPES = [(1, 1, 5, 3), (2, 7, 64, 96), (3, 33, 130, 257), (1, 1, 512, 1000), (0, 4, 8, 8)]


def layer(width: int, out: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(width + out)
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


def quickened(plain: nn.Linear) -> nn.Linear:
    found = copy.deepcopy(plain)
    quicken(found)
    assert type(found) is OneDnnLinear
    return found


def with_gradient(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its weighted sum by the input."""
    x = x.clone().requires_grad_()
    y = linear(x)
    (y * torch.linspace(-1, 1, max(1, y.numel()), dtype=y.dtype)[: y.numel()].view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().sum())


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("b", "t", "width", "out"), SHAPES)
def test_products_and_gradients_are_as_near_to_fp64_as_pytorchs(
    b: int, t: int, width: int, out: int, bias: bool
) -> None:
    plain = layer(width, out, bias=bias)
    x = torch.randn(b, t, width)
    exact = with_gradient(copy.deepcopy(plain).double(), x.double())
    own, theirs = with_gradient(quickened(plain), x), with_gradient(plain, x)
    for mine, other, true in zip(own, theirs, exact, strict=True):
        assert mine.shape == other.shape
        assert error(mine, true) <= 2 * error(other, true) + 1e-6
    with torch.inference_mode():
        assert torch.equal(quickened(plain)(x), own[0])


@needs_onednn
def test_strided_inputs() -> None:
    plain, x = layer(40, 24), torch.randn(9, 40, 5).transpose(1, 2)
    assert torch.allclose(quickened(plain)(x), plain(x), atol=1e-5)
    assert torch.allclose(quickened(plain)(x[:, 0]), plain(x[:, 0]), atol=1e-5)


@needs_onednn
def test_only_frozen_fp32_linear_layers_are_quickened() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"frozen": layer(4, 4), "free": nn.Linear(4, 4), "bf16": layer(4, 4).bfloat16(), "own": Own(4, 4)}
    )
    model["own"].requires_grad_(False)
    quicken(model)
    assert {name: type(module) for name, module in model.items()} == {
        "frozen": OneDnnLinear, "free": nn.Linear, "bf16": nn.Linear, "own": Own,
    }  # fmt: skip
    restore(model)
    assert type(model["frozen"]) is nn.Linear


@needs_onednn
def test_a_layer_that_is_thawed_trains() -> None:
    own = quickened(layer(6, 4, bias=True))
    own.requires_grad_()
    own(torch.randn(3, 6)).sum().backward()
    assert own.weight.grad is not None and own.bias.grad is not None


@needs_onednn
def test_without_onednn_it_is_pytorchs_own() -> None:
    plain, x = layer(130, 257), torch.randn(3, 33, 130)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(quickened(plain)(x), plain(x))


@needs_onednn
def test_the_bank_quickens_its_model_and_gives_it_back_plain() -> None:
    model = tiny.model()
    bank = AdapterBank(model)
    kinds = [type(module) for module in bank.model.modules() if isinstance(module, nn.Linear)]
    assert kinds and set(kinds) == {OneDnnLinear}
    assert not any(type(module) is OneDnnLinear for module in bank.unwrap().modules())


def test_few_numbers_of_rows_are_computed() -> None:
    found = {rows: products.padded_rows(rows) for rows in range(products.PADDED + 1)}
    assert len(set(found.values())) <= 41
    assert all(rows <= padded <= max(rows + 3, rows * 9 / 8) for rows, padded in found.items())
    assert products.padded_rows(products.PADDED + 1) == products.PADDED + 1
    widths = {tokens: products.padded_width(tokens) for tokens in range(2, 300)}
    assert all(0 <= width - tokens < 8 and width % 8 == 0 for tokens, width in widths.items())
    assert products.padded_width(1) == 1
