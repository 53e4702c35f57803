"""Membership inference: the attacks, each a score of a record from its tokens' log-probabilities.

Everything here is a pure function of numpy arrays and texts, so an attack can be tried on any model whose token
log-probabilities are at hand. In all of them a higher score means "more likely a member".

Letters: `t` target tokens of a record (EOS included), `m` reference models, `z` records of the population.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

MIN_K = 0.2  # share of a record's tokens that Min-K % looks at, the least likely ones; the authors' choice
NEARLY_SURE = 2.0**-24  # what fp32 cannot tell from 0 beside a probability of 1
RMIA_A = 0.3  # of offline RMIA: how far P(x) moves with the reference models; the authors' tool's default
RMIA_GAMMA = 2.0  # of RMIA: how many times likelier than a population's record; the paper's choice


@dataclass(frozen=True)
class Evidence:
    """What an attack may look at of one record."""

    adapter: np.ndarray  # [t] log-probabilities of the target's tokens under the attacked model
    base: np.ndarray  # [t] the same under the task-adapted base
    mean: np.ndarray  # [t] mean and
    std: np.ndarray  # [t] standard deviation of a token's log-probability, drawn from the attacked model
    text: str = ""  # the target
    # [m] mean token log-probability under models that never saw the record
    references: np.ndarray = field(default_factory=lambda: np.empty(0))
    # [z] `rmia_ratio` of other people's records, in ascending order
    population: np.ndarray = field(default_factory=lambda: np.empty(0))


# -- attacks --------------------------------------------------------------------------------------------------------


def summed_loss(e: Evidence) -> float:
    """The published attack (PriME; Yeom et al. 2018): the record's summed token loss, negated.

    A record that the attacked model finds likely (low loss) is called a member; sums mix length with membership.
    """
    return float(np.sum(e.adapter))


def calibrated_loss(e: Evidence) -> float:
    """Base-calibrated ("difficulty calibration", Watson et al. 2022): base loss minus adapter loss, summed.

    How much likelier the adapter makes the record than the task-adapted base does. Attacking the base itself
    scores 0 for every record, so its blind baseline is 0.5 by construction.
    """
    return float(np.sum(e.adapter) - np.sum(e.base))


def logit(e: Evidence) -> float:
    """Log-odds of the whole target, log p / (1 - p), less those of the base (LiRA's statistic, Carlini et al. 2022).

    Losses near zero lie close together, their odds far apart: a sure record and a very sure one are told apart.
    """
    return _log_odds(float(np.sum(e.adapter))) - _log_odds(float(np.sum(e.base)))


def _log_odds(logprob: float) -> float:
    """log p / (1 - p) of p = exp(logprob); 1 - p is at least `NEARLY_SURE`."""
    return logprob - math.log(max(-math.expm1(logprob), NEARLY_SURE))


def mean_loss(e: Evidence) -> float:
    """Mean token loss, negated (Yeom et al. 2018, with the loss a language model is trained on)."""
    return float(np.mean(e.adapter))


def zlib_ratio(e: Evidence) -> float:
    """Mean token loss over the zlib size of the target in bytes, negated (Carlini et al. 2021).

    A text that is likelier than it is compressible is called a member.
    """
    return float(np.mean(e.adapter)) / len(zlib.compress(e.text.encode()))


def _lowest(values: np.ndarray) -> float:
    """Mean of the lowest `MIN_K` of the values, of at least one."""
    size = max(1, int(MIN_K * len(values)))
    return float(np.mean(np.partition(values, size - 1)[:size]))


def min_k(e: Evidence) -> float:
    """Min-K % (Shi et al. 2024): mean log-probability of the 20 % least likely tokens, of at least one.

    A text in the training data holds no token that surprises the model.
    """
    return _lowest(e.adapter)


def min_k_plus_plus(e: Evidence) -> float:
    """Min-K %++ (Zhang et al. 2024): Min-K % of log-probabilities in standard deviations from their mean.

    Mean and deviation are those of a token drawn from the model at that position. Where the model is sure of one
    token the deviation vanishes; it counts as at least 1e-4.
    """
    return _lowest((e.adapter - e.mean) / np.maximum(e.std, 1e-4))


def rmia_ratio(attacked: np.ndarray, references: np.ndarray) -> np.ndarray:
    """log P(x | attacked) - log P(x) of records: attacked [...], references [..., m] are mean token log-probabilities.

    P is the geometric mean of token probabilities, so records of any length compare. Offline RMIA estimates
    P(x) = ((1 + a) P_out(x) + (1 - a)) / 2, P_out the mean over reference models that never saw the record
    (Zarifzadeh et al. 2024, "Low-cost high-power membership inference attacks", appendix on offline attacks).
    """
    out = np.mean(np.exp(references), axis=-1)
    return attacked - np.log(((1 + RMIA_A) * out + (1 - RMIA_A)) / 2)


def rmia(e: Evidence) -> float:
    """Offline RMIA (Zarifzadeh et al. 2024): share of the population that the record beats `RMIA_GAMMA` times.

    Beats: P(x | attacked) / P(x) against the same ratio of a population's record. No population's record and no
    reference model comes from the record's own anchor.
    """
    ratio = rmia_ratio(np.mean(e.adapter), e.references) - np.log(RMIA_GAMMA)
    return float(np.searchsorted(e.population, ratio, side="right") / len(e.population))


# Adding an attack is one row.
ATTACKS: dict[str, Callable[[Evidence], float]] = {
    "loss": summed_loss,
    "calibrated": calibrated_loss,
    "logit": logit,
    "mean_loss": mean_loss,
    "zlib": zlib_ratio,
    "min_k": min_k,
    "min_k_pp": min_k_plus_plus,
    "rmia": rmia,
}
PUBLISHED_ATTACK = "loss"
NEEDS_REFERENCES = ("rmia",)


def record_scores(evidence: Sequence[Evidence]) -> dict[str, list[float]]:
    """Every attack's score of every record; without reference models or a population, no RMIA."""
    with_references = all(len(e.references) and len(e.population) for e in evidence)
    scores = {}
    for name, attack in ATTACKS.items():
        if with_references or name not in NEEDS_REFERENCES:
            scores[name] = [attack(e) for e in evidence]
    return scores
