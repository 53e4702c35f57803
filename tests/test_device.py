"""Wherever and in whatever type the base computes: rows, merges, answers, scores and training are PEFT's.

On a machine without a GPU these run on its CPU; `benchmarks/gpu.sh` runs them on a GPU, too. In fp32 they equal PEFT's
within rounding. In bfloat16 both are held against PEFT in fp32 over the same (rounded) weights, and the bank may not be
farther from it than twice what PEFT is.
"""

from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from prime.bank.bank import AdapterBank
from prime.bank.batching import every_pair
from prime.bank.decode import Request, decode
from prime.bank.encoding import EncodedPrompt, EncodedRecord
from prime.bank.logprobs import target_logprobs
from prime.bank.lora import RULES, Adapter, merge
from prime.bank.sampling import Sampler
from prime.bank.train import BETAS, Learner, cosine_lr, train
from prime.settings import TrainingSettings
from tests import tiny

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 5e-5, torch.bfloat16: 0.02}
IDS = tiny.ids(6, 11)
ROWS = [1, 0, 2, 1, 0, 2]
WEIGHTS = torch.tensor([[0.8, -0.5, 0.4], [0.3, 0.3, 0.3]])
LIMIT = 6


class Place(NamedTuple):
    device: str
    dtype: torch.dtype

    def model(self) -> nn.Module:
        return tiny.model().to(self.device, self.dtype)

    def reference(self) -> nn.Module:
        """The same weights in fp32, on the CPU."""
        return tiny.model().to(self.dtype).float()

    def peft(self, adapter: Adapter) -> nn.Module:
        return tiny.peft_model(self.model(), adapter)

    def bank(self) -> AdapterBank:
        return AdapterBank(self.model())


PLACES = [Place(*place) for place in product(DEVICES, DTYPES)]
EVERYWHERE = pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.device}-{place.dtype}")
ADAPTERS = [tiny.adapter(tiny.model(), seed, rank) for seed, rank in enumerate((4, 2, 3))]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return tiny.logits(model, ids.to(device)).float().cpu()


def error(values: Tensor, reference: Tensor) -> float:
    return float((values - reference).abs().max())


def assert_as_near_as_peft(place: Place, ours: Tensor, peft: Tensor, reference: Tensor) -> None:
    assert error(ours, reference) <= ROUNDING[place.dtype] + 2 * error(peft, reference)


@EVERYWHERE
def test_rows_of_a_mixed_batch(place: Place) -> None:
    bank = place.bank()
    bank.load(ADAPTERS)
    with bank.routed(ROWS):
        ours = logits(bank.model, IDS)
    for adapter in range(3):
        rows = [row for row, own in enumerate(ROWS) if own == adapter]
        reference = logits(tiny.peft_model(place.reference(), ADAPTERS[adapter]), IDS)[rows]
        assert_as_near_as_peft(place, ours[rows], logits(place.peft(ADAPTERS[adapter]), IDS)[rows], reference)
        neighbour = logits(tiny.peft_model(place.reference(), ADAPTERS[adapter - 1]), IDS)[rows]
        assert error(neighbour, reference) > 0.2  # another adapter's rows would be noticed


@EVERYWHERE
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 11])  # a step of few tokens, a prompt: the bank multiplies them differently
def test_merges(place: Place, rule: str, length: int) -> None:
    bank = place.bank()
    bank.load(ADAPTERS)
    bank.combine(WEIGHTS, rule)
    for candidate, weights in enumerate(WEIGHTS):
        merged = merge(ADAPTERS, weights, rule)
        with bank.routed([candidate] * len(IDS)):
            ours = logits(bank.model, IDS[:, :length])
        reference = logits(tiny.peft_model(place.reference(), merged), IDS[:, :length])
        assert_as_near_as_peft(place, ours, logits(place.peft(merged), IDS[:, :length]), reference)


