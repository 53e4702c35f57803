"""Private training: per-item gradients against micro-batches of one, accounting against Opacus and a formula."""
import math
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import world
from scipy.integrate import quad
from scipy.stats import kstest, norm
from test_train import LEARNERS, SETTINGS, alone, assert_close, bank_for
from torch import Tensor

from prime.bank.accounting import auroc_bound, sigma_for, spent_epsilon
from prime.bank.bank import AdapterBank
from prime.bank.dp import Mechanism, Terms, terms_of
from prime.bank.encoding import EncodedRecord
from prime.bank.lora import Adapter
from prime.bank.passes import Passes, TrainRow, row_losses
from prime.bank.secret import load_key
from prime.bank.train import Learner, _accumulate_clipped, train
from prime.checkpoints.loading import load_model
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.errors import InputError
from prime.merging.anchors import ANCHOR_IDX
from prime.merging.gates import Gates
from prime.merging.sharers import adapter_folder
from prime.runs.run import read_results
from prime.settings import PrivacySettings, TrainingSettings
from prime.users.data import User
from prime.users.prompts import history_records
from prime.users.tasks import get_task
from tests import tiny

KEY = bytes(range(32))
ONE_LENGTH = [EncodedRecord(f"r{i}", tiny.text_ids(70 + i, 3, 12), (5 + i, 9, 2)) for i in range(6)]


def mechanism(sigma: float = 0.0, max_norm: float = math.inf, n: int = 6, rate: float = 1.0, steps: int = 4):
    return Mechanism(sigma, max_norm, n, rate, steps, KEY)


def private(learner: Learner, **changes: float) -> Learner:
    """With a key of its own, as `Terms` give one."""
    chosen = mechanism(n=len(learner.records), **changes)
    return replace(learner, mechanism=replace(chosen, key=bytes([learner.seed]) * 32))


# -- gradients ------------------------------------------------------------------------------------------------------


def trained_bank() -> AdapterBank:
    """Three adapters whose B is not zero, so that A has a gradient, too."""
    bank = bank_for(LEARNERS)
    for b in bank.parameters()[1::2]:
        b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return bank


def gated() -> tuple[AdapterBank, Gates]:
    bank = AdapterBank(tiny.model())
    bank.load([tiny.adapter(tiny.model(), seed) for seed in range(3)])
    gates = Gates.zeros(bank)
    for stack in gates.stacks:
        stack.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    return bank, gates


def some_rows() -> list[TrainRow]:
    """Records of all learners, neighbours of different length."""
    return [
        TrainRow(i, learner.slot, number, 7 + number, record)
        for i, learner in enumerate(LEARNERS)
        for number, record in enumerate(learner.records[:4])
    ]


def one_at_a_time(passes: Passes, rows: Sequence[TrainRow]) -> list[list[Tensor]]:
    """Each row's gradient of its mean token loss in a pass of its own: [rows][tensors]."""
    found = []
    for row in rows:
        for stack in passes.trained:
            stack.grad = None
        loss = row_losses(passes.bank, [row], passes.dropout, passes.scalers).sum() / len(row.record.target)
        loss.backward()
        found.append([stack.grad[row.slot].clone() for stack in passes.trained])
    return found


