"""Adapter algebra by its properties; PEFT is the oracle for files and values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from prime.bank.lora import RULES, Adapter, check_widths, layer_of, merge, pad_rank, truncate
from prime.checkpoints.peft import adapter_dir, load_adapter, save_adapter
from prime.errors import InputError
from tests import tiny

BASE = tiny.model()
ADAPTERS = [tiny.adapter(BASE, seed, scale=scale) for seed, scale in enumerate((1.0, 2.0, 0.5))]
IDS = tiny.ids(2, 9)
WEIGHTS = st.lists(st.sampled_from([-1.5, -0.7, 0.0, 0.25, 1.0, 1.3]), min_size=3, max_size=3)


def assert_same(one: Adapter, other: Adapter) -> None:
    assert one.factors.keys() == other.factors.keys()
    for name, (a, b) in one.factors.items():
        assert torch.equal(a, other.factors[name][0])
        assert torch.equal(b, other.factors[name][1])


def hand_factor(weights: list[float]) -> Adapter:
    """The published rule written out, A = sum w_i A_i and B = sum w_i (s_i B_i), in fp64."""
    factors = {}
    for name in ADAPTERS[0].factors:
        a = sum(w * x.factors[name][0].double() for w, x in zip(weights, ADAPTERS, strict=True))
        b = sum(w * x.scale * x.factors[name][1].double() for w, x in zip(weights, ADAPTERS, strict=True))
        factors[name] = (a, b)
    return Adapter(factors)


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", range(3))
def test_one_hot_weights_give_that_adapter_bit_for_bit(rule: str, place: int) -> None:
    merged = merge(ADAPTERS, torch.eye(3)[place], rule)
    assert_same(merged, ADAPTERS[place].folded())
    assert merged.scale == 1.0
    for name, update in tiny.dense_updates(ADAPTERS[place]).items():
        assert torch.allclose(tiny.dense_updates(merged)[name], update, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_zero_weights_give_the_base(rule: str) -> None:
    for update in tiny.dense_updates(merge(ADAPTERS, torch.zeros(3), rule)).values():
        assert (update == 0).all()


@given(WEIGHTS)
@settings(max_examples=25)
def test_delta_is_the_dense_sum(weights: list[float]) -> None:
    merged = tiny.dense_updates(merge(ADAPTERS, torch.tensor(weights), "delta"))
    parts = [tiny.dense_updates(adapter) for adapter in ADAPTERS]
    for name, update in merged.items():
        expected = sum(w * part[name] for w, part in zip(weights, parts, strict=True))
        assert torch.allclose(update, expected, atol=1e-6)


@given(WEIGHTS, WEIGHTS)
@settings(max_examples=25)
def test_delta_is_linear(u: list[float], v: list[float]) -> None:
    one, two = torch.tensor(u), torch.tensor(v)
    both = tiny.dense_updates(merge(ADAPTERS, 0.5 * one + two, "delta"))
    first = tiny.dense_updates(merge(ADAPTERS, one, "delta"))
    second = tiny.dense_updates(merge(ADAPTERS, two, "delta"))
    for name, update in both.items():
        assert torch.allclose(update, 0.5 * first[name] + second[name], atol=2e-6)


@given(WEIGHTS)
@settings(max_examples=25)
def test_factor_is_the_published_rule_even_and_quadratic(weights: list[float]) -> None:
    w = torch.tensor(weights)
    merged, mirrored, half = (
        tiny.dense_updates(merge(ADAPTERS, k * w, "factor")) for k in (1.0, -1.0, 0.5)
    )
    by_hand = tiny.dense_updates(hand_factor([float(x) for x in w]))
    for name, update in merged.items():
        assert torch.allclose(update, by_hand[name], atol=1e-6)
        assert torch.equal(update, mirrored[name])
        assert torch.allclose(half[name], update / 4, atol=1e-6)


def test_factor_has_cross_terms_that_delta_has_not() -> None:
    w = torch.tensor([1.0, 1.0, 0.0])
    name = next(iter(ADAPTERS[0].factors))
    factor, delta = (tiny.dense_updates(merge(ADAPTERS, w, rule))[name] for rule in RULES)
    (a0, b0), (a1, b1) = ADAPTERS[0].factors[name], ADAPTERS[1].factors[name]
    cross = b0.double() @ a1.double() + 2.0 * (b1.double() @ a0.double())
    assert cross.abs().max() > 0.05
    assert torch.allclose(factor - delta, cross, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_layer_weights_act_on_their_own_layer(rule: str) -> None:
    weights = torch.tensor([[1.0, 0.0], [0.3, -0.6], [0.0, 0.9]])
    merged = merge(ADAPTERS, weights, rule)
    by_layer = [merge(ADAPTERS, weights[:, layer], rule) for layer in range(2)]
    assert {layer_of(name) for name in merged.factors} == {0, 1}
    for name, (a, b) in merged.factors.items():
        expected_a, expected_b = by_layer[int(name.split("layers.")[1][0])].factors[name]
        assert torch.equal(a, expected_a) and torch.equal(b, expected_b)


@pytest.mark.parametrize("rule", RULES)
def test_merging_adapters_of_different_ranks(rule: str) -> None:
    small, large = tiny.adapter(BASE, 5, rank=1), tiny.adapter(BASE, 6, rank=4)
    padded = Adapter({name: pad_rank(a, b, 4) for name, (a, b) in small.factors.items()})
    w = torch.tensor([0.8, -0.4])
    expected = tiny.dense_updates(merge([padded, large], w, rule))
    for name, update in tiny.dense_updates(merge([small, large], w, rule)).items():
        assert torch.allclose(update, expected[name], atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_keep_rank_is_the_best_update_of_that_rank_as_large_as_the_whole(rule: str, rank: int) -> None:
    """Against numpy's SVD of the dense update: no other of that rank is nearer (Eckart and Young), before scaling."""
    weights = torch.tensor([0.8, -0.5, 0.4])
    whole, kept = merge(ADAPTERS, weights, rule), merge(ADAPTERS, weights, rule, keep_rank=rank)
    assert kept.rank == min(rank, whole.rank)
    for name, dense in tiny.dense_updates(whole).items():
        left, sizes, right = np.linalg.svd(dense.numpy(), full_matrices=False)
        nearest = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        scaled = nearest * np.linalg.norm(dense.numpy()) / np.linalg.norm(nearest)
        assert np.allclose(tiny.dense_updates(kept)[name].numpy(), scaled, atol=3e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_rank_that_leaves_nothing_out_changes_nothing(rule: str) -> None:
    weights = torch.tensor([0.8, -0.5, 0.4])
    whole = merge(ADAPTERS, weights, rule)
    assert_same(merge(ADAPTERS, weights, rule, keep_rank=whole.rank), whole)
    for update in tiny.dense_updates(merge(ADAPTERS, torch.zeros(3), rule, keep_rank=1)).values():
        assert (update == 0).all()


def test_truncation_of_a_stack_is_that_of_each() -> None:
    stream = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 6, 20, generator=stream), torch.randn(5, 12, 6, generator=stream)
    stacked = truncate(a, b, 2)
    for place in range(5):
        one = truncate(a[place], b[place], 2)
        assert torch.allclose(stacked[1][place] @ stacked[0][place], one[1] @ one[0], atol=1e-5)


