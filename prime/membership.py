"""Membership inference: attack scores over per-token log-probabilities, and how well they tell members apart.

Everything here is a pure function of numpy arrays, so an attack can be tried on any model whose token
log-probabilities are at hand. Direction, everywhere: *a higher score means "more likely a member"*.

Letters: `t` target tokens of a record (EOS included), `u` users (or sharers: the unit that is resampled),
`s` resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Attack = Callable[[np.ndarray, np.ndarray], float]
Interval = dict[str, float]
Scores = Sequence[float] | np.ndarray

FPRS = (0.01, 0.001)


def summed_loss(adapter: np.ndarray, base: np.ndarray) -> float:
    """The published attack (PriME; Yeom et al. 2018): the record's summed token loss, negated.

    `adapter` [t], `base` [t] are log-probabilities of the target tokens; `base` is not used. A record that
    the attacked model finds likely (low loss) is called a member; sums mix length with membership.
    """
    return float(np.sum(adapter))


def calibrated_loss(adapter: np.ndarray, base: np.ndarray) -> float:
    """Base-calibrated ("difficulty calibration", Watson et al. 2022): base loss minus adapter loss, summed.

    How much likelier the adapter makes the record than the task-adapted base does. Attacking the base itself
    scores 0 for every record, so its blind baseline is 0.5 by construction.
    """
    return float(np.sum(adapter) - np.sum(base))


# name -> score(token log-probabilities under the attacked model, the same under the task-adapted base)
ATTACKS: dict[str, Attack] = {"loss": summed_loss, "calibrated": calibrated_loss}
PUBLISHED_ATTACK = "loss"


def record_scores(
    attacked: Mapping[str, Sequence[np.ndarray]], base: Mapping[str, Sequence[np.ndarray]], owners: Sequence[str]
) -> dict[str, list[float]]:
    """Every attack's score of the records of `owners`, in order; both models hold each owner's records as [t]."""
    pairs = [pair for owner in owners for pair in zip(attacked[owner], base[owner], strict=True)]
    return {name: [score(*pair) for pair in pairs] for name, score in ATTACKS.items()}


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
    """One attack on u users: AUROC pooled and per user, with the same attack on the base beside each.

    Every argument holds one array of scores per user, each with at least one score on either side. Intervals
    come from `n` resamples of users, the same ones for the attack and its blind baseline, so `above_blind`
    is a paired difference.
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
    pooled = np.concatenate(list(members)), np.concatenate(list(non_members))
    summary["tpr_at_fpr"] = {str(fpr): tpr_at_fpr(*pooled, fpr) for fpr in FPRS}
    return summary


def attack_table(results: Sequence[Mapping], *, n: int = 2000, seed: int = 0) -> dict[str, dict[str, object]]:
    """`attack_summary` of every attack in per-user results.

    Each result holds `scores` and `blind`: {attack: {"member": [...], "non_member": [...]}}.
    """

    def column(key: str, attack: str, side: str) -> list[np.ndarray]:
        return [np.array(result[key][attack][side], dtype=float) for result in results]

    columns = [(key, side) for key in ("scores", "blind") for side in ("member", "non_member")]
    return {
        attack: attack_summary(*(column(key, attack, side) for key, side in columns), n=n, seed=seed)
        for attack in results[0]["scores"]
    }


def user_aurocs(result: Mapping) -> dict[str, dict[str, float]]:
    """AUROC of every attack on one user, and of the same attack on the base (`blind`); see `attack_table`."""
    return {
        attack: {
            name: auroc(result[key][attack]["member"], result[key][attack]["non_member"])
            for name, key in (("auroc", "scores"), ("blind", "blind"))
        }
        for attack in result["scores"]
    }
