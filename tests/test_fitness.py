"""The objective: direction per task, penalty, reducers."""

import pytest
import torch

from prime.fitness import Objective, likelihood_score
from prime.tasks import TASKS

MOVIE, RATING, TITLE = TASKS["movie_tagging"], TASKS["product_rating"], TASKS["scholarly_title"]


def test_utility_alone_is_the_sum_of_the_metrics() -> None:
    score = Objective(MOVIE, ["comedy", "action"], penalty=0.0)([["comedy", "action"]], [[["comedy", "comedy"]]])
    assert score.utility == pytest.approx(1.0 + 2 / 15)  # accuracy, macro-F1 over 15 labels
    assert score.loss == pytest.approx(-score.utility)


def test_resembling_the_sharers_costs_penalty_times_mean_similarity() -> None:
    golds, answers = ["comedy", "action"], ["comedy", "romance"]
    sharers = [["comedy", "romance"], ["action", "action"]]
    score = Objective(MOVIE, golds, penalty=0.5)([answers], [[own] for own in sharers])
    one, other = (Objective(MOVIE, own, 0.0)([answers], [[golds]]).utility for own in sharers)
    assert score.similarity == pytest.approx((one + other) / 2)
    assert score.loss == pytest.approx(-(score.utility - 0.5 * score.similarity))


def test_for_error_metrics_less_is_better_and_distance_from_sharers_is_rewarded() -> None:
    golds = ["5", "5"]
    objective = Objective(RATING, golds, penalty=0.5)
    exact_copy = objective([["5", "5"]], [[["5", "5"]]])
    exact_apart = objective([["5", "5"]], [[["1", "1"]]])
    wrong = objective([["1", "1"]], [[["5", "5"]]])
    assert exact_copy.loss == 0 and exact_copy.similarity == 0
    assert exact_apart.loss == pytest.approx(-0.5 * 8)  # MAE 4 + RMSE 4 away from the sharer
    assert Objective(RATING, golds, 0.0)([["5", "5"]], [[["1", "1"]]]).loss < wrong.loss


@pytest.mark.parametrize(("reducer", "expected"), [("mean", -0.5), ("min", -1.0), ("max", 0.0)])
def test_repeats_are_reduced_by_name(reducer: str, expected: float) -> None:
    trials = [["a b", "c d"], ["x", "y"]]
    objective = Objective(TITLE, ["a b", "c d"], 0.0, m_reduce="mean", t_reduce=reducer)
    score = objective(trials, [[["q", "q"], ["q", "q"]]])
    assert score.loss == score.unpenalised == pytest.approx(expected)
    assert score.utility == pytest.approx(0.5)


def test_metric_reducers() -> None:
    golds, answers = ["comedy"], [["comedy"]]
    by = {
        name: Objective(MOVIE, golds, 0.0, m_reduce=name)(answers, [[["action"]]]).utility
        for name in ("sum", "mean", "first")
    }
    assert by["first"] == 1.0 and by["sum"] == pytest.approx(1 + 1 / 15) and by["mean"] == pytest.approx(by["sum"] / 2)


def test_lorahubs_score_is_the_records_mean_nll_plus_the_weights_size() -> None:
    logprobs = [torch.tensor([-1.0, -3.0]), torch.tensor([-4.0])]  # token means 2 and 4
    found = likelihood_score(torch.tensor([1.5, -0.5, 0.0]), logprobs)
    assert found.unpenalised == pytest.approx(3.0) and found.utility == -found.unpenalised
    assert found.loss == pytest.approx(3.0 + 0.05 * 2.0 / 3) and found.similarity == 0.0
    by_layer = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert likelihood_score(by_layer, logprobs).loss == pytest.approx(3.0 + 0.05 * 0.5)


def test_without_history_lorahub_stays_at_the_base() -> None:
    assert likelihood_score(torch.zeros(3), []).loss == 0.0 < likelihood_score(torch.ones(3), []).loss