def test_merging_does_not_change_the_parts() -> None:
    before = [{name: (a.clone(), b.clone()) for name, (a, b) in x.factors.items()} for x in ADAPTERS]
    for rule in RULES:
        merged = merge(ADAPTERS, torch.tensor([1.0, 0.0, 0.0]), rule)
        for a, b in merged.factors.values():
            a.add_(1), b.add_(1)
    for adapter, copy in zip(ADAPTERS, before, strict=True):
        assert_same(adapter, Adapter(copy))


def test_different_widths_are_named() -> None:
    factors = dict(ADAPTERS[0].factors)
    name, (a, b) = factors.popitem()
    check_widths([ADAPTERS[0], Adapter(factors)])
    with pytest.raises(InputError, match=rf"{name}: adapter 2 is \(63, 64\) wide .*\(64, 64\)"):
        check_widths([ADAPTERS[0], ADAPTERS[1], Adapter(factors | {name: (a[:, 1:], b)})])


@given(st.integers(1, 5), st.integers(0, 4))
@settings(max_examples=15)
def test_padding_the_rank_keeps_the_update(rank: int, more: int) -> None:
    a, b = torch.randn(rank, 6), torch.randn(7, rank)
    wide_a, wide_b = pad_rank(a, b, rank + more)
    assert wide_a.shape == (rank + more, 6) and wide_b.shape == (7, rank + more)
    assert torch.allclose(wide_b @ wide_a, b @ a, atol=1e-6)


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_peft_reads_a_saved_merge(rule: str, tmp_path: Path) -> None:
    merged = merge(ADAPTERS, torch.tensor([0.7, -0.3, 1.2]), rule)
    save_adapter(merged, tmp_path, "some/base", {"sharers": ["u1"], "weights": [0.7]})
    theirs = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    ours = tiny.with_updates(BASE, tiny.dense_updates(merged))
    assert torch.allclose(tiny.logits(theirs, IDS), tiny.logits(ours, IDS), atol=1e-5)
    assert (tiny.logits(theirs, IDS) - tiny.logits(BASE, IDS)).abs().max() > 0.01
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"
    assert_same(load_adapter(tmp_path), merged)
    assert load_adapter(tmp_path).card == {"sharers": ["u1"], "weights": [0.7]}


