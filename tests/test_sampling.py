"""Sampling by hashed Gumbel noise: right distribution, and a function of (key, position, token) alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prime.bank.sampling import Sampler, gumbel, nucleus

M64 = 2**64 - 1


def splitmix_finaliser(x: int) -> int:
    """Steele, Lea, Flood 2014, in unbounded integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def naive_gumbel(key: int, position: int, token: int) -> float:
    golden = 0x9E3779B97F4A7C15
    stream = splitmix_finaliser((key + position * golden) & M64)
    bits = splitmix_finaliser(stream ^ splitmix_finaliser(((token + 1) * golden) & M64))
    return float(-np.log(-np.log(((bits >> 11) + 0.5) * 2.0**-53)))


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 3000)), min_size=1, max_size=4))
@settings(max_examples=25)
def test_noise_is_the_hash_written_out(rows: list[tuple[int, int]]) -> None:
    keys, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = gumbel(keys, positions, 5)
    expected = [[naive_gumbel(key, position, token) for token in range(5)] for key, position in rows]
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5)


def test_noise_does_not_depend_on_the_vocabulary_or_the_neighbours() -> None:
    keys, positions = torch.tensor([5, 2**62, 7]), torch.tensor([0, 3, 11])
    wide = gumbel(keys, positions, 40)
    assert torch.equal(wide[:, :10], gumbel(keys, positions, 10))
    assert torch.equal(wide[2:], gumbel(keys[2:], positions[2:], 40))
    assert torch.isfinite(wide).all()


def test_noise_is_gumbel_distributed() -> None:
    """Along tokens, along positions and along keys."""
    zeros, counted = torch.zeros(20_000, dtype=torch.long), torch.arange(20_000)
    along_tokens = gumbel(zeros[:1], zeros[:1], 20_000)[0]
    for sample in (along_tokens, gumbel(zeros, counted, 3)[:, 2], gumbel(counted, zeros, 3)[:, 1]):
        assert stats.kstest(sample.numpy(), stats.gumbel_r.cdf).pvalue > 0.01


def test_noise_is_uncorrelated() -> None:
    noise = gumbel(torch.arange(200).repeat_interleave(20), torch.arange(20).repeat(200), 50).view(200, 20, 50)
    centred = (noise - noise.mean()) / noise.std()
    for one, other in (
        (centred[1:], centred[:-1]),  # neighbouring prompts
        (centred[:, 1:], centred[:, :-1]),  # neighbouring positions
        (centred[..., 1:], centred[..., :-1]),  # neighbouring tokens
        (centred[1:, :-1], centred[:-1, 1:]),  # key + 1 against position + 1
    ):
        assert abs(float((one * other).mean())) < 4 / one.numel() ** 0.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0])
    n = 20_000
    keys = torch.tensor([Sampler(seed=1).key(str(i)) for i in range(n)])
    sampler = Sampler(temperature, 1.0)
    chosen = sampler.choose(logits.expand(n, -1), keys, torch.arange(n) % 7)
    counts = np.bincount(chosen.numpy(), minlength=5)
    expected = torch.softmax(logits.double() / temperature, 0).numpy() * n
    assert stats.chisquare(counts, expected).pvalue > 0.01


def test_top_p_renormalises_what_is_kept() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    n = 20_000
    chosen = Sampler(1.0, 0.6).choose(logits.expand(n, -1), torch.arange(n), torch.zeros(n, dtype=torch.long))
    counts = np.bincount(chosen.numpy(), minlength=4)
    assert counts[2] == counts[3] == 0
    assert stats.chisquare(counts[:2], np.array([0.625, 0.375]) * n).pvalue > 0.01


def test_temperature_zero_is_greedy_and_needs_no_noise() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(50, dtype=torch.long)
    assert torch.equal(Sampler(0.0).choose(logits, zeros, zeros), logits.argmax(1))
    assert torch.equal(Sampler(1.0, 0.0).choose(logits, zeros, zeros), logits.argmax(1))  # a nucleus of one
    assert torch.equal(Sampler(1e-4, 1.0).choose(logits, zeros, zeros), logits.argmax(1))


def test_choosing_a_row_does_not_look_at_the_others() -> None:
    stream = torch.Generator().manual_seed(0)
    logits, keys, positions = torch.randn(64, 30, generator=stream), torch.arange(64) * 977, torch.arange(64) % 5
    sampler = Sampler(1.0, 0.9)
    together = sampler.choose(logits, keys, positions)
    order = torch.randperm(64, generator=stream)
    assert torch.equal(sampler.choose(logits[order], keys[order], positions[order]), together[order])
    alone = [int(sampler.choose(logits[i : i + 1], keys[i : i + 1], positions[i : i + 1])) for i in range(64)]
    assert together.tolist() == alone


def naive_nucleus(probs: list[float], top_p: float) -> set[int]:
    """Tokens in falling order until more than top_p has gathered before the next one."""
    kept, gathered = set(), 0.0
    for token in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if gathered > top_p:
            break
        kept.add(token)
        gathered += probs[token]
    return kept


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]))
@settings(max_examples=60)
def test_nucleus_is_the_naive_loop(seed: int, top_p: float) -> None:
    logits = torch.randn(3, 23, generator=torch.Generator().manual_seed(seed)) * 2
    mask = nucleus(logits.log_softmax(-1), top_p)
    for row, kept in zip(logits.double().softmax(-1).tolist(), mask.tolist(), strict=True):
        assert {token for token, keep in enumerate(kept) if keep} == naive_nucleus(row, top_p)


def test_nucleus_on_numbers_that_are_exact() -> None:
    log_probs = torch.log(torch.tensor([[0.125, 0.5, 0.125, 0.25]]))
    assert nucleus(log_probs, 0.4).tolist() == [[False, True, False, False]]
    assert nucleus(log_probs, 0.5).tolist() == [[False, True, False, True]]  # exactly top_p has gathered
    assert nucleus(log_probs, 0.7).tolist() == [[False, True, False, True]]
    assert nucleus(log_probs, 1.0).all()


def test_keys_are_a_function_of_seed_and_prompt() -> None:
    keys = {(seed, prompt): Sampler(seed=seed).key(prompt) for seed in range(3) for prompt in ("a", "b", "11", "1")}
    assert len(set(keys.values())) == 12
    assert all(0 <= key < 2**63 for key in keys.values())
    assert Sampler(0.7, 0.5, seed=2).key("a") == keys[2, "a"]