def gathered(passes: Passes, rows: list[TrainRow], monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Each row's gradient as the joint pass has it before clipping, in the order of the rows."""
    seen: list[list[Tensor]] = []

    def keep(sums: list[Tensor], grads: list[Tensor], places: list[int], limits: list[float]) -> None:
        seen.extend([grad[j].clone() for grad in grads] for j in range(len(places)))

    monkeypatch.setattr("prime.bank.train.add_clipped", keep)
    _accumulate_clipped(passes, rows, [mechanism()] * len(LEARNERS))
    order = [row for part in passes.parts(rows) for row in part]
    return [seen[order.index(row)] for row in rows]


@pytest.mark.parametrize("what", ["factors", "gates"])
@pytest.mark.parametrize("budget", [40, 10_000])
def test_per_item_gradients_are_those_of_one_item_at_a_time(
    what: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "factors":
        bank = trained_bank()
        passes = Passes(bank, 0.2, budget, None, bank.parameters())
    else:
        bank, gates = gated()
        passes = Passes(bank, 0.2, budget, gates.scaler, gates.stacks)
    before = [stack.detach().clone() for stack in bank.stacks()]
    rows = some_rows()
    expected = one_at_a_time(passes, rows)
    found = gathered(passes, rows, monkeypatch)
    assert len(found) == len(expected) == 10
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) == (16 if what == "factors" else 8)
        for grad, oracle in zip(ours, theirs, strict=True):
            assert oracle.abs().max() > 1e-4
            assert torch.allclose(grad, oracle, atol=1e-5)
    for stack, old in zip(bank.stacks(), before, strict=True):  # they are put back as they were
        assert torch.equal(stack, old)


def test_what_is_summed_is_clipped_item_by_item() -> None:
    bank = trained_bank()
    passes = Passes(bank, 0.0, 60, None, bank.parameters())
    rows = some_rows()
    own = one_at_a_time(passes, rows)
    norms = [math.sqrt(sum(float(grad.square().sum()) for grad in grads)) for grads in own]
    limits = [sorted(norms)[5], 1e9, sorted(norms)[2]]  # some learners' items are clipped, some are not
    _accumulate_clipped(passes, rows, [mechanism(max_norm=limit) for limit in limits])
    assert {row.learner for row, size in zip(rows, norms, strict=True) if size > limits[row.learner]} == {0, 2}
    for number, stack in enumerate(passes.trained):
        expected = torch.zeros_like(stack)
        for row, grads, size in zip(rows, own, norms, strict=True):
            expected[row.slot] += grads[number] * min(1.0, limits[row.learner] / size)
        assert torch.allclose(stack.grad, expected, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_item_more_moves_the_sum_by_the_clip_norm_at_most(checkpointing: bool) -> None:
    """What the accountant counts on, with dropout, padding and micro-batches; the longest item is the one more."""
    settings = replace(SETTINGS, lora_dropout=0.3, gradient_checkpointing=checkpointing)
    items = sorted(tiny.records(7, 4), key=lambda record: len(record.ids) + len(record.target))
    limit = 0.02  # below every item's norm, so that each weighs it
    with tiny.noted_gradients() as means:
        for given in (items, items[:-1]):
            learner = private(replace(LEARNERS[0], records=given), max_norm=limit, steps=1)
            train(trained_bank(), [learner], settings, max_batch_tokens=40)
    squares = [float((7 * of_7 - 6 * of_6).square().sum()) for of_7, of_6 in zip(*means, strict=True)]
    difference = math.sqrt(sum(squares))
    assert difference == pytest.approx(limit, rel=1e-3)


def test_without_quoting_an_item_is_in_its_own_record_only() -> None:
    task = get_task("movie_tagging")
    items = tuple({"id": str(i), "description": f"a film number {i}", "tag": "comedy"} for i in range(6))
    for left_out in range(6):
        others = tuple(item for item in items if item["id"] != str(left_out))
        whole, rest = (
            history_records(User("u", own), task, task.templates, "likes films", quoting=False)
            for own in (items, others)
        )
        assert [record for record in whole if record.id != f"uu-{left_out}"] == rest
        assert len(whole) == 6


# -- training -------------------------------------------------------------------------------------------------------


def test_without_noise_and_clipping_full_batches_are_plain_training() -> None:
    """Compared: the same batches (all items each step), targets of one length (else the means over tokens differ)."""
    learner = Learner(0, "user", 3, ONE_LENGTH)
    settings = replace(SETTINGS, batch_size=6, epochs=4, clip=1e9)
    plain, losses = alone(learner, settings)
    found, own = alone(private(learner, steps=4), settings)
    assert own == pytest.approx(losses, abs=1e-4) and len(own) == 4 and losses[0] - losses[-1] > 0.05
    assert_close(found.adapter(0).factors, plain.adapter(0).factors, atol=5e-4)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_private_training_together_is_private_training_alone(sigma: float) -> None:
    settings = replace(SETTINGS, lora_dropout=0.1, lr=1e-3)
    learners = [private(one, sigma=sigma, max_norm=0.5, rate=0.4, steps=4) for one in LEARNERS]
    bank = bank_for(learners)
    together = train(bank, learners, settings, max_batch_tokens=50)
    for learner in learners:
        own, losses = alone_private(learner, settings)
        assert [loss is None for loss in together[learner.slot]] == [loss is None for loss in losses]
        given = [loss for loss in together[learner.slot] if loss is not None]
        assert given == pytest.approx([loss for loss in losses if loss is not None], abs=1e-4)
        assert_close(bank.adapter(learner.slot).factors, own.adapter(0).factors, atol=5e-4)


def alone_private(learner: Learner, settings: TrainingSettings) -> tuple[AdapterBank, list[float | None]]:
    bank = bank_for([learner])
    return bank, train(bank, [replace(learner, slot=0)], settings)[0]


def test_gates_train_privately_together_as_alone() -> None:
    settings = replace(SETTINGS, lr=1e-2)
    learners = [private(one, sigma=0.5, max_norm=0.5, rate=0.5, steps=3) for one in LEARNERS]
    bank, gates = gated()
    train(bank, learners, settings, 50, None, gates.stacks, gates.scaler)
    one, own = gated()
    train(one, [learners[1]], settings, 0, None, own.stacks, own.scaler)
    start = gated()[1]
    for ours, theirs, first in zip(gates.stacks, own.stacks, start.stacks, strict=True):
        assert torch.allclose(ours[1], theirs[1], atol=5e-4)
        assert (ours[1] - first[1]).abs().max() > 1e-3


def test_a_step_without_items_is_noise_alone() -> None:
    learner = private(LEARNERS[0], sigma=2.0, max_norm=0.5, rate=1e-9, steps=2)
    chosen = learner.mechanism
    assert chosen.batches(learner.records) == [[], []]
    bank = bank_for([learner])
    before = bank.adapter(0)
    with tiny.noted_gradients() as noted:
        assert train(bank, [learner], SETTINGS) == [[None, None]]
    for step, grads in enumerate(noted):
        for number, grad in enumerate(grads):
            expected = chosen.noise(step, number, grad.shape[1:]) / (1e-9 * len(learner.records))
            assert torch.equal(grad[0], expected) and grad.abs().max() > 0
    for name, (a, b) in bank.adapter(0).factors.items():
        assert not torch.equal(a, before.factors[name][0]) and not torch.equal(b, before.factors[name][1])


def test_private_and_plain_learners_do_not_mix() -> None:
    with pytest.raises(ValueError, match="cannot be trained together"):
        train(bank_for(LEARNERS[:2]), [private(LEARNERS[0]), LEARNERS[1]], SETTINGS)


def test_an_items_dropout_does_not_depend_on_who_else_is_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one item more would change the others' gradients, beyond what clipping bounds."""
    rows: list[TrainRow] = []

    def keep(passes: Passes, own: list[TrainRow], mechanisms: list[Mechanism]) -> list[float]:
        rows.extend(own)
        return _accumulate_clipped(passes, own, mechanisms)

    monkeypatch.setattr("prime.bank.train._accumulate_clipped", keep)
    for given in (tiny.records(5, 0), tiny.records(5, 0)[1:]):
        train(bank_for(LEARNERS[:1]), [private(replace(LEARNERS[0], records=given), steps=1)], SETTINGS)
    assert len(rows) == 9 and len({(row.record.id, row.noise) for row in rows}) == 5


# -- randomness -----------------------------------------------------------------------------------------------------


def test_poisson_sampling_takes_every_item_on_its_own() -> None:
    n, rate, steps = 40, 0.15, 3000
    batches = mechanism(n=n, rate=rate, steps=steps).batches(range(n))
    taken = np.zeros((steps, n))
    for step, batch in enumerate(batches):
        taken[step, batch] = 1
    by_item, sizes = taken.mean(0), taken.sum(1)
    sd = math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(by_item - rate).max() < 5 * sd
    assert sizes.mean() == pytest.approx(rate * n, abs=5 * math.sqrt(n * rate * (1 - rate) / steps))
    assert sizes.var() == pytest.approx(n * rate * (1 - rate), rel=0.15)  # a fixed size would have none
    assert (sizes == 0).mean() == pytest.approx((1 - rate) ** n, abs=0.003)
    pairs = np.corrcoef(taken.T)[np.triu_indices(n, 1)]
    assert np.abs(pairs).max() < 6 / math.sqrt(steps)
    assert mechanism(n=n, rate=1.0).batches(range(n)) == [list(range(n))] * 4


def test_noise_is_gaussian_of_the_right_size_and_its_own_for_each_tensor_and_step() -> None:
    chosen = mechanism(sigma=1.5, max_norm=0.2)
    draws = chosen.noise(3, 2, (200, 250))
    assert draws.shape == (200, 250) and draws.dtype == torch.float32
    assert kstest(draws.flatten().numpy() / 0.3, norm.cdf).pvalue > 1e-3
    assert torch.equal(draws, chosen.noise(3, 2, (200, 250)))
    for other in (chosen.noise(3, 3, (200, 250)), chosen.noise(4, 2, (200, 250))):
        assert abs(np.corrcoef(draws.flatten(), other.flatten())[0, 1]) < 5 / math.sqrt(50_000)
    another = replace(chosen, key=KEY[::-1]).noise(3, 2, (200, 250))
    assert abs(np.corrcoef(draws.flatten(), another.flatten())[0, 1]) < 5 / math.sqrt(50_000)


def terms(folder: Path, **changes: object) -> Terms:
    settings = {
        "epsilon": None, "sigma": 1.0, "delta": 1e-5, "max_norm": 1.0, "accountant": "rdp",
        "key_file": folder / "noise.key", "settings": "{}",
    }  # fmt: skip
    return Terms(**(settings | changes))  # type: ignore[arg-type]


def test_other_records_options_or_learners_draw_other_noise(tmp_path: Path) -> None:
    def key(seed: int = 1, given: Sequence[EncodedRecord] = ONE_LENGTH, **changes: object) -> bytes:
        return terms(tmp_path, **changes).mechanism("u", seed, given, 3, 2).key

    first = key()
    assert first == key()
    others = [key(2), key(given=ONE_LENGTH[1:]), key(settings='{"sigma": 2}'), key(key_file=tmp_path / "other.key")]
    assert len({first, *others}) == 5


def test_the_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "noise.key"
    key = load_key(path)
    assert len(key) == 32 and load_key(path) == key and load_key(tmp_path / "second.key") != key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["noise.key"]
    path.write_text("abc\n")
    with pytest.raises(InputError, match="noise.key: not a noise key"):
        load_key(path)


# -- accounting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.1, 0.12, 42), (3.0, 0.2, 20), (5.0, 1.0, 15)])
def test_epsilon_is_what_opacus_counts_step_by_step(accountant: str, sigma: float, rate: float, steps: int) -> None:
    from opacus.accountants import create_accountant

    counted = create_accountant(mechanism=accountant)
    for _ in range(steps):
        counted.step(noise_multiplier=sigma, sample_rate=rate)
    found = spent_epsilon([(sigma, rate, steps)], 1e-5, accountant)
    assert found == pytest.approx(counted.get_epsilon(delta=1e-5), abs=1e-9) and 0.5 < found < 20


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """Without sampling: the analytic Gaussian mechanism (Balle and Wang, 2018), steps composed to one."""
    mu = math.sqrt(steps) / sigma
    low, high = 0.0, 100.0
    while high - low > 1e-7:
        eps = (low + high) / 2
        spent = norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)
        low, high = (eps, high) if spent > delta else (low, eps)
    return high


@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 3), (5.0, 15), (15.0, 15)])
def test_epsilon_bounds_the_exact_one_where_that_is_known(sigma: float, steps: int) -> None:
    exact = gaussian_epsilon(sigma, steps, 1e-5)
    history = [(sigma, 1.0, steps)]
    assert exact <= spent_epsilon(history, 1e-5, "prv") <= exact + 0.02
    assert exact <= spent_epsilon(history, 1e-5, "rdp") <= 1.15 * exact


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(0.7, 0.12, 42), (1.5, 0.2, 20), (8.0, 1.0, 15)])
def test_sigma_keeps_to_epsilon_and_spends_it(epsilon: float, rate: float, steps: int) -> None:
    sigma = sigma_for(epsilon, 1e-5, rate, steps, "rdp")
    assert epsilon - 0.01 <= spent_epsilon([(sigma, rate, steps)], 1e-5, "rdp") <= epsilon