def test_unequal_ranks_within_an_adapter_are_saved_at_one_rank(tmp_path: Path) -> None:
    merged = merge(ADAPTERS, torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.9]]), "delta")
    assert {a.shape[0] for a, _ in merged.factors.values()} == {4, 8}
    save_adapter(merged, tmp_path, "base")
    theirs = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    ours = tiny.with_updates(BASE, tiny.dense_updates(merged))
    assert torch.allclose(tiny.logits(theirs, IDS), tiny.logits(ours, IDS), atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_is_read_with_its_scale(rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=list(tiny.TARGETS))
    theirs = get_peft_model(tiny.model(), config)
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.15)
    theirs.eval().save_pretrained(tmp_path)
    own = load_adapter(tmp_path)
    assert own.scale == pytest.approx(3.0 if rslora else 1.5)
    ours = tiny.with_updates(BASE, tiny.dense_updates(own))
    assert torch.allclose(tiny.logits(theirs, IDS), tiny.logits(ours, IDS), atol=1e-5)


def test_a_scaled_adapter_survives_the_file(tmp_path: Path) -> None:
    save_adapter(ADAPTERS[2], tmp_path / "new" / "folder", "base")
    own = load_adapter(tmp_path / "new" / "folder")
    assert_same(own, ADAPTERS[2])
    assert own.scale == ADAPTERS[2].scale == 0.5
    assert not list((tmp_path / "new" / "folder").glob("*.tmp"))


def test_the_announcements_checkpoint_path_means_its_folder(tmp_path: Path) -> None:
    save_adapter(ADAPTERS[0], tmp_path, "base")
    assert adapter_dir(tmp_path / "lora_ckpt.pt") == tmp_path
    assert_same(load_adapter(tmp_path / "lora_ckpt.pt"), ADAPTERS[0])


def test_no_adapter_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no adapter there"):
        load_adapter(tmp_path / "sub" / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type LORA"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern: q_proj is '2'"),
        ({"rank_pattern": [2]}, "rank_pattern is .*expected an object"),
        ({"alpha_pattern": {"(a+)+q_proj": 2}}, "alpha_pattern: .*regular expression"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_a_config_that_is_not_plain_lora_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    save_adapter(ADAPTERS[0], tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message) as error:
        load_adapter(tmp_path)
    assert "adapter_config.json" in str(error.value)


def broken(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = sorted(key for key in tensors if "lora_A" in key)[0]
    if how == "unpaired":
        return {name: value for name, value in tensors.items() if name != key}
    if how == "unknown":
        return tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}
    if how == "misshapen":
        return tensors | {key: torch.zeros(3, 64)}
    if how == "nan":
        return tensors | {key: torch.full((4, 64), float("nan"))}
    return {}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unpaired", "layers.0.self_attn.k_proj has only lora_B"),
        ("unknown", "unexpected tensor base_model.model.lm_head.weight"),
        ("misshapen", r"k_proj: lora_A \(3, 64\) and lora_B \(32, 4\) do not fit"),
        ("nan", "k_proj.lora_A.weight holds values that are not finite"),
        ("empty", "holds no LoRA tensors"),
    ],
)
def test_broken_tensors_are_named(how: str, message: str, tmp_path: Path) -> None:
    save_adapter(ADAPTERS[0], tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    save_file(broken(load_file(file), how), file)
    with pytest.raises(InputError, match=message) as error:
        load_adapter(tmp_path)
    assert str(file) in str(error.value)


def test_a_rank_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    """PEFT refuses such a file; its scale would be wrong."""
    save_adapter(ADAPTERS[0], tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(InputError, match="rank|r is 8|lora_A"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a tensor file", None])
def test_an_unreadable_tensor_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    save_adapter(ADAPTERS[0], tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(InputError, match="adapter_model.safetensors: (not a readable safetensors file|No such file)"):
        load_adapter(tmp_path)
