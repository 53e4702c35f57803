"""What a deployed file gives away to whoever takes it apart, as merged and in its release form."""

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from scipy.stats import kurtosis
from sklearn.decomposition import FastICA

from prime.attack.pieces import KINDS, WHOLE, Known, cosine, pieces_of
from prime.bank.bank import AdapterBank
from prime.bank.initial import initial_a
from prime.bank.lora import RULES, Adapter, merge, refactored
from prime.checkpoints.peft import save_adapter
from prime.settings import SHARERS

BASE = tiny.model()
NAMES, WEIGHTS = ("a", "b", "c"), torch.tensor([0.5, -0.3, 0.2])
MODULES = tiny.targets_of(BASE)


def sharer(name: str, seed: int | bytes, moved: float = 0.1, rank: int = 4) -> Adapter:
    """As training leaves an adapter: A has moved by a part of its size, B away from zero."""
    stream = torch.Generator().manual_seed(sum(name.encode()))
    factors = {}
    for module, linear in MODULES.items():
        a = initial_a(seed, module, rank, linear.in_features)
        a = a + moved * a.std() * torch.randn(a.shape, generator=stream)
        factors[module] = (a, torch.randn(linear.out_features, rank, generator=stream) * 0.1)
    return Adapter(factors)


def pool(secret: bool = False, shared: bool = False) -> dict[str, Adapter]:
    """Three sharers whose initial A are of public seeds, of a secret key, or one and frozen."""
    made = {}
    for place, name in enumerate(NAMES):
        seed: int | bytes = name.encode() * 32 if secret else (7 if shared else place)
        made[name] = sharer(name, seed, 0.0 if shared else 0.1)
    return made


def initial(name: str) -> dict[str, torch.Tensor]:
    """As an attacker draws it, who knows the seed."""
    return {module: initial_a(NAMES.index(name), module, 4, linear.in_features) for module, linear in MODULES.items()}


def recovered(file: Adapter, own: dict[str, Adapter], **more) -> dict[str, list[float]]:
    """By kind the cosine of each sharer's piece with his own update."""
    found = pieces_of(file, Known(own, initial, **more))
    return {kind: [abs(cosine(piece, own[name])) for name, piece in by_name.items()] for kind, by_name in found.items()}


def released(own: dict[str, Adapter], weights: torch.Tensor = WEIGHTS) -> Adapter:
    """Stage 4 with `--deploy_rank sharers`."""
    return refactored(merge(list(own.values()), weights, "delta", keep_rank=SHARERS))


def test_a_file_as_merged_is_its_sharers_and_the_release_form_gives_no_more_than_the_merge() -> None:
    own = pool(secret=True)
    others = {"a": own["a"], "d": sharer("d", b"d" * 32), "e": sharer("e", b"e" * 32)}
    as_merged = recovered(merge(list(own.values()), WEIGHTS, "delta"), own)
    assert as_merged["blocks"] == pytest.approx([1.0] * 3, abs=1e-6)  # the leak
    found = recovered(released(own), own, together=lambda name: released(others) if name == "a" else None)
    assert "blocks" not in found and len(found["together"]) == 1
    for kind in ("directions", "initial", "together"):
        pairs = zip(found[kind], found[WHOLE], strict=False)
        assert all(piece <= whole + 0.02 for piece, whole in pairs), kind


def test_at_full_rank_a_public_seed_or_a_second_file_finds_a_sharer() -> None:
    """The update's rows are the span of all sharers' rows: who knows where one of them began, or has two files with
    his part, finds him, and so does who has all other sharers' adapters.
    """
    public, secret = pool(), pool(secret=True)
    known = recovered(refactored(merge(list(public.values()), WEIGHTS, "delta")), public)
    whole = refactored(merge(list(secret.values()), WEIGHTS, "delta"))
    others = {"a": secret["a"], "d": sharer("d", b"d" * 32), "e": sharer("e", b"e" * 32)}
    other = refactored(merge(list(others.values()), WEIGHTS, "delta"))
    hidden = recovered(whole, secret, together=lambda name: other if name == "a" else None)
    assert min(known["initial"]) > 0.75 and known["initial"][2] > known[WHOLE][2] + 0.3
    assert (np.array(hidden["initial"]) <= np.array(hidden[WHOLE]) + 0.05).all()
    assert hidden["together"][0] > hidden[WHOLE][0] + 0.05 and min(hidden["others"]) > 0.8