@pytest.mark.parametrize(("sigma", "bound"), [(2.0, 0.868), (3.7, 0.727), (12.8, 0.569)])
def test_no_attack_on_full_batches_has_a_larger_auroc_than_the_gaussian_one(sigma: float, bound: float) -> None:
    """The best attack tells N(0, 1) from N(mu, 1) (Neyman and Pearson); the area under its ROC curve, summed up."""
    mu = math.sqrt(10) / sigma
    area, _ = quad(lambda fpr: norm.sf(norm.isf(fpr) - mu), 0, 1)
    found = auroc_bound((sigma, 1.0, 10), 50.0, 1e-5)
    assert found == pytest.approx(area, abs=1e-6) and found == pytest.approx(bound, abs=5e-4)
    assert auroc_bound((sigma, 0.5, 10), 1.0, 0.0) == pytest.approx(math.e / (1 + math.e))  # of epsilon alone
    assert auroc_bound((sigma, 1.0, 10), 0.1, 0.0) <= 1 / (1 + math.exp(-0.1))


def test_terms_make_the_mechanism_and_its_report(tmp_path: Path) -> None:
    asked = terms(tmp_path, epsilon=0.7, sigma=None)
    chosen = asked.mechanism("anchor 7", 1, tiny.records(20, 1), 6, 3)
    assert (chosen.n, chosen.rate, chosen.steps) == (20, 0.3, 10) and chosen.size == pytest.approx(6)
    report = asked.report(chosen)
    assert 0.69 <= report["epsilon"] <= 0.7 and report["sigma"] == chosen.sigma
    assert report["unit"] == "history item, there or blank; the number of items is public"
    assert report["auroc_at_most"] == auroc_bound(chosen.spends, report["epsilon"], 1e-5)
    asked = terms(tmp_path)
    assert asked.mechanism("u", 1, tiny.records(20, 1), 6, 3, max_step=4).steps == 4
    few = asked.mechanism("u", 1, tiny.records(4, 1), 6, 3)
    assert (few.rate, few.steps) == (1.0, 3)


