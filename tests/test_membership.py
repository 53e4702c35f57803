"""Attack scores, and AUROC against pair counting and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from prime import membership


def pairs(members, non_members):
    """The definition, one pair at a time."""
    won = [(m > n) + (m == n) / 2 for m in members for n in non_members]
    return sum(won) / len(won)


@pytest.fixture(params=range(5))
def scores(request):
    """Integer scores, so that ties are common."""
    rng = np.random.default_rng(request.param)
    return rng.integers(0, 9, 40).astype(float), rng.integers(-2, 8, 130).astype(float)


def test_auroc_is_pair_counting_and_scikit_learns(scores):
    members, non_members = scores
    truth = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
    assert membership.auroc(members, non_members) == pytest.approx(pairs(members, non_members), abs=1e-12)
    expected = roc_auc_score(truth, np.r_[members, non_members])
    assert membership.auroc(members, non_members) == pytest.approx(expected, abs=1e-12)


def test_swapping_members_and_non_members_gives_one_minus_auroc(scores):
    members, non_members = scores
    assert membership.auroc(non_members, members) == pytest.approx(1 - membership.auroc(members, non_members))


def test_auroc_extremes():
    assert membership.auroc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert membership.auroc([0.0], [1.0]) == 0.0
    assert membership.auroc([1.0, 1.0], [1.0]) == 0.5
    assert np.isnan(membership.auroc([], [1.0]))


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.1, 0.29, 1.0])
def test_tpr_at_fpr_is_the_best_threshold_of_the_roc_curve(scores, fpr):
    members, non_members = scores
    truth = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
    false, true, _ = roc_curve(truth, np.r_[members, non_members], drop_intermediate=False)
    assert membership.tpr_at_fpr(members, non_members, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())


def test_tpr_is_not_available_where_the_rate_cannot_be_observed():
    assert membership.tpr_at_fpr([1.0], np.zeros(99), 0.01) is None
    assert membership.tpr_at_fpr([1.0], np.zeros(100), 0.01) == 1.0
    assert membership.tpr_at_fpr([], np.zeros(100), 0.01) is None


def test_attacks_on_a_hand_made_record():
    adapter, base = np.array([-0.5, -1.0]), np.array([-1.0, -2.5])
    assert membership.ATTACKS["loss"](adapter, base) == -1.5
    assert membership.ATTACKS["calibrated"](adapter, base) == 2.0
    assert membership.ATTACKS["calibrated"](base, base) == 0.0


def attacked_users(shift, u=12, seed=0):
    """Scores of u users; members score higher by `shift`."""
    rng = np.random.default_rng(seed)
    return [rng.normal(shift, 1, 30) for _ in range(u)], [rng.normal(0, 1, 50) for _ in range(u)]


def test_pooled_and_per_user_auroc_of_the_summary():
    members, non_members = attacked_users(0.5)
    summary = membership.attack_summary(members, non_members, members, non_members, n=200)
    pooled = membership.auroc(np.concatenate(members), np.concatenate(non_members))
    own = np.mean([membership.auroc(m, n) for m, n in zip(members, non_members, strict=True)])
    assert summary["auroc"]["mean"] == pytest.approx(pooled)
    assert summary["user_auroc"]["mean"] == pytest.approx(own)
    assert summary["auroc"] == summary["blind_auroc"]
    assert summary["auroc_above_blind"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_resample_of_users_is_the_pooled_auroc_of_their_records():
    members, non_members = attacked_users(0.5, u=4)
    drawn = [0, 0, 2, 3]
    wins = membership.pair_counts(members, non_members)
    sizes = np.array([30.0] * 4), np.array([50.0] * 4)
    got = membership.pooled_auroc(wins, *sizes, np.array([[2.0, 0.0, 1.0, 1.0]]))
    again = [np.concatenate([side[i] for i in drawn]) for side in (members, non_members)]
    assert got[0] == pytest.approx(membership.auroc(*again))


def test_a_memorising_adapter_is_caught_and_a_random_one_is_not():
    caught = membership.attack_summary(*attacked_users(3), *attacked_users(0, seed=1))
    innocent = membership.attack_summary(*attacked_users(0, seed=2), *attacked_users(0, seed=1))
    assert caught["auroc"]["low"] > 0.9 and caught["auroc_above_blind"]["low"] > 0.4
    assert innocent["auroc"]["low"] < 0.5 < innocent["auroc"]["high"]


def test_intervals_are_seeded():
    users = attacked_users(0.5)
    first, again = (membership.attack_summary(*users, *users, n=100, seed=3) for _ in range(2))
    other = membership.attack_summary(*users, *users, n=100, seed=4)
    assert first == again
    assert first["auroc"] != other["auroc"]