def test_with_one_frozen_a_merges_add_up_at_its_rank_and_no_rows_tell_anybody_apart() -> None:
    own = pool(shared=True)
    file = refactored(merge(list(own.values()), WEIGHTS, "delta"))
    assert file.rank == 4
    other = refactored(merge([own["a"], own["c"]], torch.tensor([0.9, 0.1]), "delta"))
    found = recovered(file, own, together=lambda _: other)
    for kind in ("together", "initial"):
        assert (np.array(found[kind]) <= np.array(found[WHOLE]) + 0.02).all()
    assert min(found["others"]) > 0.8  # only noise helps against all other sharers together


@pytest.mark.parametrize("rule", RULES)
def test_the_release_form_is_a_function_of_the_update_alone(rule: str) -> None:
    merged = merge(list(pool().values()), WEIGHTS, rule)
    stream = torch.Generator().manual_seed(0)
    turned = {}
    for module, (a, b) in merged.factors.items():
        turn = torch.linalg.qr(torch.randn(len(a), len(a), generator=stream))[0]
        turned[module] = (turn @ a, b @ turn.T)
    one, two = refactored(merged), refactored(Adapter(turned))
    for module, update in tiny.dense_updates(merged).items():
        assert torch.allclose(tiny.dense_updates(one)[module], update, atol=1e-6)
        for mine, theirs in zip(one.factors[module], two.factors[module], strict=True):
            assert torch.allclose(mine, theirs, atol=1e-4)


def test_an_update_of_nothing_and_one_that_is_scaled() -> None:
    zero = Adapter({name: (a, 0 * b) for name, (a, b) in tiny.adapter(BASE, 0).factors.items()})
    assert refactored(zero).rank == 1 and not any(b.any() for _, b in refactored(zero).factors.values())
    scaled = tiny.adapter(BASE, 0, scale=2.0)
    for module, update in tiny.dense_updates(scaled).items():
        assert torch.allclose(tiny.dense_updates(refactored(scaled))[module], update, atol=1e-5)


def test_what_is_released_answers_as_what_was_evaluated(tmp_path) -> None:
    """PEFT on the saved file, and the bank's candidate of the same weights."""
    own, ids = list(pool().values()), tiny.ids(2, 9)
    save_adapter(refactored(merge(own, WEIGHTS, "delta", keep_rank=SHARERS)), tmp_path, "base")
    theirs = tiny.logits(PeftModel.from_pretrained(tiny.model(), tmp_path).eval(), ids)
    bank = AdapterBank(tiny.model())
    bank.load(own)
    bank.combine(WEIGHTS[None], "delta", SHARERS)
    with bank.routed([0, 0]):
        assert torch.allclose(tiny.logits(bank.model, ids), theirs, atol=1e-5)


@pytest.mark.parametrize("secret", [False, True])
def test_a_secret_initial_a_is_gaussian_so_that_no_independent_components_show_it(secret: bool) -> None:
    """The rows of a wide merge are sums of the sharers' rows; uniform ones are found again from the sums alone."""
    rows = torch.cat([initial_a(bytes([seed]) * 32 if secret else seed, "m", 4, 4096) for seed in range(3)]).numpy()
    assert rows.std() == pytest.approx(1 / np.sqrt(3 * 4096), rel=0.02)
    assert np.abs(kurtosis(rows, axis=1)).mean() == pytest.approx(0.05 if secret else 1.2, abs=0.1)
    mixed = np.linalg.svd(rows, full_matrices=False)[2]
    parts = FastICA(whiten="unit-variance", random_state=0, max_iter=400).fit_transform(mixed.T * 64).T
    best = np.abs(np.corrcoef(rows, parts)[:12, 12:]).max(axis=1)
    assert (best > 0.95).all() if not secret else best.mean() < 0.8


def test_kinds_are_all_of_the_table() -> None:
    import prime.attack.pieces as pieces

    assert all(f"| `{kind}`" in (pieces.__doc__ or "") for kind in KINDS)
