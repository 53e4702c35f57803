"""How well scores tell members from non-members: AUROC, true positive rates, ROC, with intervals over resampled users.

Functions of arrays only; no model, no file. A higher score means "more likely a member". Records of several users come
as one array of scores per user, since users are what is resampled (or sharers, where their adapters are attacked).

Letters: `u` users, `s` resamples, `k` thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from prime.errors import InputError
from prime.users.metrics import percentile_interval

FPRS = (0.1, 0.01, 0.001)  # false positive rates at which an attack is summarised
MAX_THRESHOLDS = 4096  # at which a resample's rates are looked up

# --- one population --------------------------------------------------------------------------------


def _scores(values: ArrayLike) -> np.ndarray:
    """The scores as an array; InputError if one is no number: sorted last, it would count as the best of all."""
    scores = np.asarray(values, dtype=float)
    if np.isnan(scores).any():
        raise InputError(f"{int(np.isnan(scores).sum())} of {scores.size} attack scores are no numbers (NaN)")
    return scores


def _wins(members: ArrayLike, non_members: ArrayLike) -> np.ndarray:
    """For each member, the number of non-members that it outscores; a tie counts half."""
    ordered, members = np.sort(_scores(non_members)), _scores(members)
    below = np.searchsorted(ordered, members, side="left")
    not_above = np.searchsorted(ordered, members, side="right")
    return (below + not_above) / 2


def auroc(members: ArrayLike, non_members: ArrayLike) -> float:
    """P(member outscores non-member) + P(tie) / 2 over all pairs, exactly. NaN where a side is empty."""
    members, non_members = _scores(members), _scores(non_members)
    if len(members) == 0 or len(non_members) == 0:
        return float("nan")
    return float(_wins(members, non_members).mean() / len(non_members))


def tpr_at_fpr(members: ArrayLike, non_members: ArrayLike, fpr: float) -> float | None:
    """Largest share of members caught by a threshold with at most `fpr` of the non-members called members.

    (Carlini et al. 2022, "Membership inference attacks from first principles".) None with fewer than 1 / fpr
    non-members: such a rate cannot be observed.
    """
    members, non_members = _scores(members), _scores(non_members)
    if len(members) == 0 or len(non_members) * fpr < 1 - 1e-9:
        return None
    allowed = int(np.floor(fpr * len(non_members) + 1e-9))
    if allowed >= len(non_members):
        return 1.0
    return float(np.mean(members > np.sort(non_members)[::-1][allowed]))


def roc_curve(members: ArrayLike, non_members: ArrayLike, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates [k] of the ROC curve from (0, 0) to (1, 1), ascending.

    At most `points` of the curve's corners are kept, those of few false positives densely, as a log scale shows them.
    """
    members, non_members = _scores(members), _scores(non_members)
    thresholds = np.r_[np.inf, np.unique(np.r_[members, non_members])[::-1], -np.inf]
    false_rates = above([non_members], thresholds)[:, 0] / len(non_members)
    true_rates = above([members], thresholds)[:, 0] / len(members)
    corner = np.r_[false_rates[1:] > false_rates[:-1], True]  # the last, best threshold of its false positive rate
    false_rates, true_rates = np.r_[0.0, false_rates[corner]], np.r_[0.0, true_rates[corner]]
    keep = thinned(len(false_rates), points)
    return false_rates[keep], true_rates[keep]


def thinned(positions: int, most: int) -> np.ndarray:
    """At most `most` of the positions 0 .. positions - 1: the first ones densely, the first and the last among them."""
    if positions <= most:
        return np.arange(positions)
    return np.unique(np.geomspace(1, positions, most).round().astype(int)) - 1


