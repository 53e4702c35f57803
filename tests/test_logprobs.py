"""Log-probabilities of targets against the plainest oracle: PEFT's model, one record at a time, no cache."""

from collections.abc import Sequence

import pytest
import torch
from test_decode import BASE, CANDIDATES, PROMPTS, WEIGHTS, bank_of, oracle, table

from prime.bank.bank import AdapterBank
from prime.bank.batching import every_pair
from prime.bank.encoding import EncodedRecord
from prime.bank.logprobs import target_logprobs
from prime.bank.lora import RULES
from tests import tiny

RECORDS = [EncodedRecord(f"r{i}", p.ids, tuple((5, 60, 7, 9, 33)[: i % 4] + (2,))) for i, p in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def banks() -> dict[str, AdapterBank]:
    return {rule: bank_of(rule) for rule in RULES}


def logprobs_of(
    bank: AdapterBank, records: Sequence[EncodedRecord], candidates: Sequence[int], **options: object
) -> list:
    found = target_logprobs(bank, records, every_pair(candidates, len(records)), **options)
    return table(found, candidates, len(records))


def naive_logprobs(model: torch.nn.Module, record: EncodedRecord) -> torch.Tensor:
    whole = record.ids + record.target
    table = tiny.logits(model, torch.tensor([whole]))[0].double().log_softmax(-1)
    return torch.stack([table[at - 1, whole[at]] for at in range(len(record.ids), len(whole))])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("budget", [0, 1, 80])
def test_they_are_the_log_softmax_of_the_target(banks: dict, rule: str, budget: int) -> None:
    finished: list[int] = []
    found = logprobs_of(banks[rule], RECORDS, CANDIDATES, max_batch_tokens=budget, progress=finished.append)
    assert sum(finished) == len(RECORDS) * len(WEIGHTS)
    for candidate in CANDIDATES:
        model = oracle(rule, candidate)
        for record, own in zip(RECORDS, found[candidate], strict=True):
            assert own.dtype == torch.float32 and own.shape == (len(record.target),)
            assert torch.allclose(own.double(), naive_logprobs(model, record), atol=1e-5)
    spread = torch.stack([found[c][3].sum() for c in CANDIDATES])
    assert spread.std() > 0.05


def test_the_plain_base(banks: dict) -> None:
    for own, record in zip(logprobs_of(banks["delta"], RECORDS, [-1])[0], RECORDS, strict=True):
        assert torch.allclose(own.double(), naive_logprobs(BASE, record), atol=1e-5)


def test_moments_are_those_of_tokens_drawn_from_the_model(banks: dict) -> None:
    """Against torch's own distributions; asked for or not, the log-probabilities are the same."""
    moments: dict = {}
    pairs = every_pair(CANDIDATES, len(RECORDS))
    found = target_logprobs(banks["delta"], RECORDS, pairs, moments=moments)
    plain = target_logprobs(banks["delta"], RECORDS, pairs)
    assert all(torch.equal(found[pair], plain[pair]) for pair in pairs) and set(moments) == set(pairs)
    for candidate in (0, 3):
        model = oracle("delta", candidate)
        for index, record in enumerate(RECORDS[:4]):
            ids = torch.tensor([record.ids + record.target[:-1]])
            logits = tiny.logits(model, ids)[0, len(record.ids) - 1 :].double()
            next_token = torch.distributions.Categorical(logits=logits)
            mean = -next_token.entropy()
            variance = (next_token.probs * next_token.logits**2).sum(1) - mean**2
            expected = torch.stack([mean, variance.sqrt()])
            assert torch.allclose(moments[candidate, index].double(), expected, atol=1e-4)


def test_they_do_not_depend_on_their_company(banks: dict) -> None:
    together = logprobs_of(banks["delta"], RECORDS, CANDIDATES)
    for i in (0, 5):
        alone = logprobs_of(banks["delta"], [RECORDS[i]], [2])[0][0]
        assert torch.allclose(alone, together[2][i], atol=1e-5)
    turned = logprobs_of(banks["delta"], RECORDS[::-1], [3, 1])
    for i, own in enumerate(turned[1][::-1]):
        assert torch.allclose(own, together[1][i], atol=1e-5)


def test_only_the_pairs_that_were_asked(banks: dict) -> None:
    """Each record under its own candidates, as the attack asks for it."""
    pairs = [(2, 0), (0, 3), (3, 1), (1, 4), (1, 0), (3, 7)]
    scored = target_logprobs(banks["factor"], RECORDS, pairs)
    assert scored.keys() == set(pairs)
    for candidate, index in pairs:
        expected = naive_logprobs(oracle("factor", candidate), RECORDS[index])
        assert torch.allclose(scored[candidate, index].double(), expected, atol=1e-5)
