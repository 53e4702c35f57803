"""BM25 retrieval as published: Okapi (Robertson et al., TREC-3), by rank-bm25, whose variant differs from others'."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from rank_bm25 import BM25Okapi

K1, B, EPSILON = 1.5, 0.75, 0.25  # published, and rank-bm25's defaults


def top_k(query: str, corpus: Sequence[str], k: int) -> list[int]:
    """Positions of the `k` best documents, best first; of equal ones the later first.

    Tokens are what lies between single spaces. rank-bm25's own `get_top_n` means the same order, but its sort is not
    stable: there the order of ties depends on numpy's build.
    """
    if k <= 0 or not corpus:  # rank-bm25 divides by zero on an empty corpus
        return []
    scores = _index(tuple(corpus)).get_scores(query.split(" "))
    return [int(i) for i in np.argsort(scores, kind="stable")[::-1][:k]]


@lru_cache(maxsize=4)
def _index(corpus: tuple[str, ...]) -> BM25Okapi:
    """The index of a corpus. The last few are kept, because many queries ask the same history."""
    return BM25Okapi([text.split(" ") for text in corpus], k1=K1, b=B, epsilon=EPSILON)
