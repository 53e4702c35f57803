"""Attack scores, and AUROC against pair counting and scikit-learn."""

import zlib

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from prime.attack import scoring, sets, statistics
from prime.errors import InputError


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
    assert statistics.auroc(members, non_members) == pytest.approx(pairs(members, non_members), abs=1e-12)
    expected = roc_auc_score(truth, np.r_[members, non_members])
    assert statistics.auroc(members, non_members) == pytest.approx(expected, abs=1e-12)


def test_swapping_members_and_non_members_gives_one_minus_auroc(scores):
    members, non_members = scores
    assert statistics.auroc(non_members, members) == pytest.approx(1 - statistics.auroc(members, non_members))


@pytest.mark.parametrize("side", [0, 1])
def test_a_score_that_is_no_number_is_no_score(side):
    """Sorted last it would be the best of all: one such record made an AUROC of 1."""
    scores = [[-3.0, -2.0, -1.0], [-4.0, -2.5]]
    scores[side][1] = float("nan")
    of_users = [[np.array(one)] for one in scores]
    for function in (
        lambda: statistics.auroc(*scores),
        lambda: statistics.tpr_at_fpr(*scores, 0.5),
        lambda: statistics.roc_curve(*scores),
        lambda: statistics.pair_counts(*of_users),
        lambda: statistics.above(of_users[side], np.array([0.0])),
    ):
        with pytest.raises(InputError, match="1 of [23] attack scores are no numbers"):
            function()


def test_auroc_extremes():
    assert statistics.auroc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert statistics.auroc([0.0], [1.0]) == 0.0
    assert statistics.auroc([1.0, 1.0], [1.0]) == 0.5
    assert np.isnan(statistics.auroc([], [1.0]))


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.1, 0.29, 1.0])
def test_tpr_at_fpr_is_the_best_threshold_of_the_roc_curve(scores, fpr):
    members, non_members = scores
    truth = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
    false, true, _ = roc_curve(truth, np.r_[members, non_members], drop_intermediate=False)
    assert statistics.tpr_at_fpr(members, non_members, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())


def test_tpr_is_not_available_where_the_rate_cannot_be_observed():
    assert statistics.tpr_at_fpr([1.0], np.zeros(99), 0.01) is None
    assert statistics.tpr_at_fpr([1.0], np.zeros(100), 0.01) == 1.0
    assert statistics.tpr_at_fpr([], np.zeros(100), 0.01) is None


def test_two_way_auroc_is_the_pooled_one_and_its_draws_weigh_pairs_by_user_and_sharer():
    """Against records that are written out as often as their user times their sharer is drawn."""
    rng = np.random.default_rng(3)
    users, sharers = [0, 0, 1, 2, 2], [0, 1, 1, 0, 2]
    members = [rng.integers(0, 9, 4).astype(float) for _ in users]
    others = [rng.integers(-2, 8, size).astype(float) for size in (3, 0, 2, 4, 1)]
    found = statistics.two_way_auroc(members, others, users, sharers, n=200, seed=5)
    assert found["mean"] == pytest.approx(pairs(np.concatenate(members), np.concatenate(others)))
    drawn = []
    for of_user, of_sharer in zip(statistics.resamples(3, 200, 5), statistics.resamples(3, 200, 6), strict=True):
        times = [int(of_user[u] * of_sharer[s]) for u, s in zip(users, sharers, strict=True)]
        sides = []
        for side in (members, others):
            sides.append(np.concatenate([np.repeat(cell, often) for cell, often in zip(side, times, strict=True)]))
        if min(map(len, sides)):
            drawn.append(pairs(*sides))
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]))


