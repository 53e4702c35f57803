"""LaMP's metrics as sufficient statistics, and their intervals over resampled users.

Each sample gives a short vector of statistics, and the sum of the vectors of any samples gives their score:
`finish(sum of stats)`. So resampling users is a matrix product. Texts are stripped of surrounding whitespace before
they are compared. The same functions measure similarity, where both sides are predictions: all scores are symmetric.

Letters: `u` users, `s` statistics of a metric, `n` resamples.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from prime.users.answers import ANY_TEXT, Choices, number

Finish = Callable[[np.ndarray], np.ndarray]


class Interval(NamedTuple):
    """A score and its 95 % interval; `_asdict()` is how tables hold it."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Metric:
    """`stats(pred, gold, choices)` -> [s] of a sample; `finish(sums [..., s])` -> scores [...], NaN without samples."""

    name: str
    higher_is_better: bool
    stats: Callable[[str, str, Choices], np.ndarray]
    finish: Finish


def score(
    names: Iterable[str], preds: Sequence[str], golds: Sequence[str], choices: Choices | None = None
) -> dict[str, float]:
    """The named metrics over pairs of prediction and gold; NaN if there are none.

    Args:
        choices: the task's possible answers. F1 needs its labels, an error its scale; None: any text.
    """
    scores = {}
    for name in names:
        metric = METRICS[name]
        scores[name] = float(metric.finish(sum_stats(metric, preds, golds, choices or ANY_TEXT)))
    return scores


def sum_stats(metric: Metric, preds: Sequence[str], golds: Sequence[str], choices: Choices) -> np.ndarray:
    """[s] summed over pairs: a user's row for `bootstrap`."""
    rows = [metric.stats(pred, gold, choices) for pred, gold in zip(preds, golds, strict=True)]
    return sum(rows[1:], start=rows[0]) if rows else np.zeros_like(metric.stats("", "", choices))


def bootstrap(stats_by_user: np.ndarray, finish: Finish, n: int = 2000, seed: int = 0) -> Interval:
    """The score of all users [u, s], with its interval from `n` resamples of users (Efron 1979)."""
    stats = np.asarray(stats_by_user, dtype=float)
    return percentile_interval(finish(stats.sum(0)), finish(_resampled_sums(stats, n, seed)))


def paired_bootstrap(
    stats_a: np.ndarray, stats_b: np.ndarray, finish: Finish, n: int = 2000, seed: int = 0
) -> Interval:
    """Score of a minus score of b of two methods on the same users [u, s], which are resampled together.

    Raises:
        ValueError: the two are of different shapes.
    """
    a, b = np.asarray(stats_a, dtype=float), np.asarray(stats_b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"paired statistics of shapes {a.shape} and {b.shape}")
    differences = finish(_resampled_sums(a, n, seed)) - finish(_resampled_sums(b, n, seed))
    return percentile_interval(finish(a.sum(0)) - finish(b.sum(0)), differences)


def _resampled_sums(stats_by_user: np.ndarray, n: int, seed: int) -> np.ndarray:
    """[n, s] sums over users drawn with replacement; the draw depends on seed and number of users only."""
    users = len(stats_by_user)
    if users == 0:
        return np.zeros((n, stats_by_user.shape[1]))
    drawn = np.random.default_rng(seed).multinomial(users, np.full(users, 1 / users), size=n)
    return drawn @ stats_by_user


def percentile_interval(point: float | np.ndarray, resampled: np.ndarray) -> Interval:
    """A point estimate with the central 95 % of its resamples [n]; those that are NaN do not count."""
    known = resampled[~np.isnan(resampled)]  # a resample may hold only users without samples
    if len(known) == 0:
        return Interval(float(point), math.nan, math.nan)
    low, high = np.percentile(known, [2.5, 97.5])
    return Interval(float(point), float(low), float(high))


def _accuracy_stats(pred: str, gold: str, choices: Choices) -> np.ndarray:
    """[equal, 1]. An answer outside the labels equals no gold, so it is wrong without looking at them."""
    return np.array([float(choices.plain(pred) == choices.plain(gold)), 1.0])


def _f1_stats(pred: str, gold: str, choices: Choices) -> np.ndarray:
    """[hits, false alarms, misses per label, 1], length 3 x labels + 1. Unknown texts are no label's."""
    if not choices.labels:
        raise ValueError("f1 needs the task's list of labels")
    pred, gold = choices.plain(pred), choices.plain(gold)
    labels = [choices.plain(label) for label in choices.labels]
    predicted = np.array([label == pred for label in labels])
    true = np.array([label == gold for label in labels])
    return np.concatenate([predicted & true, predicted & ~true, true & ~predicted, [True]]).astype(float)