def test_two_trainings_on_the_same_items_spend_more_than_one_and_no_more_than_their_sum(tmp_path: Path) -> None:
    asked = terms(tmp_path, sigma=2.0)
    chosen = asked.mechanism("u", 1, tiny.records(20, 1), 6, 3)
    alone_, both = asked.report(chosen), asked.together(chosen, asked.report(chosen))
    assert alone_["epsilon"] < both["epsilon_with_adapter"] < 2 * alone_["epsilon"]
    assert asked.together(chosen, None) == {"epsilon_with_adapter": None}


def test_impossible_terms_name_the_learner(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"anchor 7: --delta 0.1 is no guarantee for 20 items"):
        terms(tmp_path, delta=0.1).mechanism("anchor 7", 1, tiny.records(20, 1), 6, 3)
    with pytest.raises(InputError, match=r"anchor 7: no noise keeps to --epsilon 0.01 .*--accountant rdp"):
        terms(tmp_path, epsilon=0.01, sigma=None).mechanism("anchor 7", 1, tiny.records(20, 1), 6, 3)


def test_a_budget_that_would_not_fit_into_memory_is_refused() -> None:
    assert spent_epsilon([(0.01, 1.0, 20)], 1e-5, "rdp") > 1e5
    for count in (lambda: spent_epsilon([(0.01, 1.0, 20)], 1e-5, "prv"), lambda: sigma_for(1e4, 1e-5, 1.0, 20, "prv")):
        with pytest.raises(InputError, match="--accountant prv counts budgets up to epsilon 200"):
            count()