def test_two_way_intervals_hold_the_truth_where_those_of_users_alone_do_not():
    """Worlds without leakage, in which what separates a sharer's records is the sharer's and comes with each user."""
    held = {"both": 0, "users": 0}
    for world in range(60):
        rng = np.random.default_rng(world)
        cells = [(user, sharer) for user in range(16) for sharer in rng.choice(10, 3, replace=False)]
        users, sharers = zip(*cells, strict=True)
        shift = rng.normal(0, 1.0, 10)  # of a sharer's trained records; 0 in the mean
        members = [rng.normal(shift[sharer], 1, 8) for sharer in sharers]
        others = [rng.normal(0, 1, 4) for _ in sharers]
        both = statistics.two_way_auroc(members, others, users, sharers, n=200)
        by_user = [[np.concatenate(side[3 * u : 3 * u + 3]) for u in range(16)] for side in (members, others)]
        users_alone = statistics.attack_summary(*by_user, *by_user, n=200)["auroc"]
        for name, interval in (("both", both), ("users", users_alone)):
            held[name] += interval["low"] <= 0.5 <= interval["high"]
    assert held["both"] >= 52 > held["users"] + 10


def evidence(adapter, base=(), mean=(), std=(), **more):
    return scoring.Evidence(*(np.array(values, float) for values in (adapter, base, mean, std)), **more)


def test_losses_of_a_hand_made_record():
    record = evidence([-0.5, -1.0], [-1.0, -2.5])
    assert scoring.ATTACKS["loss"](record) == -1.5
    assert scoring.ATTACKS["mean_loss"](record) == -0.75
    assert scoring.ATTACKS["calibrated"](record) == 2.0
    assert scoring.ATTACKS["calibrated"](evidence(record.base, record.base)) == 0.0


def test_logit_is_the_log_odds_of_the_target_against_the_base():
    record = evidence(np.log([0.9, 0.5]), np.log([0.5, 0.2]))  # the target: 0.45 for 0.1
    assert scoring.ATTACKS["logit"](record) == pytest.approx(np.log(0.45 / 0.55) - np.log(0.1 / 0.9))
    assert scoring.ATTACKS["logit"](evidence(record.base, record.base)) == 0.0
    sure, surer = (scoring.ATTACKS["logit"](evidence(np.log([p]), np.log([0.5]))) for p in (0.99, 0.9999))
    assert surer - sure == pytest.approx(np.log(9999 / 99))  # where their losses differ by 0.01
    certain = scoring.ATTACKS["logit"](evidence([0.0], np.log([0.5])))  # fp32 says so of what is nearly certain
    assert surer < certain < 17
    assert scoring.ATTACKS["logit"](evidence([1e-7], np.log([0.5]))) == pytest.approx(certain)


def test_zlib_prefers_what_is_likelier_than_it_is_compressible():
    """Equally likely: the text that compresses worse is likelier a member."""
    plain, odd = (evidence([-1.0, -2.0], text=text) for text in ("a" * 60, "q8#kZ" * 2 + "v!7Lw0)xM~" * 1 + "hB$2&nT9"))
    assert scoring.ATTACKS["zlib"](plain) == -1.5 / len(zlib.compress(b"a" * 60))
    assert scoring.ATTACKS["zlib"](odd) > scoring.ATTACKS["zlib"](plain)


def test_min_k_is_the_mean_of_the_least_likely_fifth_and_of_one_token_at_least():
    assert scoring.ATTACKS["min_k"](evidence(-np.arange(10.0))) == -8.5
    assert scoring.ATTACKS["min_k"](evidence([-1.0, -3.0, -2.0])) == -3.0
    assert scoring.ATTACKS["min_k"](evidence([-2.0])) == -2.0


def test_min_k_plus_plus_is_in_deviations_from_what_the_model_expects():
    found = scoring.ATTACKS["min_k_pp"](evidence([-1.0, -5.0, -2.0], mean=[-2.0, -4.0, -2.0], std=[2.0, 0.25, 1.0]))
    assert found == -4.0  # (-5 + 4) / 0.25
    sure = scoring.ATTACKS["min_k_pp"](evidence([0.0], mean=[0.0], std=[0.0]))
    assert sure == 0.0


