"""Metrics against scikit-learn and rouge-score; intervals against what they must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error

from prime.users.answers import ANY_TEXT, Choices
from prime.users.metrics import (
    METRICS,
    OUTSIDE,
    bootstrap,
    in_their_script,
    paired_bootstrap,
    score,
    sum_stats,
    with_unicode,
)
from prime.users.tasks import TASKS

TAGS = TASKS["movie_tagging"].choices
LETTERS = ("a", "b", "c", "d")
LETTERED, STARS = Choices(LETTERS), Choices(scale=(1.0, 5.0))
ANSWERS = st.sampled_from(["a", "b", "c", " d\n", "", "A", "unknown"])
CHOICES = st.lists(st.tuples(ANSWERS, st.sampled_from(LETTERS)), min_size=1, max_size=30)
SCORES = st.lists(
    st.tuples(st.sampled_from(["1", "2", " 3\n", "4.5", "5", "7", "-1"]), st.sampled_from("12345")),
    min_size=1,
    max_size=30,
)
SENTENCES = st.lists(st.sampled_from(["the", "Cat", "sat", "on", "mats", "!", "é"]), max_size=6).map(" ".join)
TEXTS = st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=10)
ANY = {  # pairs of predictions and the possible answers, per metric
    "accuracy": (st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1), LETTERED),
    "f1": (st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1), LETTERED),
    "MAE": (st.lists(st.tuples(*[st.sampled_from(["1", "4", "x", "", "nan"])] * 2), min_size=1), STARS),
    "RMSE": (st.lists(st.tuples(*[st.sampled_from(["1", "4", "x", "", "inf"])] * 2), min_size=1), STARS),
    "rouge-1": (TEXTS, ANY_TEXT),
    "rouge-L": (TEXTS, ANY_TEXT),
    "rouge-1-unicode": (TEXTS, ANY_TEXT),
    "rouge-L-unicode": (TEXTS, ANY_TEXT),
}


def split(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


@given(CHOICES)
def test_accuracy_and_f1_are_sklearns(pairs) -> None:
    preds, golds = split(pairs)
    found = score(["accuracy", "f1"], preds, golds, LETTERED)
    clean = [pred.strip() for pred in preds]
    assert found["accuracy"] == pytest.approx(accuracy_score(golds, clean), abs=1e-12)
    expected = f1_score(golds, clean, labels=list(LETTERS), average="macro", zero_division=0)
    assert found["f1"] == pytest.approx(expected, abs=1e-12)


@given(SCORES)
def test_errors_are_sklearns(pairs) -> None:
    preds, golds = split(pairs)
    found = score(["MAE", "RMSE"], preds, golds, STARS)
    numbers = [float(x) for x in golds], [float(x) for x in preds]
    assert found["MAE"] == pytest.approx(mean_absolute_error(*numbers), abs=1e-12)
    assert found["RMSE"] == pytest.approx(root_mean_squared_error(*numbers), abs=1e-12)


@given(TEXTS)
def test_rouge_is_rouge_scores(pairs) -> None:
    preds, golds = split(pairs)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    expected = [scorer.score(gold, pred) for pred, gold in pairs]
    found = score(["rouge-1", "rouge-L"], preds, golds, None)
    assert found["rouge-1"] == pytest.approx(np.mean([one["rouge1"].fmeasure for one in expected]), abs=1e-12)
    assert found["rouge-L"] == pytest.approx(np.mean([one["rougeL"].fmeasure for one in expected]), abs=1e-12)


def test_rouge_by_hand() -> None:
    found = score(["rouge-1", "rouge-L"], ["cat the sat"], ["the cat sat down"], None)
    assert found["rouge-1"] == pytest.approx(2 * 1 * 0.75 / 1.75)  # 3 of 3, 3 of 4
    assert found["rouge-L"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))  # 'the sat' or 'cat sat'
    assert score(["rouge-1"], ["mats"], ["mat"], None) == {"rouge-1": 0.0}  # no stemmer


def test_f1_counts_labels_that_never_occur() -> None:
    found = score(["accuracy", "f1"], ["comedy", "action", "Comedy"], ["comedy", "action", "comedy"], TAGS)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx((2 / 3 + 1) / 15)


def test_unknown_answers_and_golds_are_no_key_error() -> None:
    found = score(["accuracy", "f1"], ["zzz", "comedy"], ["comedy", "not in the list"], TAGS)
    assert found == {"accuracy": 0.0, "f1": 0.0}
    for labels in (None, ()):
        with pytest.raises(ValueError, match="f1 needs the task's list of labels"):
            score(["f1"], ["a"], ["a"], Choices(labels))


@pytest.mark.parametrize("answer", ["", "five", "nan", "inf", "-inf", "4 stars", "1" * 300, "1e7"])
def test_an_answer_that_is_no_number_is_the_farther_end(answer: str) -> None:
    found = [score(["MAE", "RMSE"], [answer], [gold], STARS) for gold in "12345"]
    assert [one["MAE"] for one in found] == [4, 3, 2, 3, 4]
    assert [one["RMSE"] for one in found] == [4, 3, 2, 3, 4]


def test_two_answers_that_are_no_numbers_are_alike() -> None:
    assert score(["MAE"], ["five", "x"], ["six", "2"], STARS) == {"MAE": 1.5}


def test_the_scale_says_what_an_unreadable_answer_costs() -> None:
    """Of 0 to 10 the farther end of a gold 2 is 10, and of a gold 8 it is 0."""
    ten = Choices(scale=(0, 10))
    assert [score(["MAE"], ["??"], [gold], ten)["MAE"] for gold in ("2", "8", "7.5")] == [8, 8, 7.5]
    with pytest.raises(ValueError, match="need the ends of the task's scale"):
        score(["MAE"], ["3"], ["4"], None)


def test_case_counts_unless_the_task_says_that_it_does_not() -> None:
    preds, golds = [" Rock\n", "ROCK", "folk", "Funk"], ["rock", "folk", "folk", "folk"]
    strict, lenient = Choices(("rock", "folk")), Choices(("rock", "folk"), ignore_case=True)
    assert score(["accuracy"], preds, golds, strict) == {"accuracy": 0.25}
    assert score(["accuracy"], preds, golds, lenient) == {"accuracy": 0.5}
    lower = score(["f1"], [pred.strip().lower() for pred in preds], golds, strict)
    assert score(["f1"], preds, golds, lenient) == lower


@pytest.mark.parametrize(
    ("choices", "outside"),
    [
        (ANY_TEXT, []),
        (LETTERED, ["A", "5", "", "x"]),
        (Choices(LETTERS, ignore_case=True), ["5", "", "x"]),
        (STARS, [" a\n", "A", "", "x"]),
        (Choices(("6", "7"), (6, 7)), [" a\n", "A", "5", "", "x"]),
    ],
)
def test_answers_outside_are_counted(choices: Choices, outside: list[str]) -> None:
    answers = [" a\n", "A", "5", "", "x"]
    assert [answer for answer in answers if choices.outside(answer)] == outside
    counted = sum_stats(OUTSIDE, answers, answers, choices)
    assert OUTSIDE.finish(counted) == len(outside) / len(answers)


@pytest.mark.parametrize("name", METRICS)
@given(data=st.data())
def test_symmetric_and_best_against_itself(name: str, data) -> None:
    source, labels = ANY[name]
    a, b = split(data.draw(source))
    assert score([name], a, b, labels)[name] == pytest.approx(score([name], b, a, labels)[name], abs=1e-12)
    same, other = score([name], a, a, labels)[name], score([name], b, a, labels)[name]
    sign = 1 if METRICS[name].higher_is_better else -1
    assert sign * same >= sign * other - 1e-12


@pytest.mark.parametrize("name", METRICS)
@given(data=st.data())
def test_statistics_add_up(name: str, data) -> None:
    """The score of two users together comes from the sum of their statistics, in any shape."""
    source, labels = ANY[name]
    metric = METRICS[name]
    users = [split(data.draw(source)) for _ in range(3)]
    stats = np.stack([sum_stats(metric, *user, labels) for user in users])
    together = [sum((user[side] for user in users), []) for side in (0, 1)]
    assert metric.finish(stats.sum(0)) == pytest.approx(score([name], *together, labels)[name], abs=1e-12)
    each = [score([name], *user, labels)[name] for user in users]
    assert metric.finish(stats) == pytest.approx(each)
    assert metric.finish(stats[None]).shape == (1, 3)


def test_directions() -> None:
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == {"MAE", "RMSE"}
    of_tasks = {name for task in TASKS.values() for name in task.metrics + task.history_metrics}
    assert of_tasks == {name for name in METRICS if not name.endswith("-unicode")}


def test_surrounding_whitespace_does_not_count() -> None:
    found = score(["accuracy", "f1", "MAE"], [" 4\n"], ["4 "], Choices(("4",), (1, 5)))
    assert found == {"accuracy": 1.0, "f1": 1.0, "MAE": 0.0}


def test_no_samples_is_nan() -> None:
    assert all(math.isnan(score([name], [], [], Choices(LETTERS, (1, 5)))[name]) for name in METRICS)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        score(["accuracy"], ["a"], ["a", "b"], None)


# --- intervals ---


def users(n: int, p: float, seed: int = 0, queries: int = 30) -> np.ndarray:
    hits = np.random.default_rng(seed).binomial(queries, p, size=n).astype(float)
    return np.stack([hits, np.full(n, float(queries))], axis=1)


MEAN = METRICS["accuracy"].finish


def test_bootstrap_matches_the_normal_interval() -> None:
    stats = users(100, 0.6)
    mean, low, high = bootstrap(stats, MEAN, n=4000)
    rates = stats[:, 0] / stats[:, 1]
    error = rates.std() / math.sqrt(len(rates))
    assert mean == pytest.approx(rates.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_bootstrap_covers_the_truth() -> None:
    covered = sum(low <= 0.6 <= high for _, low, high in (bootstrap(users(40, 0.6, s), MEAN, 500) for s in range(200)))
    assert 175 <= covered <= 199


def test_bootstrap_is_reproducible() -> None:
    stats = users(20, 0.5)
    before = stats.copy()
    assert bootstrap(stats, MEAN, seed=3) == bootstrap(stats, MEAN, seed=3)
    assert bootstrap(stats, MEAN, seed=3)[1:] != bootstrap(stats, MEAN, seed=4)[1:]
    assert (stats == before).all()


def test_bootstrap_weights_users_by_their_samples() -> None:
    stats = np.array([[10.0, 10.0], [0.0, 30.0]])
    assert bootstrap(stats, MEAN) == (0.25, 0.0, 1.0)


def test_paired_bootstrap() -> None:
    a = users(50, 0.5)
    assert paired_bootstrap(a, a, MEAN) == (0.0, 0.0, 0.0)
    better = a + [3.0, 0.0]  # the same gain for each user: resampling cannot move it
    assert paired_bootstrap(better, a, MEAN) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_bootstrap(a, better, MEAN) == pytest.approx((-0.1, -0.1, -0.1))
    mean, low, high = paired_bootstrap(users(50, 0.8, 1), a, MEAN)
    assert 0 < low < mean < high
    with pytest.raises(ValueError, match=r"\(50, 2\) and \(3, 2\)"):
        paired_bootstrap(a, a[:3], MEAN)


def test_intervals_of_little() -> None:
    assert bootstrap(np.array([[3.0, 4.0]]), MEAN) == (0.75, 0.75, 0.75)
    assert all(math.isnan(x) for x in bootstrap(np.zeros((0, 2)), MEAN))
    assert all(math.isnan(x) for x in bootstrap(np.zeros((3, 2)), MEAN))
    assert bootstrap(np.array([[1.0, 1.0], [0.0, 0.0]]), MEAN) == (1.0, 1.0, 1.0)


# -- other scripts --------------------------------------------------------------------------------------------------

SCRIPTS = ("日本の映画", "Тихий фильм", "فيلم هادئ", "शांत फिल्म", "ภาพ", "Café déjà vu", "😀😀", "straße")


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_text_in_any_script_is_like_itself_and_unlike_another(text: str) -> None:
    names = with_unicode(("rouge-1", "rouge-L"), [text])
    assert names == ("rouge-1", "rouge-L", "rouge-1-unicode", "rouge-L-unicode")
    assert in_their_script(("rouge-1", "accuracy"), [text]) == ("rouge-1-unicode", "accuracy")
    assert [score(names[2:], [text], [text], None)[name] for name in names[2:]] == [1, 1]
    for other in SCRIPTS:
        if other != text:
            assert score(names[2:], [text], [other], None)["rouge-1-unicode"] == 0


def test_half_the_words_of_another_script_are_half_the_score() -> None:
    gold, half = SCRIPTS[1], SCRIPTS[1].split()[0].upper()
    assert score(["rouge-1-unicode"], [half], [gold], None)["rouge-1-unicode"] == pytest.approx(2 / 3)


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
@settings(max_examples=50)
def test_of_ascii_both_rouges_are_one(pred: str, gold: str) -> None:
    assert with_unicode(("rouge-1",), [pred, gold]) == ("rouge-1",)
    for name in ("rouge-1", "rouge-L"):
        of_all = score([f"{name}-unicode"], [pred], [gold], None)[f"{name}-unicode"]
        assert of_all == score([name], [pred], [gold], None)[name]
