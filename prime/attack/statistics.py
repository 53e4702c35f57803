"""How well scores tell members apart: AUROC, TPR at a low FPR, ROC, and intervals over resampled users."""
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from prime.attack.scoring import ATTACKS, PUBLISHED_ATTACK, SETS

Interval = dict[str, float]


Scores = Sequence[float] | np.ndarray


FPRS = (0.1, 0.01, 0.001)


MAX_THRESHOLDS = 4096  # that a resample's rates are looked up at


def _wins(members: Scores, non_members: Scores) -> np.ndarray:
    """For each member, the number of non-members it outscores, a tie counting half."""
    ordered = np.sort(np.asarray(non_members, dtype=float))
    members = np.asarray(members, dtype=float)
    below = np.searchsorted(ordered, members, side="left")
    not_above = np.searchsorted(ordered, members, side="right")
    return (below + not_above) / 2


def auroc(member_scores: Scores, non_member_scores: Scores) -> float:
    """P(member outscores non-member) + P(tie) / 2 over all pairs, exactly. NaN where a side is empty."""
    if len(member_scores) == 0 or len(non_member_scores) == 0:
        return float("nan")
    return float(_wins(member_scores, non_member_scores).mean() / len(non_member_scores))


def tpr_at_fpr(member_scores: Scores, non_member_scores: Scores, fpr: float) -> float | None:
    """Largest share of members caught by a threshold with at most `fpr` of the non-members called members.

    (Carlini et al. 2022, "Membership inference attacks from first principles".) None with fewer than 1 / fpr
    non-members: such a rate cannot be observed.
    """
    non_members = np.sort(np.asarray(non_member_scores, dtype=float))[::-1]
    if len(member_scores) == 0 or len(non_members) * fpr < 1 - 1e-9:
        return None
    allowed = int(np.floor(fpr * len(non_members) + 1e-9))
    if allowed >= len(non_members):
        return 1.0
    return float(np.mean(np.asarray(member_scores, dtype=float) > non_members[allowed]))


def pair_counts(members: Sequence[np.ndarray], non_members: Sequence[np.ndarray]) -> np.ndarray:
    """[u, u]: pairs (member of user i, non-member of user j) that the member wins, a tie counting half.

    The sufficient statistic of the pooled AUROC: any resample of users is a matrix product away.
    """
    owner = np.repeat(np.arange(len(members)), [len(m) for m in members])
    pooled = np.concatenate([np.asarray(m, dtype=float) for m in members])
    columns = [np.bincount(owner, _wins(pooled, n), minlength=len(members)) for n in non_members]
    return np.stack(columns, axis=1)


@lru_cache(maxsize=8)
def resamples(n_users: int, n: int, seed: int) -> np.ndarray:
    """[n, u] times each user is drawn in each of `n` draws of u users with replacement."""
    draws = np.random.default_rng(seed).integers(n_users, size=(n, n_users))
    return np.stack([np.bincount(row, minlength=n_users) for row in draws]).astype(float)


