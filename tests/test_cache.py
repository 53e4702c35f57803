"""The key-value cache against transformers' own."""

import torch
from transformers import DynamicCache

from prime.bank.cache import RoomyCache


def test_cache_keeps_rows_and_appends_as_transformers_own_does() -> None:
    """Rows leave and tokens come, in any order; only the order of rows may differ, and it is told."""
    stream = torch.Generator().manual_seed(0)
    ours, theirs = RoomyCache(), DynamicCache()
    rows = list(range(9))
    place = dict(enumerate(rows))  # where transformers' cache has each row

    def feed(tokens: int) -> None:
        for layer in range(2):
            new = torch.randn(2, 9, 3, tokens, 4, generator=stream)  # of all rows ever, keys and values
            found = ours.update(*new[:, rows], layer)
            theirs.update(*new[:, sorted(rows)], layer)
            for own, other in zip(found, (theirs.layers[layer].keys, theirs.layers[layer].values), strict=True):
                assert torch.equal(own, other[[place[row] for row in rows]])

    for tokens, keep in ((5, [0, 1, 2, 3, 4, 5, 7, 8]), (1, [0, 3, 7]), (40, [1, 2]), (1, [0])):
        feed(tokens)
        order = ours.keep(keep, len(rows))
        assert sorted(order) == keep
        rows = [rows[i] for i in order]
        theirs.batch_select_indices(torch.tensor([place[row] for row in sorted(rows)]))
        place = {row: i for i, row in enumerate(sorted(rows))}
    feed(1)