@EVERYWHERE
def test_answers(place: Place) -> None:
    """Each token of an answer is the reference's best, or within rounding of it; in fp32 the answer is `generate`'s."""
    bank = place.bank()
    bank.load(ADAPTERS)
    prompts = [EncodedPrompt(f"p{i}", tiny.text_ids(i, 3, 14)) for i in range(5)]
    answers = decode(bank, Request(prompts, every_pair(range(3), 5), Sampler(0.0), LIMIT), [tiny.VOCAB + 5])
    assert len(set(answers.values())) > 3
    for adapter, lora in enumerate(ADAPTERS):
        reference, peft = tiny.peft_model(place.reference(), lora), place.peft(lora)
        for index, prompt in enumerate(prompts):
            answer = answers[adapter, index]
            whole = torch.tensor([prompt.ids + answer])
            table = logits(reference, whole)[0, len(prompt.ids) - 1 : -1]
            regret = table.max(-1).values - table[torch.arange(LIMIT), torch.tensor(answer)]
            rounding = error(logits(peft, whole)[0, len(prompt.ids) - 1 : -1], table)
            assert float(regret.max()) <= ROUNDING[place.dtype] + 4 * rounding
            if place.dtype == torch.float32:
                ids = torch.tensor([prompt.ids], device=place.device)
                out = peft.generate(input_ids=ids, do_sample=False, max_new_tokens=LIMIT, eos_token_id=tiny.VOCAB + 5)
                assert tuple(out[0, len(prompt.ids) :].tolist()) == answer


@EVERYWHERE
def test_scores(place: Place) -> None:
    bank = place.bank()
    bank.load(ADAPTERS)
    records = tiny.records(6, 1)
    scores = target_logprobs(bank, records, every_pair(range(3), 6))
    for (adapter, index), ours in scores.items():
        record = records[index]
        models = [tiny.peft_model(place.reference(), ADAPTERS[adapter]), place.peft(ADAPTERS[adapter])]
        reference, peft = (naive_scores(model, record) for model in models)
        assert_as_near_as_peft(place, ours.float().cpu(), peft, reference)


def naive_scores(model: nn.Module, record: EncodedRecord) -> Tensor:
    table = logits(model, torch.tensor([record.ids + record.target]))[0].log_softmax(-1)
    places = torch.arange(len(record.target)) + len(record.ids) - 1
    return table[places, torch.tensor(record.target)]


@EVERYWHERE
def test_training(place: Place) -> None:
    """Losses of all steps; in bfloat16 the paths part with the steps, so the first losses are compared."""
    settings = TrainingSettings(lr=5e-3, clip=0.3, batch_size=3, epochs=2, lora_dropout=0.0)
    learners = [Learner(slot, f"user {slot}", 10 + slot, tiny.records(6, slot)) for slot in range(2)]
    bank = place.bank()
    bank.allocate([learner.seed for learner in learners], 4, 8)
    starts = [bank.adapter(slot) for slot in range(2)]
    ours = train(bank, learners, settings)
    for losses, start, learner in zip(ours, starts, learners, strict=True):
        reference = peft_losses(tiny.peft_model(place.reference(), start), learner, settings)
        peft = peft_losses(place.peft(start), learner, settings)
        steps = len(losses) if place.dtype == torch.float32 else 2
        tensors = [torch.tensor(values[:steps]) for values in (losses, peft, reference)]
        assert_as_near_as_peft(place, *tensors)


def peft_losses(model: nn.Module, learner: Learner, settings: TrainingSettings) -> list[float]:
    """The textbook loop, one record after the other."""
    model.requires_grad_(False)
    device = next(model.parameters()).device
    trained = [parameter.requires_grad_() for name, parameter in model.named_parameters() if "lora_" in name]
    plan, losses = learner.batches(settings), []
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=BETAS, weight_decay=settings.weight_decay)
    for step, batch in enumerate(plan):
        optimizer.param_groups[0]["lr"] = cosine_lr(settings, step, len(plan))
        optimizer.zero_grad()
        tokens = sum(len(record.target) for record in batch)
        loss = torch.zeros((), device=device)
        for record in batch:
            ids = torch.tensor([record.ids + record.target], device=device)
            table = model(input_ids=ids, use_cache=False).logits[0, len(record.ids) - 1 : -1].float().log_softmax(-1)
            loss = loss - table[torch.arange(len(record.target)), list(record.target)].sum() / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