def _finish_f1(sums: np.ndarray) -> np.ndarray:
    """Mean over all labels of 2 tp / (2 tp + fp + fn); a label that occurs nowhere counts 0."""
    hits, false_alarms, misses = np.split(sums[..., :-1], 3, axis=-1)
    denominator = 2 * hits + false_alarms + misses
    f1 = (2 * hits / np.where(denominator > 0, denominator, 1)).mean(-1)
    return np.where(sums[..., -1] > 0, f1, np.nan)


def _distance(pred: str, gold: str, scale: tuple[float, float]) -> float:
    """|pred - gold|, where a side that is no number counts as the end of the scale farther from the other.

    That is the published rule for predictions. Two sides that are no numbers are alike, at distance 0: only
    the similarity of two predictions can meet that.
    """
    a, b = number(pred), number(gold)
    if a is not None and b is not None:
        return abs(a - b)
    known = b if a is None else a
    return 0.0 if known is None else max(abs(known - scale[0]), abs(known - scale[1]))


def _error_stats(power: int, pred: str, gold: str, choices: Choices) -> np.ndarray:
    """[error ** power, 1]."""
    if choices.scale is None:
        raise ValueError("MAE and RMSE need the ends of the task's scale")
    return np.array([_distance(pred, gold, choices.scale) ** power, 1.0])


def _outside_stats(pred: str, gold: str, choices: Choices) -> np.ndarray:
    """[outside, 1]."""
    return np.array([float(choices.outside(pred)), 1.0])


def _rouge_stats(kind: str, unicode: bool, pred: str, gold: str, choices: Choices) -> np.ndarray:
    """[F, 1]."""
    return np.array([_rouge(unicode, pred.strip(), gold.strip())[kind == "rougeL"], 1.0])


@lru_cache(maxsize=1 << 17)
def _rouge(unicode: bool, pred: str, gold: str) -> tuple[float, float]:
    """(ROUGE-1 F, ROUGE-L F); the search compares the same texts many times."""
    scores = _scorer(unicode).score(gold, pred)
    return scores["rouge1"].fmeasure, scores["rougeL"].fmeasure


@lru_cache(maxsize=2)
def _scorer(unicode: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: only when needed

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False, tokenizer=UnicodeWords() if unicode else None)


class UnicodeWords:
    """Words of letters, marks and digits of any script, and signs such as emoji; of ASCII the published ones."""

    def tokenize(self, text: str) -> list[str]:
        signs = []
        for sign in unicodedata.normalize("NFC", text).lower():
            kind = unicodedata.category(sign)
            signs.append(f" {sign} " if kind == "So" else sign if kind[0] in "LMN" else " ")
        return "".join(signs).split()


def with_unicode(names: Sequence[str], texts: Iterable[str]) -> tuple[str, ...]:
    """Metrics by name, and beside the published ROUGE, which knows the letters a to z alone, that of all scripts, where
    it finds other words in the texts.
    """
    words = UnicodeWords().tokenize
    if all(words(text) == re.findall("[a-z0-9]+", text.lower()) for text in texts):
        return tuple(names)
    return (*names, *(f"{name}-unicode" for name in names if f"{name}-unicode" in METRICS))


def in_their_script(names: Sequence[str], texts: Iterable[str]) -> tuple[str, ...]:
    """The same, with the ROUGE of all scripts in place of the published one."""
    beside = with_unicode(names, texts)
    return tuple(f"{name}-unicode" if f"{name}-unicode" in beside else name for name in names)


def _mean(sums: np.ndarray) -> np.ndarray:
    """[..., (total, number)] -> [...]"""
    number = sums[..., 1]
    return np.where(number > 0, sums[..., 0] / np.where(number > 0, number, 1), np.nan)


def _root_mean(sums: np.ndarray) -> np.ndarray:
    """[..., (total, number)] -> [...]"""
    return np.sqrt(_mean(sums))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", True, _accuracy_stats, _mean),
        Metric("f1", True, _f1_stats, _finish_f1),
        Metric("MAE", False, partial(_error_stats, 1), _mean),
        Metric("RMSE", False, partial(_error_stats, 2), _root_mean),
        Metric("rouge-1", True, partial(_rouge_stats, "rouge1", False), _mean),
        Metric("rouge-L", True, partial(_rouge_stats, "rougeL", False), _mean),
        Metric("rouge-1-unicode", True, partial(_rouge_stats, "rouge1", True), _mean),
        Metric("rouge-L-unicode", True, partial(_rouge_stats, "rougeL", True), _mean),
    )
}

# Answers that are no label and no number on the scale: no score, so in no list of a task's metrics.
OUTSIDE = Metric("outside", False, _outside_stats, _mean)
