"""The null controls: other sharers, or noise in place of their adapters."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prime.bank.lora import Adapter
from prime.errors import InputError
from prime.merging.controls import with_sharers
from prime.merging.sharers import Pool
from prime.users.data import User
from tests import tiny

USERS, ANCHORS = 6, 8
TESTS = [User(f"u{place}", []) for place in range(USERS)]
RANKING = tuple(tuple(int(place) for place in torch.randperm(ANCHORS)) for _ in range(USERS))


def pool() -> Pool:
    anchors = tuple(User(f"a{place}", []) for place in range(ANCHORS))
    folders = tuple(Path(f"users/user_a{place}/adapter") for place in range(ANCHORS))
    adapters = {folder: tiny.adapter(tiny.model(), place) for place, folder in enumerate(folders)}
    return Pool(anchors, folders, RANKING, "base", open_once=lambda folder, *_: adapters[folder])


def sharers(how: str, n_sim: int = 3, seed: int = 0) -> list[tuple[int, ...]]:
    return list(with_sharers(pool(), TESTS, how, n_sim, seed).ranking)


def test_nearest_and_farthest_are_the_ends_of_the_ranking() -> None:
    assert sharers("nearest") == [row[:3] for row in RANKING]
    assert sharers("farthest") == [row[-1:-4:-1] for row in RANKING]
    assert sharers("nearest", 0) == list(RANKING)


def test_random_ones_are_drawn_for_each_user_by_the_seed() -> None:
    drawn = sharers("random")
    assert all(len(set(row)) == 3 for row in drawn) and len(set(drawn)) > 1
    assert drawn == sharers("random") != sharers("random", seed=1)
    back = with_sharers(replace(pool(), ranking=RANKING[::-1]), TESTS[::-1], "random", 3, 0)
    assert list(back.ranking)[::-1] == drawn  # by the user, wherever he stands


def test_noise_has_the_size_of_the_nearest_ones_adapters_and_nothing_of_them() -> None:
    plain, noisy = pool(), with_sharers(pool(), TESTS, "noise", 3, 0)
    assert [row[:3] for row in RANKING] == list(noisy.ranking)
    own: Adapter
    for own, noise in zip(plain.adapters(0), noisy.adapters(0), strict=False):
        assert own.factors.keys() == noise.factors.keys() and own.scale == noise.scale
        for name, (a, b) in own.factors.items():
            for factor, drawn in zip((a, b), noise.factors[name], strict=True):
                torch.testing.assert_close(drawn.norm(), factor.norm())
                cosine = torch.nn.functional.cosine_similarity(drawn.flatten(), factor.flatten(), dim=0)
                assert abs(float(cosine)) < 5 / factor.numel() ** 0.5
    again = with_sharers(pool(), TESTS, "noise", 3, 0).adapters(0)[0].factors
    assert all(torch.equal(a, again[name][0]) for name, (a, _) in noisy.adapters(0)[0].factors.items())


def test_no_more_sharers_than_anchors() -> None:
    with pytest.raises(InputError, match="--n_sim 9: must be 0"):
        sharers("random", 9)
