"""Joint training against PEFT with torch's own AdamW, clipping and schedule; neighbours change nothing."""
import math
from dataclasses import replace

import pytest
import torch

from prime.bank.bank import AdapterBank
from prime.bank.encoding import EncodedRecord
from prime.bank.passes import TrainRow, dropout_scaler
from prime.bank.train import BETAS, Learner, clip_by_adapter, cosine_lr, train
from prime.errors import InputError
from prime.settings import TrainingSettings
from tests import tiny

SETTINGS = TrainingSettings(lr=5e-3, clip=0.3, batch_size=3, epochs=2, lora_dropout=0.0)


LEARNERS = [Learner(place, f"user {place}", 10 + place, tiny.records(n, place)) for place, n in enumerate((5, 9, 2))]


def bank_for(learners: list[Learner]) -> AdapterBank:
    bank = AdapterBank(tiny.model())
    bank.allocate([learner.seed for learner in learners], rank=4, alpha=8)
    return bank


def alone(learner: Learner, settings: TrainingSettings) -> tuple[AdapterBank, list[float]]:
    bank = bank_for([learner])
    return bank, train(bank, [replace(learner, slot=0)], settings)[0]


def assert_close(one: dict, other: dict, atol: float) -> None:
    for name, (a, b) in one.items():
        assert torch.allclose(a, other[name][0], atol=atol) and torch.allclose(b, other[name][1], atol=atol)


# -- PEFT -----------------------------------------------------------------------------------------------------------


def peft_training(
    start: AdapterBank, learner: Learner, settings: TrainingSettings
) -> tuple[list, list, torch.nn.Module]:
    """Losses and gradient norms of each step, and the trained model, from the bank's own initial A."""
    model = tiny.peft_model(tiny.model(), start.adapter(0))
    model.requires_grad_(False)
    own = [p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name]
    plan = learner.batches(settings)
    optimizer = torch.optim.AdamW(own, lr=settings.lr, betas=BETAS, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(plan), eta_min=settings.min_lr)
    losses, norms = [], []
    for batch in plan:
        optimizer.zero_grad()
        loss = tiny.textbook_loss(model, batch)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(own, settings.clip)))
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, norms, model


@pytest.mark.parametrize("changes", [{}, {"min_lr": 1e-3, "weight_decay": 0.2, "clip": 1.0}, {"clip": 1e9}])
def test_it_trains_as_peft_does(changes: dict) -> None:
    settings = replace(SETTINGS, **changes)
    learner = LEARNERS[1]
    expected, norms, model = peft_training(bank_for([learner]), learner, settings)
    bank, found = alone(learner, settings)
    assert len(found) == len(expected) == 6
    assert found[:5] == pytest.approx(expected[:5], abs=1e-4)
    assert found == pytest.approx(expected, abs=5e-4)
    clipped = sum(norm > settings.clip for norm in norms)
    assert clipped > 0 or settings.clip > 10  # so that clipping is part of what is compared
    ids = tiny.ids(2, 9)
    with bank.routed([0]):
        ours = tiny.logits(bank.model, ids)
    assert (ours - tiny.logits(tiny.model(), ids)).abs().max() > 0.02
    assert torch.allclose(ours, tiny.logits(model.eval(), ids), atol=2e-3)


def test_first_gradients_are_pefts() -> None:
    """B's gradient is checked directly: Adam would hide a wrong scale of it."""
    batch = LEARNERS[1].records[:4]
    bank = bank_for([LEARNERS[1]])
    for b in bank.parameters()[1::2]:
        b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))  # so that A has a gradient, too
    model = tiny.peft_model(tiny.model(), bank.adapter(0))
    lora = {name: p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name}
    tiny.textbook_loss(model, batch).backward()
    with tiny.noted_gradients() as noted:
        settings = TrainingSettings(lr=1e-3, batch_size=4, epochs=1, lora_dropout=0.0)
        train(bank, [Learner(0, "u", 1, batch)], settings, max_batch_tokens=20)
    theirs = list(lora.values())
    assert len(theirs) == len(noted[0]) == 16
    for ours, parameter in zip(noted[0], theirs, strict=True):
        assert parameter.grad.abs().max() > 1e-4
        assert torch.allclose(ours[0], parameter.grad, atol=1e-5)


# -- independence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_together_is_training_alone(dropout: float) -> None:
    settings = replace(SETTINGS, lora_dropout=dropout)
    bank = bank_for(LEARNERS)
    together = train(bank, LEARNERS, settings)
    assert [len(losses) for losses in together] == [4, 6, 2]
    for learner in LEARNERS:
        own, losses = alone(learner, settings)
        assert together[learner.slot] == pytest.approx(losses, abs=1e-4)
        assert_close(bank.adapter(learner.slot).factors, own.adapter(0).factors, atol=0.0)  # on a CPU bit for bit
    assert together[0][0] != pytest.approx(together[1][0], abs=1e-2)


