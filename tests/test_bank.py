"""The bank against PEFT: a row routed to an adapter is PEFT's model with that adapter, whatever its neighbours are."""

import pytest
import torch

import prime.bank.linear
from prime.bank.bank import AdapterBank
from prime.bank.lora import RULES, Adapter, merge
from prime.errors import InputError
from tests import tiny

BASE = tiny.model()
ADAPTERS = [tiny.adapter(BASE, seed, rank, scale) for seed, (rank, scale) in enumerate([(4, 1.0), (2, 2.0), (3, 0.5)])]
IDS = tiny.ids(4, 11)
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(autouse=True, params=[0, prime.bank.linear.SPREAD], ids=["copied", "spread"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether each row group's factors are copied, or few tokens multiplied by those of all adapters."""
    monkeypatch.setattr(prime.bank.linear, "SPREAD", request.param)


@pytest.fixture
def bank() -> AdapterBank:
    found = AdapterBank(tiny.model())
    found.load(ADAPTERS)
    return found


def routed(bank: AdapterBank, groups: list[int] | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    with bank.routed(groups):
        return tiny.logits(bank.model, ids)


PEFT_LOGITS = [tiny.logits(tiny.peft_model(BASE, adapter), IDS) for adapter in ADAPTERS]
BASE_LOGITS = tiny.logits(BASE, IDS)


def test_the_adapters_differ_enough_for_these_tests() -> None:
    found = [BASE_LOGITS, *PEFT_LOGITS]
    assert all((found[i] - found[j]).abs().max() > 0.1 for i in range(4) for j in range(i))


# -- routing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_row_is_peft_with_that_adapter(family: str) -> None:
    base = tiny.model(family)
    adapters = [tiny.adapter(base, seed, scale=1.5) for seed in range(2)]
    bank = AdapterBank(tiny.model(family))
    bank.load(adapters)
    found = routed(bank, [1, 0, 1, 0])
    expected = [tiny.logits(tiny.peft_model(base, adapter), IDS) for adapter in adapters]
    for row, own in enumerate([1, 0, 1, 0]):
        assert torch.allclose(found[row], expected[own][row], **TOLERANCE)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    assert torch.equal(routed(bank, None), tiny.logits(base, IDS))


def test_a_mixed_batch_of_different_ranks(bank: AdapterBank) -> None:
    assert bank.n == 3
    for order in ([2, 0, 1, 0], [1, 1, 1, 2]):
        found = routed(bank, order)
        for row, own in enumerate(order):
            assert torch.allclose(found[row], PEFT_LOGITS[own][row], **TOLERANCE)


def test_groups_are_consecutive_rows(bank: AdapterBank) -> None:
    assert torch.allclose(routed(bank, [2, 1]), routed(bank, [2, 2, 1, 1]), **TOLERANCE)
    assert torch.allclose(routed(bank, [1]), PEFT_LOGITS[1], **TOLERANCE)
    assert torch.allclose(routed(bank, torch.tensor([2, 1]))[3], PEFT_LOGITS[1][3], **TOLERANCE)


def test_one_token_of_each_row_and_the_base_among_them(bank: AdapterBank) -> None:
    found = routed(bank, [2, -1, 0, 1], IDS[:, :1])
    expected = [tiny.logits(tiny.peft_model(BASE, ADAPTERS[own]), IDS[:, :1]) for own in (2, 0, 1)]
    for row, own in ((0, 0), (2, 1), (3, 2)):
        assert torch.allclose(found[row], expected[own][row], **TOLERANCE)
    assert torch.allclose(found[1], tiny.logits(BASE, IDS[:, :1])[1], **TOLERANCE)


def test_outside_the_block_the_base_is_untouched(bank: AdapterBank) -> None:
    routed(bank, [0, 1, 2, 0])
    assert torch.equal(tiny.logits(bank.model, IDS), BASE_LOGITS)
    with pytest.raises(RuntimeError, match="stop"), bank.routed([0, 1, 2, 0]):
        raise RuntimeError("stop")
    assert torch.equal(tiny.logits(bank.model, IDS), BASE_LOGITS)


def test_blocks_nest(bank: AdapterBank) -> None:
    with bank.routed([0]):
        assert torch.equal(routed(bank, None), BASE_LOGITS)
        assert torch.allclose(tiny.logits(bank.model, IDS), PEFT_LOGITS[0], **TOLERANCE)


def test_the_scaler_multiplies_the_factor_pairs_input_only(bank: AdapterBank) -> None:
    """Halving x before the pair is halving the update; the base's own product sees the full x."""
    seen: set[int] = set()

    def halve(module: int, x: torch.Tensor) -> torch.Tensor:
        seen.add(module)
        assert x.shape[:2] == (4, 11)
        return x * 0.5

    with bank.routed([0, 0, 0, 0], halve):
        found = tiny.logits(bank.model, IDS)
    half = Adapter(ADAPTERS[0].factors, 0.5)
    assert torch.allclose(found, tiny.logits(tiny.peft_model(BASE, half), IDS), **TOLERANCE)
    assert seen == set(range(8))


def test_groups_that_do_not_divide_the_rows_are_refused(bank: AdapterBank) -> None:
    """3 groups over 2 rows of 3 tokens would otherwise cut rows in pieces without a word."""
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        routed(bank, [0, 1, 2], tiny.ids(2, 3))


# -- combining ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_one_hot_and_zero_candidates(bank: AdapterBank, rule: str) -> None:
    bank.combine(torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), rule)
    assert bank.n == 4
    assert torch.allclose(routed(bank, [0]), BASE_LOGITS, **TOLERANCE)
    for place in range(3):
        assert torch.allclose(routed(bank, [place + 1]), PEFT_LOGITS[place], **TOLERANCE)
    mixed = routed(bank, [3, 0, 2, 1])
    for row, own in enumerate([PEFT_LOGITS[2], BASE_LOGITS, PEFT_LOGITS[1], PEFT_LOGITS[0]]):
        assert torch.allclose(mixed[row], own[row], **TOLERANCE)


WEIGHTS = torch.tensor([[0.8, -0.5, 0.4], [0.3, 0.3, 0.3], [-1.0, 0.2, 0.0]])


def test_delta_is_the_dense_sum(bank: AdapterBank) -> None:
    bank.combine(WEIGHTS, "delta")
    parts = [tiny.dense_updates(adapter) for adapter in ADAPTERS]
    for place, weights in enumerate(WEIGHTS.tolist()):
        total = {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}
        expected = tiny.logits(tiny.with_updates(BASE, total), IDS)
        assert (expected - BASE_LOGITS).abs().max() > 0.05
        assert torch.allclose(routed(bank, [place]), expected, **TOLERANCE)


def test_factor_is_peft_with_the_summed_factors(bank: AdapterBank) -> None:
    bank.combine(WEIGHTS, "factor")
    for place, weights in enumerate(WEIGHTS.tolist()):
        factors = {}
        for name in ADAPTERS[0].factors:
            a, b = torch.zeros(4, 64), torch.zeros(ADAPTERS[0].factors[name][1].shape[0], 4)
            for w, adapter in zip(weights, ADAPTERS, strict=True):
                own_a, own_b = adapter.factors[name]
                a[: len(own_a)] += w * own_a
                b[:, : len(own_a)] += w * adapter.scale * own_b
            factors[name] = (a, b)
        expected = tiny.logits(tiny.peft_model(BASE, Adapter(factors)), IDS)
        assert torch.allclose(routed(bank, [place]), expected, **TOLERANCE)


def test_factor_is_even_and_delta_is_not(bank: AdapterBank) -> None:
    both = torch.stack([WEIGHTS[0], -WEIGHTS[0]])
    bank.combine(both, "factor")
    assert torch.equal(routed(bank, [0]), routed(bank, [1]))
    bank.combine(both, "delta")
    assert (routed(bank, [0]) - routed(bank, [1])).abs().max() > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_one_weight_per_layer(bank: AdapterBank, rule: str) -> None:
    alike = [tiny.adapter(BASE, seed, scale=1.5) for seed in range(3)]
    bank.load(alike)
    assert bank.layers == 2
    weights = torch.tensor([[[0.9, 0.0], [-0.4, 0.7], [0.0, 1.1]], [[1.0, 1.0], [0.0, 0.0], [0.5, 0.5]]])
    bank.combine(weights, rule)
    found = [routed(bank, [place]) for place in range(2)]
    for place in range(2):
        merged = merge(alike, weights[place], rule)
        expected = tiny.logits(tiny.with_updates(BASE, tiny.dense_updates(merged)), IDS)
        assert torch.allclose(found[place], expected, **TOLERANCE)
    bank.combine(weights[1:, :, 0], rule)
    assert torch.allclose(routed(bank, [0]), found[1], **TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_candidate_of_lower_rank_is_the_merged_adapter_of_lower_rank(
    bank: AdapterBank, rule: str, rank: int, by_layer: bool
) -> None:
    """What is evaluated is what is deployed, single sharers and the base among them."""
    weights = torch.cat([torch.zeros(1, 3), torch.eye(3), WEIGHTS])
    if by_layer:
        weights = torch.stack([weights, weights.flip(0)], dim=2)
    bank.combine(weights, rule, rank)
    for place, own in enumerate(weights):
        found, deployed = (tiny.dense_updates(one) for one in (bank.adapter(place), merge(ADAPTERS, own, rule, rank)))
        for name, update in deployed.items():
            assert (found[name] - update).abs().max() <= 1e-5 * update.abs().max()
            assert torch.linalg.matrix_rank(update, rtol=1e-4) <= rank
    kept = routed(bank, [4])
    bank.combine(weights, rule)
    assert (routed(bank, [4]) - kept).abs().max() > 0.01


@pytest.mark.parametrize("rule", RULES)
def test_combining_again_starts_from_the_loaded_adapters(bank: AdapterBank, rule: str) -> None:
    bank.combine(WEIGHTS, rule)
    bank.combine(torch.eye(3), rule)
    assert torch.allclose(routed(bank, [2]), PEFT_LOGITS[2], **TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
def test_a_candidate_taken_out_is_the_candidate(bank: AdapterBank, rule: str) -> None:
    bank.combine(WEIGHTS, rule)
    taken = bank.adapter(1)
    expected = routed(bank, [1])
    assert torch.allclose(tiny.logits(tiny.peft_model(BASE, taken), IDS), expected, **TOLERANCE)
    next(iter(taken.factors.values()))[0].zero_()  # a copy: the bank does not feel it
    assert torch.equal(routed(bank, [1]), expected)


# -- fresh adapters -------------------------------------------------------------------------------------------------


def test_fresh_adapters_start_as_the_base_with_kaiming_a() -> None:
    bank = AdapterBank(tiny.model())
    bank.allocate([5, 6], rank=8, alpha=16)
    assert bank.n == 2
    assert torch.equal(routed(bank, [0, 1]), BASE_LOGITS)
    for name, (a, b) in bank.adapter(0).factors.items():
        limit = 1 / tiny.targets_of(BASE)[name].in_features ** 0.5
        assert (b == 0).all() and a.abs().max() <= limit
        assert a.std() == pytest.approx(limit / 3**0.5, rel=0.15)  # uniform
    assert bank.adapter(0).scale == 2.0
    assert all(parameter.requires_grad for parameter in bank.parameters())
    assert not any(parameter.requires_grad for parameter in bank.model.parameters())


def test_a_fresh_adapter_depends_on_its_seed_alone() -> None:
    bank = AdapterBank(tiny.model())
    bank.allocate([5, 6, 7], rank=4, alpha=4)
    among = [bank.adapter(i).factors for i in range(3)]
    torch.manual_seed(0)
    bank.allocate([7], rank=4, alpha=4)
    for name, (a, _) in bank.adapter(0).factors.items():
        assert torch.equal(a, among[2][name][0])
        assert not torch.equal(a, among[1][name][0])
    firsts = [a for a, _ in among[0].values() if a.shape == (4, 64)]
    assert not torch.equal(firsts[0], firsts[1])  # modules do not share their noise


def test_gradients_reach_the_routed_adapters_only() -> None:
    bank = AdapterBank(tiny.model())
    bank.allocate([1, 2, 3], rank=4, alpha=4)
    with bank.routed([0, 2, 2, 0]):
        bank.model(input_ids=IDS).logits.square().mean().backward()
    for b in bank.parameters()[1::2]:
        assert b.grad is not None
        assert b.grad[0].abs().max() > 0 and b.grad[2].abs().max() > 0 and (b.grad[1] == 0).all()


# -- the model around it --------------------------------------------------------------------------------------------


def test_unwrapping_gives_the_model_back(bank: AdapterBank) -> None:
    assert [name for name, _ in bank.unwrap().named_modules()] == [name for name, _ in BASE.named_modules()]
    assert torch.equal(tiny.logits(bank.model, IDS), BASE_LOGITS)


def test_other_targets() -> None:
    bank = AdapterBank(tiny.model(), ["up_proj", "q_proj"])
    assert {name.rsplit(".", 1)[-1] for name in bank.wrappers} == {"up_proj", "q_proj"}
    assert len(bank.wrappers) == 4


def test_bf16_models_keep_fp32_factors() -> None:
    bank = AdapterBank(tiny.model().to(torch.bfloat16))
    bank.load(ADAPTERS)
    found = routed(bank, [0, 1, 2, 0])
    assert found.dtype == torch.bfloat16 and {p.dtype for p in bank.parameters()} == {torch.float32}
    for row, own in enumerate([0, 1, 2, 0]):
        off = (found[row].float() - PEFT_LOGITS[own][row]).abs().mean()
        assert off < 0.1 * (BASE_LOGITS[row] - PEFT_LOGITS[own][row]).abs().mean()


def test_targets_that_are_missing_or_not_linear() -> None:
    with pytest.raises(InputError, match="no module named nope, wo"):
        AdapterBank(tiny.model(), ["q_proj", "wo", "nope"])
    with pytest.raises(InputError, match="self_attn is a LlamaAttention, not an nn.Linear"):
        AdapterBank(tiny.model(), ["self_attn"])


def test_adapters_that_do_not_fit_the_model() -> None:
    bank = AdapterBank(tiny.model())
    with pytest.raises(InputError, match=r"adapter 0: the model has no model.layers.2.self_attn.\w_proj"):
        bank.load([tiny.adapter(tiny.model(num_hidden_layers=3), 0)])
    with pytest.raises(InputError, match="k_proj: the adapter is 64 -> 64 wide, the model 64 -> 32"):
        bank.load([tiny.adapter(tiny.model(num_key_value_heads=4), 0)])
    with pytest.raises(InputError, match=r"adapter 1: the model has no model.layers.2.self_attn.\w_proj"):
        bank.load([ADAPTERS[0], tiny.adapter(tiny.model(num_hidden_layers=3), 0)])
