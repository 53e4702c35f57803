"""oneDNN's products of frozen layers against PyTorch's own and fp64, and what is computed with them."""
import copy

import pytest
import torch
from torch import Tensor, nn

from prime.bank import cpu as products
from prime.bank.bank import AdapterBank
from prime.bank.batching import every_pair
from prime.bank.cpu import OneDnnLinear, quicken, restore
from prime.bank.decode import Request, decode
from prime.bank.encoding import EncodedPrompt, EncodedRecord
from prime.bank.logprobs import target_logprobs
from prime.bank.sampling import Sampler
from prime.bank.train import Learner, train
from prime.settings import TrainingSettings
from tests import tiny

pytestmark = pytest.mark.skipif(not products.built(), reason="this PyTorch has no oneDNN")
SHAPES = [(1, 1, 5, 3), (2, 7, 64, 96), (3, 33, 130, 257), (5, 130, 40, 24), (1, 1, 512, 1000), (0, 4, 8, 8)]


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN whatever the processor, for layers of any size."""
    monkeypatch.setattr(products, "available", lambda: True)
    monkeypatch.setattr(products, "LEAST", 0)


def layer(width: int, out: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(width + out)
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


def quickened(plain: nn.Linear) -> nn.Linear:
    found = copy.deepcopy(plain)
    assert quicken(found) == products.COLUMNS and type(found) is OneDnnLinear
    return found


def with_gradient(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its weighted sum by the input."""
    x = x.clone().requires_grad_()
    y = linear(x)
    (y * torch.linspace(-1, 1, max(1, y.numel()), dtype=y.dtype)[: y.numel()].view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("b", "t", "width", "out"), SHAPES)
def test_products_and_gradients_are_those_of_fp64(b: int, t: int, width: int, out: int, bias: bool) -> None:
    plain = layer(width, out, bias=bias)
    x = torch.randn(b, t, width)
    own = with_gradient(quickened(plain), x)
    for found, exact in zip(own, with_gradient(copy.deepcopy(plain).double(), x.double()), strict=True):
        assert found.shape == exact.shape
        assert torch.allclose(found.double(), exact, rtol=0, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(quickened(plain)(x), own[0])


def test_strided_inputs() -> None:
    plain, x = layer(40, 24), torch.randn(9, 40, 5).transpose(1, 2)
    assert torch.allclose(quickened(plain)(x), plain(x), atol=1e-5)
    assert torch.allclose(quickened(plain)(x[:, 0]), plain(x[:, 0]), atol=1e-5)


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


def test_small_layers_and_other_processors_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 20)
    small, large = layer(4, 4), layer(4, 5)
    assert quicken(small) == 1 and type(small) is nn.Linear
    monkeypatch.setattr(products, "available", lambda: False)
    assert quicken(large) == 1 and type(large) is nn.Linear
    monkeypatch.setattr(products, "available", lambda: True)
    assert quicken(large) == products.COLUMNS and type(large) is OneDnnLinear


def test_a_layer_that_is_thawed_trains() -> None:
    own = quickened(layer(6, 4, bias=True))
    own.requires_grad_()
    own(torch.randn(3, 6)).sum().backward()
    assert own.weight.grad is not None and own.bias.grad is not None


def test_onednn_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    own, x = quickened(layer(6, 4)), torch.randn(products.FEWEST, 6)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(products, "_onednn", refuse)
    with pytest.raises(AssertionError, match="was called"):
        own(x)
    assert torch.equal(own(x[1:]), layer(6, 4)(x[1:]))
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(own(x), layer(6, 4)(x))


def test_few_numbers_of_rows_are_computed() -> None:
    found = {rows: products.padded_rows(rows) for rows in range(products.PADDED + 1)}
    assert len(set(found.values())) <= 41
    assert all(rows <= padded <= max(rows + 3, rows * 9 / 8) for rows, padded in found.items())
    assert products.padded_rows(products.PADDED + 1) == products.PADDED + 1


# -- the bank -------------------------------------------------------------------------------------------------------


def banks() -> tuple[AdapterBank, AdapterBank]:
    """One with oneDNN and one without, the same adapters in both."""
    quick, plain = AdapterBank(tiny.model()), AdapterBank(tiny.model())
    restore(plain.model)
    plain.columns = 1
    for bank in (quick, plain):
        bank.load([tiny.adapter(tiny.model(), seed, scale=2.0) for seed in range(3)])
    return quick, plain


def test_the_bank_quickens_its_model_and_gives_it_back_plain() -> None:
    bank = AdapterBank(tiny.model())
    kinds = [type(module) for module in bank.model.modules() if isinstance(module, nn.Linear)]
    assert kinds and set(kinds) == {OneDnnLinear}
    assert [bank.width(tokens) for tokens in (1, 8, 9, 24)] == [8, 8, 16, 24]
    assert not any(type(module) is OneDnnLinear for module in bank.unwrap().modules())


def test_answers_and_scores_are_the_plain_banks() -> None:
    texts = [tiny.text_ids(0, 20, 20) + tiny.text_ids(i, 2, 14)[1:] for i in range(1, 7)]
    prompts = [EncodedPrompt(str(i), text) for i, text in enumerate(texts)]
    records = [EncodedRecord(str(i), text, tiny.text_ids(i + 9, 3, 5)) for i, text in enumerate(texts)]
    pairs = every_pair(range(-1, 3), len(texts))
    quick, plain = banks()
    for sampler in (Sampler(0.0), Sampler(0.8, 0.9, seed=3)):
        for budget in (0, 60):
            one, other = (decode(bank, Request(prompts, pairs, sampler, 7), [2], budget) for bank in (quick, plain))
            assert one == other and len(one) == len(pairs)
    one, other = (target_logprobs(bank, records, pairs) for bank in (quick, plain))
    assert all(torch.allclose(one[pair], other[pair], atol=1e-4) for pair in pairs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_are_the_plain_banks(checkpointing: bool) -> None:
    records = [EncodedRecord(str(i), tiny.text_ids(i, 5, 20), tiny.text_ids(i + 9, 3, 5)) for i in range(8)]
    settings = TrainingSettings(lr=1e-2, batch_size=2, epochs=2, gradient_checkpointing=checkpointing)
    found = []
    for bank in banks():
        bank.allocate([0, 1], 4, 4)
        found.append(train(bank, [Learner(i, str(i), i, records[i:]) for i in range(2)], settings))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-4) and one[0] != pytest.approx(one[-1], abs=1e-2)