def test_a_finished_learner_rests() -> None:
    """The third learner has two steps: its factors after two steps of the bank are its last."""
    bank = bank_for(LEARNERS)
    at_step: list[torch.Tensor] = []
    first = bank.parameters()[1]
    train(bank, LEARNERS, SETTINGS, progress=lambda _: at_step.append(first.detach().clone()))
    assert torch.equal(at_step[1][2], at_step[-1][2])
    assert not torch.equal(at_step[0][2], at_step[1][2])
    assert not torch.equal(at_step[1][1], at_step[-1][1])


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_micro_batches_change_nothing(budget: int) -> None:
    settings = replace(SETTINGS, lora_dropout=0.1)
    reference, bank = bank_for(LEARNERS), bank_for(LEARNERS)
    expected = train(reference, LEARNERS, settings)
    found = train(bank, LEARNERS, settings, max_batch_tokens=budget)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_place_in_the_bank_is_free_and_progress_counts_batches() -> None:
    bank = bank_for(LEARNERS[::-1])
    moved = [Learner(2 - x.slot, x.name, x.seed, x.records) for x in LEARNERS]
    done: list[int] = []
    found = train(bank, moved, SETTINGS, progress=done.append)
    assert done == [3, 3, 2, 2, 1, 1]
    for learner, losses in zip(LEARNERS, found, strict=True):
        assert losses == pytest.approx(alone(learner, SETTINGS)[1], abs=1e-4)


def test_the_same_again_and_other_seeds() -> None:
    settings = replace(SETTINGS, lora_dropout=0.1)
    torch.manual_seed(1)
    first = alone(LEARNERS[0], settings)[1]
    bank = bank_for([LEARNERS[0]])
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again = train(bank, LEARNERS[:1], settings)[0]
    assert torch.equal(state, torch.random.get_rng_state())  # no draw from the global stream
    assert first == again
    other = Learner(0, "user", 99, LEARNERS[0].records)
    assert alone(other, settings)[1] != first


# -- gradient checkpointing -----------------------------------------------------------------------------------------


def kept_bytes(bank: AdapterBank, settings: TrainingSettings) -> tuple[list, list[torch.Tensor], int]:
    """Losses and first gradients of all learners, and the bytes that the forward passes kept for the backward ones."""
    kept: list[int] = []
    gradients: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    def keep(parameters: list[torch.Tensor], limit: float) -> torch.Tensor:
        gradients.extend(p.grad.clone() for p in parameters)
        return clip_by_adapter(parameters, limit)

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        patch.setattr("prime.bank.train.clip_by_adapter", keep)
        return train(bank, LEARNERS, settings, max_batch_tokens=30), gradients, sum(kept)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_checkpointing_changes_nothing_but_memory(family: str) -> None:
    """Dropout inside the model, which is never on, would show, and dropout in front of the factors has to come back."""
    found = []
    for wanted in (False, True):
        bank = AdapterBank(tiny.model(family, attention_dropout=0.5))
        bank.allocate([learner.seed for learner in LEARNERS], rank=4, alpha=8)
        settings = replace(SETTINGS, lora_dropout=0.1, gradient_checkpointing=wanted)
        found.append(kept_bytes(bank, settings))
        assert [m for m in bank.model.modules() if m.training] == [*bank.wrappers.values()]
    (losses, gradients, kept), (again, recomputed, less) = found
    assert losses == [pytest.approx(own, abs=1e-6) for own in again]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, recomputed, strict=True))
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-2
    assert less < 0.5 * kept


def test_a_model_that_cannot_recompute_its_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_for(LEARNERS)
    monkeypatch.setattr("prime.bank.bank.GradientCheckpointingLayer", int)
    with pytest.raises(InputError, match="LlamaForCausalLM cannot recompute its layers"):
        train(bank, LEARNERS, TrainingSettings(gradient_checkpointing=True))


# -- parts ----------------------------------------------------------------------------------------------------------


