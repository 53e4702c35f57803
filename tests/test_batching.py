"""Which prompts share a prefix, and how many tokens go through the model at once."""

import random

from test_decode import PROMPTS

from prime.bank.batching import MIN_PREFIX, prefix_groups
from prime.bank.budgets import batch_tokens, cache_bytes, waiting_tokens
from tests import tiny


def test_prefix_groups_share_what_they_say() -> None:
    texts = [p.ids for p in PROMPTS]
    rng = random.Random(0)
    for _ in range(20):
        some = [tuple(texts[rng.randrange(8)][: rng.randrange(1, 40)]) for _ in range(rng.randrange(9))]
        groups = prefix_groups(dict(enumerate(some)))
        assert sorted(i for members, _ in groups for i in members) == list(range(len(some)))
        for members, length in groups:
            assert length == 0 or (length >= MIN_PREFIX and len(members) > 1)
            assert len({some[i][:length] for i in members}) <= 1 or length == 0
            assert all(len(some[i]) > length for i in members)


def test_prefixes_are_found() -> None:
    groups = prefix_groups({i: p.ids for i, p in enumerate(PROMPTS)})
    assert any(set(members) >= {0, 1, 2, 3} and length >= MIN_PREFIX for members, length in groups)
    same = (1, *range(3, 40))
    assert prefix_groups({4: same, 2: same}) == [([4, 2], len(same) - 1)]


def test_batch_sizes_are_a_function_of_model_and_device() -> None:
    config = tiny.model().config
    assert batch_tokens(config, 0, None) == 1536
    assert batch_tokens(config, 0, 80 << 30) == 16_384 > batch_tokens(config, 80 << 30, 80 << 30) == 1536
    assert cache_bytes(config, 4) == 2 * 2 * 2 * 16 * 4
    assert waiting_tokens(config, 1000, on_cpu=False) == 4000 < waiting_tokens(config, 1000, on_cpu=True) == 16_000
