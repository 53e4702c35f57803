"""BM25 against the formula written out, and against rank-bm25's own order."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from prime.users.retrieval import top_k

WORDS = st.sampled_from(["a", "b", "c", "d", "e", ""])
TEXTS = st.lists(WORDS, max_size=8).map(" ".join)


def naive_scores(query: str, corpus: list[str]) -> list[float]:
    """Okapi BM25 with rank-bm25's floor: a term in more than half of the documents gets epsilon x the mean idf."""
    docs = [text.split(" ") for text in corpus]
    mean_length = sum(map(len, docs)) / len(docs)
    df = Counter(word for doc in docs for word in set(doc))
    idf = {word: math.log((len(docs) - n + 0.5) / (n + 0.5)) for word, n in df.items()}
    floor = 0.25 * sum(idf.values()) / len(idf)
    idf = {word: value if value >= 0 else floor for word, value in idf.items()}
    scores = []
    for doc in docs:
        tf = Counter(doc)
        norm = 1.5 * (1 - 0.75 + 0.75 * len(doc) / mean_length)
        scores.append(sum(idf.get(w, 0) * tf[w] * 2.5 / (tf[w] + norm) for w in query.split(" ")))
    return scores


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=30), st.integers(1, 40))
def test_order_is_bm25s(query: str, corpus: list[str], k: int) -> None:
    scores = naive_scores(query, corpus)
    found = top_k(query, corpus, k)
    assert len(found) == len(set(found)) == min(k, len(corpus))
    assert [scores[i] for i in found] == pytest.approx(sorted(scores, reverse=True)[:k], abs=1e-9)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=8), st.data())
def test_of_equal_documents_the_later_comes_first(query: str, texts: list[str], data) -> None:
    corpus = data.draw(st.lists(st.sampled_from(texts), min_size=1, max_size=40))
    found = top_k(query, corpus, len(corpus))
    for text in texts:
        places = [i for i in found if corpus[i] == text]
        assert places == sorted(places, reverse=True)


def test_all_ties() -> None:
    assert top_k("nothing in common", ["x y"] * 40, 3) == [39, 38, 37]


def test_order_is_rank_bm25s() -> None:
    """Where scores differ, `get_top_n` gives the same list."""
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(50):
        corpus = [" ".join(rng.choice(list("abcdefghij"), rng.integers(3, 30))) for _ in range(20)]
        query = " ".join(rng.choice(list("abcdefghij"), 5))
        index = BM25Okapi([text.split(" ") for text in corpus])
        scores = sorted(index.get_scores(query.split(" ")))
        if min(np.diff(scores)) > 1e-12:
            compared += 1
            assert [corpus[i] for i in top_k(query, corpus, 6)] == index.get_top_n(query.split(" "), corpus, 6)
    assert compared > 30


def test_small_example() -> None:
    corpus = ["the robot paints", "two thieves love", "a robot robot story", "war and peace", "one more"]
    assert top_k("robot", corpus, 2) == [2, 0]
    assert top_k("thieves", corpus, 1) == [1]


@pytest.mark.parametrize("k", [0, -1])
def test_nothing_asked_for(k: int) -> None:
    assert top_k("a", ["a"], k) == []


def test_odd_corpora() -> None:
    assert top_k("a", [], 3) == []
    assert top_k("a", ["", "", ""], 2) == [2, 1]
    assert top_k("", [""], 5) == [0]
    assert top_k("a", ["a"], 9) == [0]


def test_corpus_is_not_kept_by_reference() -> None:
    corpus = ["a b", "c d", "e f"]
    assert top_k("a", corpus, 1) == [0]
    corpus[0], corpus[1] = corpus[1], corpus[0]
    assert top_k("a", corpus, 1) == [1]