def test_batches_hold_every_record_once_an_epoch_in_changing_order() -> None:
    learner = LEARNERS[1]
    plan = learner.batches(TrainingSettings(batch_size=4, epochs=3))
    assert [len(batch) for batch in plan] == [4, 4, 1] * 3
    epochs = [[r.id for batch in plan[i : i + 3] for r in batch] for i in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(r.id for r in learner.records) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Learner(7, "another name", learner.seed, learner.records).batches(TrainingSettings(batch_size=4)) == plan


def test_the_published_schedule_sets_the_rate_after_a_step() -> None:
    settings = TrainingSettings(lr=0.4, min_lr=0.1, lr_schedule="published")
    rate, used = settings.lr, []
    for step in range(8):
        used.append(rate)  # the optimizer steps, then
        rate = 0.1 + 0.3 * 0.5 * (1 + math.cos(math.pi * step / 8))
    assert [cosine_lr(settings, step, 8) for step in range(8)] == pytest.approx(used) and used[:2] == [0.4, 0.4]


def test_the_schedule_is_the_cosine() -> None:
    settings = TrainingSettings(lr=0.4, min_lr=0.1)
    assert cosine_lr(settings, 0, 8) == 0.4
    assert cosine_lr(settings, 4, 8) == pytest.approx(0.25)
    assert cosine_lr(settings, 8, 8) == pytest.approx(0.1)
    assert cosine_lr(settings, 2, 8) == pytest.approx(0.1 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)


def test_clipping_is_clip_grad_norm_for_each_adapter() -> None:
    stream = torch.Generator().manual_seed(0)
    stacks = [torch.zeros(3, *shape, requires_grad=True) for shape in ((4, 6), (5, 4))]
    for stack in stacks:
        stack.grad = torch.randn(stack.shape, generator=stream) * torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    expected = [[stack.grad[place].clone() for stack in stacks] for place in range(3)]
    clip_by_adapter(stacks, 1.0)
    for place, grads in enumerate(expected):
        own = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for parameter, grad in zip(own, grads, strict=True):
            parameter.grad = grad
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        for stack, parameter in zip(stacks, own, strict=True):
            assert torch.allclose(stack.grad[place], parameter.grad, atol=1e-7)


def row(noise: int, length: int) -> TrainRow:
    return TrainRow(0, 0, 0, noise, EncodedRecord("r", (1,) * length, (2,)))


def test_dropout_has_its_rate_and_keeps_the_mean() -> None:
    x = dropout_scaler([row(1, 100), row(2, 100)], 0.25)(0, torch.ones(2, 100, 64))
    assert x.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (x == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(x[0], x[1])


def test_dropout_belongs_to_the_row_and_the_module() -> None:
    one, two = row(1, 6), row(2, 9)
    together = dropout_scaler([two, one], 0.5)(3, torch.ones(2, 9, 16))
    alone = dropout_scaler([one], 0.5)(3, torch.ones(1, 6, 16))
    assert torch.equal(together[1, :6], alone[0])
    assert not torch.equal(alone, dropout_scaler([one], 0.5)(4, torch.ones(1, 6, 16)))


def test_dropout_takes_part_in_training() -> None:
    dry = alone(LEARNERS[0], replace(SETTINGS, lora_dropout=0.5))[1]
    plain = alone(LEARNERS[0], SETTINGS)[1]
    assert dry[0] == plain[0]  # B is zero at the start, so dropout cannot show
    assert dry[-1] != pytest.approx(plain[-1], abs=1e-4)


def test_training_learns() -> None:
    learner = Learner(0, "user", 0, tiny.records(6, 3))
    losses = alone(learner, TrainingSettings(lr=2e-2, clip=1.0, batch_size=6, epochs=15, lora_dropout=0.0))[1]
    assert losses[-1] < 0.7 * losses[0]


def test_no_records_no_steps() -> None:
    bank = bank_for(LEARNERS)
    empty = Learner(1, "nobody", 3, [])
    found = train(bank, [LEARNERS[0], empty], SETTINGS)
    assert found[1] == [] and len(found[0]) == 4
    assert train(bank, [], SETTINGS) == []


def test_a_loss_that_is_not_finite_names_the_learner() -> None:
    bank = bank_for(LEARNERS)
    bank.parameters()[-1].data[1] = float("nan")
    with pytest.raises(InputError, match="user 1: step 0: the training loss is nan, .* lower --lr"):
        train(bank, LEARNERS, SETTINGS)


def test_a_gradient_that_is_not_finite_names_the_learner() -> None:
    """Attention turns NaN queries into a finite loss; after the last step nobody would look again."""
    bank = bank_for(LEARNERS)
    bank.parameters()[1].data[1] = float("nan")  # B of the first q_proj
    learner = Learner(1, "user 1", 11, LEARNERS[1].records[:2])
    with pytest.raises(InputError, match="user 1"):
        train(bank, [learner], TrainingSettings(batch_size=6, epochs=1, lora_dropout=0.0))