def pooled_auroc(wins: np.ndarray, members: np.ndarray, non_members: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[s] AUROC of all pairs of the drawn users. wins [u, u], numbers of records [u], draws [s, u]."""
    pairs = (draws @ members) * (draws @ non_members)
    return np.einsum("su,uv,sv->s", draws, wins, draws, optimize=True) / pairs


def mean_auroc(wins: np.ndarray, members: np.ndarray, non_members: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[s] mean over the drawn users of each user's own AUROC. Arguments as in `pooled_auroc`."""
    return draws @ (np.diagonal(wins) / (members * non_members)) / draws.sum(axis=1)


def thinned(positions: int, most: int) -> np.ndarray:
    """At most `most` of the positions 0 .. positions - 1, the first ones densely, the first and the last among them."""
    if positions <= most:
        return np.arange(positions)
    return np.unique(np.geomspace(1, positions, most).round().astype(int)) - 1


def above(scores: Sequence[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """[k, u] how many of each user's scores lie above each threshold."""
    counts = [len(own) - np.searchsorted(np.sort(own), thresholds, side="right") for own in scores]
    return np.stack(counts, axis=1)


def pooled_tpr(
    members: Sequence[np.ndarray], non_members: Sequence[np.ndarray], fprs: Sequence[float], draws: np.ndarray
) -> dict[float, np.ndarray]:
    """[s] of each rate: `tpr_at_fpr` of all records of the drawn users, looked up at `MAX_THRESHOLDS` at most.

    Thresholds are non-members' scores in falling order, thinned where false positives are many, so a rate is never
    above the truth.
    """
    distinct = np.append(np.unique(np.concatenate(list(non_members)))[::-1], -np.inf)
    thresholds = distinct[thinned(len(distinct), MAX_THRESHOLDS)]
    false, true = above(non_members, thresholds), above(members, thresholds)
    drawn_non_members, drawn_members = draws @ false[-1], draws @ true[-1]
    found = {}
    for fpr in fprs:
        at = _last_allowed(false, draws, fpr * drawn_non_members + 1e-9)
        found[fpr] = np.einsum("su,su->s", draws, true[at]) / drawn_members
    return found


def _last_allowed(false: np.ndarray, draws: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """[s] the last threshold with at most `allowed` [s] false positives among the drawn users, by bisection."""
    low, high = np.zeros(len(draws), int), np.full(len(draws), len(false) - 1)
    while np.any(low < high):
        middle = (low + high + 1) // 2
        fits = np.einsum("su,su->s", draws, false[middle]) <= allowed
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def roc(members: Scores, non_members: Scores, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates [k] of the ROC curve from (0, 0) to (1, 1), ascending.

    At most `points` of the curve's corners: those of few false positives densely, as a log scale shows them.
    """
    members, non_members = np.asarray(members, float), np.asarray(non_members, float)
    thresholds = np.r_[np.inf, np.unique(np.r_[members, non_members])[::-1], -np.inf]
    false, true = (above([side], thresholds)[:, 0] / len(side) for side in (non_members, members))
    corner = np.r_[false[1:] > false[:-1], True]  # the last, best threshold of its false positive rate
    false, true = np.r_[0.0, false[corner]], np.r_[0.0, true[corner]]
    keep = thinned(len(false), points)
    return false[keep], true[keep]


def interval(point: float, resampled: np.ndarray) -> Interval:
    """Point estimate with the central 95 % of its resamples."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"mean": float(point), "low": float(low), "high": float(high)}


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

    Every argument holds one array of scores per user, each with at least one score on either side. Intervals
    come from `n` resamples of users, the same ones for the attack and its blind baseline, so `above_blind`
    is a paired difference. A rate that so few non-members cannot show is None.
    """
    sizes = np.array([len(m) for m in members], float), np.array([len(m) for m in non_members], float)
    draws = np.vstack([np.ones(len(members)), resamples(len(members), n, seed)])  # row 0: all users
    wins, blind_wins = pair_counts(members, non_members), pair_counts(blind_members, blind_non_members)
    summary: dict[str, object] = {}
    for name, statistic in (("auroc", pooled_auroc), ("user_auroc", mean_auroc)):
        attacked, blind = statistic(wins, *sizes, draws), statistic(blind_wins, *sizes, draws)
        difference = attacked - blind
        summary[name] = interval(attacked[0], attacked[1:])
        summary[f"blind_{name}"] = interval(blind[0], blind[1:])
        summary[f"{name}_above_blind"] = interval(difference[0], difference[1:])
    summary["tpr_at_fpr"] = _rates(members, non_members, draws[1:])
    summary["blind_tpr_at_fpr"] = _rates(blind_members, blind_non_members, draws[1:])
    return summary


def _rates(
    members: Sequence[np.ndarray], non_members: Sequence[np.ndarray], draws: np.ndarray
) -> dict[str, Interval | None]:
    """`tpr_at_fpr` of the pooled records at each of `FPRS`, with its interval; None where it cannot be observed."""
    pooled = np.concatenate(list(members)), np.concatenate(list(non_members))
    points = {fpr: tpr_at_fpr(*pooled, fpr) for fpr in FPRS}
    shown = {fpr: point for fpr, point in points.items() if point is not None}
    resampled = pooled_tpr(members, non_members, list(shown), draws)
    return {str(fpr): interval(shown[fpr], resampled[fpr]) if fpr in shown else None for fpr in FPRS}


def set_scores(result: Mapping, key: str, attack: str, name: str) -> list[np.ndarray]:
    """Members' and non-members' scores of one user in a set. key: "scores", or "blind" for those on the base.

    A result holds {key: {attack: {side: scores of records, anchor after anchor}}} and each side's numbers of
    records by anchor as `<side>_num_samples`.
    """

    def of(side: str) -> np.ndarray:
        scores = np.array(result[key][attack].get(side, ()), dtype=float)
        if name != "user":
            return scores
        parts = np.split(scores, np.cumsum(result[f"{side}_num_samples"])[:-1])
        return np.array([part.mean() for part in parts if len(part)])

    return [of(side) for side in SETS[name]]


def in_set(results: Sequence[Mapping], name: str) -> list[Mapping]:
    """The users who have members and non-members in a set."""
    shown = [(result, set_scores(result, "scores", PUBLISHED_ATTACK, name)) for result in results]
    return [result for result, sides in shown if all(len(side) for side in sides)]


def attacks_on(results: Sequence[Mapping]) -> list[str]:
    """The attacks that all of these results hold."""
    return [name for name in ATTACKS if all(name in result["scores"] for result in results)]


def attack_table(
    results: Sequence[Mapping], name: str = "published", *, n: int = 2000, seed: int = 0
) -> dict[str, dict[str, object]]:
    """`attack_summary` of every attack in per-user results (see `set_scores`), for one set; empty without users."""
    users = in_set(results, name)
    table = {}
    for attack in attacks_on(users) if users else ():
        columns = [[set_scores(user, key, attack, name) for user in users] for key in ("scores", "blind")]
        sides = [[pair[side] for pair in column] for column in columns for side in (0, 1)]
        table[attack] = attack_summary(*sides, n=n, seed=seed)
    return table


def set_summary(results: Sequence[Mapping], name: str, *, n: int = 2000, seed: int = 0) -> dict[str, object]:
    """A set's numbers of users, members and non-members, and its `attack_table`."""
    users = in_set(results, name)
    sides = [set_scores(user, "scores", PUBLISHED_ATTACK, name) for user in users]
    counts = {side: sum(len(pair[place]) for pair in sides) for place, side in enumerate(("members", "non_members"))}
    return {"users": len(users), **counts, "attacks": attack_table(users, name, n=n, seed=seed)}


def user_aurocs(result: Mapping) -> dict[str, dict[str, float]]:
    """AUROC of every attack on one user, and of the same attack on the base (`blind`).

    Where records were held out, also `controlled` and `controlled_blind`.
    """
    table: dict[str, dict[str, float]] = {}
    for name, keys in (("published", ("auroc", "blind")), ("controlled", ("controlled", "controlled_blind"))):
        for attack in attacks_on([result]) if in_set([result], name) else ():
            found = (auroc(*set_scores(result, key, attack, name)) for key in ("scores", "blind"))
            table.setdefault(attack, {}).update(zip(keys, found, strict=True))
    return table