def options(**changes: Any) -> PrivacySettings:
    return PrivacySettings(**({"enable_dp": True} | changes))


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for changes, told in (
        ({}, "none is given"),
        ({"epsilon": 1.0, "sigma": 1.0}, "both are given"),
        ({"enable_dp": False, "epsilon": 1.0}, "--epsilon does nothing without --enable_dp"),
        ({"enable_dp": False, "noise_key": "k"}, "--noise_key does nothing without --enable_dp"),
    ):
        with pytest.raises(InputError, match=told):
            terms_of(options(**changes), tmp_path, {})
    assert terms_of(options(enable_dp=False), tmp_path, {}) is None
    assert terms_of(options(sigma=1.0), tmp_path, {}).key_file == tmp_path / "noise.key"
    assert not list(tmp_path.iterdir())


# -- stages ---------------------------------------------------------------------------------------------------------

MODEL = ["--task_name", "movie_tagging", "--llama_model_path", world.CHECKPOINT, "--lora_ckpt", "task"]
LORA = ["train_anchor_peft.py", *MODEL, "--user_idxs", "0-2", "--train_gen_len", "8", "--lr", "1e-2"]
GATE = ["train_anchor_gate.py", *MODEL, "--user_idxs", "0-2", "--anchor_path"]
DP = ["--enable_dp", "--epsilon", "4"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a task adapter that changes nothing, and four anchors."""
    folder = tmp_path_factory.mktemp("private")
    world.build(folder, anchors=4)
    base = load_model(str(folder / world.CHECKPOINT))
    modules = tiny.targets_of(base)
    nothing = {n: (torch.zeros(1, m.in_features), torch.zeros(m.out_features, 1)) for n, m in modules.items()}
    save_adapter(Adapter(nothing), folder / "task", world.CHECKPOINT)
    (folder / "anchor_selection" / "movie_tagging").mkdir(parents=True)
    torch.save(torch.tensor([0, 1, 2, 3]), folder / "anchor_selection" / "movie_tagging" / ANCHOR_IDX)
    return folder


def result(folder: str, index: int) -> dict:
    return read_results(folder)[index]


@pytest.mark.slow
def test_stages_under_privacy_write_the_guarantee_and_nothing_exact_into_the_card(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    world.run([*LORA, *DP, "--output_dir", "lora"])
    found = result("lora", 0)
    assert len(found["record_ids"]) == 12 and not any("-k1-p" in name for name in found["record_ids"])
    told = found["privacy"]
    assert 3.99 <= told["epsilon"] <= 4 and told["sample_rate"] == 0.5 and told["steps"] == 6 and told["delta"] == 1e-5
    card = world.read(adapter_folder("lora", found["user_id"]) / "card.json")
    assert card["privacy"] == told and "scores_on_history" not in card and "losses" not in card

    world.run([*GATE, "lora", *DP, "--max_step", "3", "--output_dir", "gate"])
    gate = result("gate", 0)
    assert gate["record_ids"] == found["record_ids"] and gate["privacy"]["steps"] == 3
    assert 4 < gate["privacy"]["epsilon_with_adapter"] < 8
    (here / "noise.key").write_bytes((here / "lora" / "noise.key").read_bytes())
    again = [*LORA, *DP, "--noise_key", "noise.key", "--output_dir"]
    world.run([*again, "again"])
    world.run([*again, "otherwise", "--anchors_per_batch", "1"])  # another option, so other noise
    for index in (0, 1):
        folders = [adapter_folder(run, result(run, index)["user_id"]) for run in ("lora", "again", "otherwise")]
        one, same, other = (load_adapter(folder).factors for folder in folders)
        for name, (a, b) in one.items():
            assert torch.equal(a, same[name][0]) and torch.equal(b, same[name][1]) and b.abs().max() > 5e-3
            assert not torch.allclose(b, other[name][1], atol=1e-3)