def above(scores: Sequence[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """[k, u] how many of each user's scores lie above each threshold."""
    counts = [len(of_user) - np.searchsorted(np.sort(_scores(of_user)), thresholds, side="right") for of_user in scores]
    return np.stack(counts, axis=1)


# --- resampled users -------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def resamples(n_users: int, n: int, seed: int) -> np.ndarray:
    """[n, u] how often each user is drawn in each of `n` draws of u users with replacement.

    `prime.users.metrics.bootstrap` draws from the same distribution in another way; figures on disk hold either to its
    own draws.
    """
    draws = np.random.default_rng(seed).integers(n_users, size=(n, n_users))
    return np.stack([np.bincount(row, minlength=n_users) for row in draws]).astype(float)


def pair_counts(members: Sequence[np.ndarray], non_members: Sequence[np.ndarray]) -> np.ndarray:
    """[u, u]: pairs (member of user i, non-member of user j) that the member wins, a tie counting half.

    The sufficient statistic of the pooled AUROC: any resample of users is a matrix product away.
    """
    owner = np.repeat(np.arange(len(members)), [len(m) for m in members])
    pooled = np.concatenate([np.asarray(m, dtype=float) for m in members])
    columns = [np.bincount(owner, _wins(pooled, n), minlength=len(members)) for n in non_members]
    return np.stack(columns, axis=1)


def pooled_auroc(wins: np.ndarray, members: np.ndarray, non_members: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[s] AUROC over all pairs of the drawn users. wins [u, u], numbers of records [u], draws [s, u]."""
    pairs = (draws @ members) * (draws @ non_members)
    return np.einsum("su,uv,sv->s", draws, wins, draws, optimize=True) / pairs


def mean_auroc(wins: np.ndarray, members: np.ndarray, non_members: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[s] mean over the drawn users of each user's own AUROC. Arguments as in `pooled_auroc`."""
    return draws @ (np.diagonal(wins) / (members * non_members)) / draws.sum(axis=1)


def pooled_tpr(
    members: Sequence[np.ndarray], non_members: Sequence[np.ndarray], fprs: Sequence[float], draws: np.ndarray
) -> dict[float, np.ndarray]:
    """[s] for each rate: `tpr_at_fpr` of all records of the drawn users, looked up at `MAX_THRESHOLDS` at most.

    Thresholds are non-members' scores in falling order, thinned where false positives are many, so a rate is never
    above the truth.
    """
    distinct = np.append(np.unique(np.concatenate(list(non_members)))[::-1], -np.inf)
    thresholds = distinct[thinned(len(distinct), MAX_THRESHOLDS)]
    false, true = above(non_members, thresholds), above(members, thresholds)
    drawn_non_members, drawn_members = draws @ false[-1], draws @ true[-1]
    rates = {}
    for fpr in fprs:
        at = _last_allowed(false, draws, fpr * drawn_non_members + 1e-9)
        rates[fpr] = np.einsum("su,su->s", draws, true[at]) / drawn_members
    return rates


def _last_allowed(false: np.ndarray, draws: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """[s] the last threshold with at most `allowed` [s] false positives among the drawn users, by bisection."""
    low, high = np.zeros(len(draws), int), np.full(len(draws), len(false) - 1)
    while np.any(low < high):
        middle = (low + high + 1) // 2
        fits = np.einsum("su,su->s", draws, false[middle]) <= allowed
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def two_way_auroc(
    members: Sequence[np.ndarray],
    non_members: Sequence[np.ndarray],
    users: Sequence[int],
    sharers: Sequence[int],
    *,
    n: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """AUROC of all pairs, with an interval that draws users and sharers, both with replacement.

    A sharer is merged for many users, whose records are then no independent draws. A pair counts as often as its
    user is drawn times its sharer is drawn (the pigeonhole bootstrap: Owen, 2007), on either side.

    Args:
        members, non_members: an array of scores, which may be empty, of each cell: a user and a sharer.
        users, sharers: of each cell, numbered from 0. Who comes again in another seed keeps the number.
    """
    by_user, by_sharer = resamples(max(users) + 1, n, seed), resamples(max(sharers) + 1, n, seed + 1)
    draws = np.vstack([np.ones(len(users)), by_user[:, list(users)] * by_sharer[:, list(sharers)]])
    sizes = np.array([len(m) for m in members], float), np.array([len(m) for m in non_members], float)
    drawn = (draws @ sizes[0] > 0) & (draws @ sizes[1] > 0)
    return _interval(pooled_auroc(pair_counts(members, non_members), *sizes, draws[drawn]))


# --- one attack ------------------------------------------------------------------------------------


def attack_summary(
    members: Sequence[np.ndarray],
    non_members: Sequence[np.ndarray],
    blind_members: Sequence[np.ndarray],
    blind_non_members: Sequence[np.ndarray],
    *,
    n: int = 2000,
    seed: int = 0,
) -> dict[str, object]:
    """One attack on u users: AUROC pooled and per user, true positive rates, with those on the base beside each.

    Every argument holds one array of scores per user, each with at least one score on either side. Intervals come
    from `n` resamples of users. The attack and its blind baseline share them, so `above_blind` is a paired
    difference. A rate that so few non-members cannot show is None.
    """
    sizes = np.array([len(m) for m in members], float), np.array([len(m) for m in non_members], float)
    draws = np.vstack([np.ones(len(members)), resamples(len(members), n, seed)])  # row 0: all users
    wins, blind_wins = pair_counts(members, non_members), pair_counts(blind_members, blind_non_members)
    summary: dict[str, object] = {}
    for name, statistic in (("auroc", pooled_auroc), ("user_auroc", mean_auroc)):
        attacked, blind = statistic(wins, *sizes, draws), statistic(blind_wins, *sizes, draws)
        summary[name] = _interval(attacked)
        summary[f"blind_{name}"] = _interval(blind)
        summary[f"{name}_above_blind"] = _interval(attacked - blind)
    summary["tpr_at_fpr"] = _rates(members, non_members, draws[1:])
    summary["blind_tpr_at_fpr"] = _rates(blind_members, blind_non_members, draws[1:])
    return summary


def _interval(values: np.ndarray) -> dict[str, float]:
    """The first of [1 + s] values, that of all users, with the interval of the others, its resamples."""
    return percentile_interval(values[0], values[1:])._asdict()


def _rates(
    members: Sequence[np.ndarray], non_members: Sequence[np.ndarray], draws: np.ndarray
) -> dict[str, dict[str, float] | None]:
    """`tpr_at_fpr` of the pooled records at each of `FPRS`, with its interval; None where it cannot be observed."""
    pooled = np.concatenate(list(members)), np.concatenate(list(non_members))
    points = {fpr: tpr_at_fpr(*pooled, fpr) for fpr in FPRS}
    observed = {fpr: point for fpr, point in points.items() if point is not None}
    resampled = pooled_tpr(members, non_members, list(observed), draws)
    rates: dict[str, dict[str, float] | None] = dict.fromkeys(map(str, FPRS))
    for fpr, point in observed.items():
        rates[str(fpr)] = percentile_interval(point, resampled[fpr])._asdict()
    return rates