def test_rmia_is_the_share_of_the_population_that_is_beaten_twice():
    """P_out of the record is (0.5 + 0.1) / 2; its own probability 0.6."""
    references = np.log([0.5, 0.1])
    own = 0.6 / ((1.3 * 0.3 + 0.7) / 2)
    ratio = scoring.rmia_ratio(np.log(0.6), references)
    assert ratio == pytest.approx(np.log(own))
    others = np.log([own / 4, own / 2.01, own / 1.99, own * 2])
    assert scoring.ATTACKS["rmia"](evidence(np.log([0.6, 0.6]), references=references, population=others)) == 0.5


def test_every_attack_calls_what_was_learned_a_member():
    """The direction: a record that the adapter made likelier than base and references scores higher."""
    rng = np.random.default_rng(0)
    base = rng.normal(-2, 0.5, 12)
    more = {"text": "a target", "references": np.array([-2.0, -2.1]), "population": np.linspace(-1, 1, 9)}
    learned, not_learned = (
        evidence(base + gain, base, np.full(12, -1.5), np.full(12, 0.7), **more) for gain in (1.2, 0.0)
    )
    for name, attack in scoring.ATTACKS.items():
        assert attack(learned) > attack(not_learned), name


def test_without_references_there_is_no_rmia():
    assert list(scoring.record_scores([evidence([-1.0], [-1.0], [-1.0], [1.0])])) == [
        name for name in scoring.ATTACKS if name != "rmia"
    ]


def attacked_users(shift, u=12, seed=0):
    """Scores of u users; members score higher by `shift`."""
    rng = np.random.default_rng(seed)
    return [rng.normal(shift, 1, 30) for _ in range(u)], [rng.normal(0, 1, 50) for _ in range(u)]


def test_resampled_rates_are_those_of_the_drawn_users_records():
    members, non_members = attacked_users(1.0, u=5)
    draws = statistics.resamples(5, 40, seed=1)
    found = statistics.pooled_tpr(members, non_members, statistics.FPRS, draws)
    for place, times in enumerate(draws.astype(int)):
        pairs = [list(zip(side, times, strict=True)) for side in (members, non_members)]
        drawn = [np.concatenate([np.tile(own, n) for own, n in side]) for side in pairs]
        for fpr, rates in found.items():
            allowed = np.sort(drawn[1])[::-1][int(fpr * len(drawn[1]) + 1e-9)]
            assert rates[place] == pytest.approx(np.mean(drawn[0] > allowed)), fpr


def test_thinned_thresholds_never_flatter_an_attack(monkeypatch):
    members, non_members = attacked_users(1.0, u=5)
    draws = statistics.resamples(5, 40, seed=1)
    exact = statistics.pooled_tpr(members, non_members, [0.1], draws)[0.1]
    monkeypatch.setattr(statistics, "MAX_THRESHOLDS", 60)
    coarse = statistics.pooled_tpr(members, non_members, [0.1], draws)[0.1]
    assert np.all(coarse <= exact) and np.mean(exact - coarse) < 0.05


def test_roc_is_scikit_learns_and_thinning_keeps_its_corners(scores):
    members, non_members = scores
    truth = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
    expected = set(zip(*roc_curve(truth, np.r_[members, non_members], drop_intermediate=False)[:2], strict=True))
    fpr, tpr = statistics.roc_curve(members, non_members)
    assert {(x, y) for x, y in zip(fpr, tpr, strict=True)} <= expected
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.all(np.diff(fpr) >= 0) and np.all(np.diff(tpr) >= 0)
    rng = np.random.default_rng(0)
    many = rng.normal(1, 1, 5000), rng.normal(0, 1, 5000)
    thin, whole = statistics.roc_curve(*many), statistics.roc_curve(*many, points=10**6)
    assert len(thin[0]) <= 200 and set(zip(*thin, strict=True)) <= set(zip(*whole, strict=True))
    assert np.trapezoid(*whole[::-1]) == pytest.approx(statistics.auroc(*many), abs=1e-3)


def test_pooled_and_per_user_auroc_of_the_summary():
    members, non_members = attacked_users(0.5)
    summary = statistics.attack_summary(members, non_members, members, non_members, n=200)
    pooled = statistics.auroc(np.concatenate(members), np.concatenate(non_members))
    own = np.mean([statistics.auroc(m, n) for m, n in zip(members, non_members, strict=True)])
    assert summary["auroc"]["mean"] == pytest.approx(pooled)
    assert summary["user_auroc"]["mean"] == pytest.approx(own)
    assert summary["auroc"] == summary["blind_auroc"]
    assert summary["auroc_above_blind"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_resample_of_users_is_the_pooled_auroc_of_their_records():
    members, non_members = attacked_users(0.5, u=4)
    drawn = [0, 0, 2, 3]
    wins = statistics.pair_counts(members, non_members)
    sizes = np.array([30.0] * 4), np.array([50.0] * 4)
    got = statistics.pooled_auroc(wins, *sizes, np.array([[2.0, 0.0, 1.0, 1.0]]))
    again = [np.concatenate([side[i] for i in drawn]) for side in (members, non_members)]
    assert got[0] == pytest.approx(statistics.auroc(*again))


def test_a_memorising_adapter_is_caught_and_a_random_one_is_not():
    caught = statistics.attack_summary(*attacked_users(3), *attacked_users(0, seed=1))
    innocent = statistics.attack_summary(*attacked_users(0, seed=2), *attacked_users(0, seed=1))
    assert caught["auroc"]["low"] > 0.9 and caught["auroc_above_blind"]["low"] > 0.4
    assert innocent["auroc"]["low"] < 0.5 < innocent["auroc"]["high"]


def test_intervals_are_seeded():
    users = attacked_users(0.5)
    first, again = (statistics.attack_summary(*users, *users, n=100, seed=3) for _ in range(2))
    other = statistics.attack_summary(*users, *users, n=100, seed=4)
    assert first == again
    assert first["auroc"] != other["auroc"]


def result_of(member, non_member, held_out=None, numbers=((1, 2), (1, 1))):
    """One user's result: attack "loss" on what is given, the same number for every record on the base."""
    sides = {"member": member, "non_member": non_member} | ({"held_out": held_out} if held_out else {})
    blind = {side: [1.0] * len(own) for side, own in sides.items()}
    sizes = dict(zip(("member_num_samples", "non_member_num_samples"), numbers, strict=True))
    return {"scores": {"loss": sides}, "blind": {"loss": blind}, **sizes}


def test_user_aurocs_are_scikit_learns() -> None:
    found = sets.user_aurocs(result_of([3.0, 1.0, 2.0], [0.5, 2.0]))
    truth = [1, 1, 1, 0, 0]
    expected = pytest.approx(roc_auc_score(truth, [3, 1, 2, 0.5, 2]))
    assert found == {"loss": {"auroc": expected, "blind": 0.5}}
    controlled = sets.user_aurocs(result_of([3.0, 1.0, 2.0], [0.5, 2.0], [2.5, 0.0]))["loss"]
    assert controlled["controlled"] == pytest.approx(roc_auc_score(truth, [3, 1, 2, 2.5, 0]))
    assert controlled == {"auroc": expected, "blind": 0.5, "controlled_blind": 0.5} | controlled


def test_sets_hold_records_of_others_of_the_same_and_whole_users():
    result = result_of([3.0, 1.0, 2.0], [0.5, 2.0], [2.5, 0.0])
    told = {name: sets.set_scores(result, "scores", "loss", name) for name in sets.SETS}
    assert {name: [list(side) for side in sides] for name, sides in told.items()} == {
        "published": [[3.0, 1.0, 2.0], [0.5, 2.0]],
        "controlled": [[3.0, 1.0, 2.0], [2.5, 0.0]],
        "user": [[3.0, 1.5], [0.5, 2.0]],
    }
    without = result_of([3.0, 1.0, 2.0], [0.5, 2.0])
    assert sets.in_set([result, without], "controlled") == [result]
    assert sets.attack_summaries([without], "controlled") == {}
    counts = sets.set_summary([result, without], "user", n=10)
    assert (counts["users"], counts["members"], counts["non_members"]) == (2, 4, 4)
