"""The objective: direction per task, penalty, reducers."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from prime.merging.objective import Objective, Score, score_by_likelihood
from prime.users.tasks import TASKS, Task

Texts = list[list[str]]


def scored(objective: Objective, trials: Texts, sharers: list[Texts], weights: Sequence[float] = (1.0,)) -> Score:
    return objective.score(objective.trials(trials, sharers), torch.tensor(weights))


MOVIE, RATING, TITLE = TASKS["movie_tagging"], TASKS["product_rating"], TASKS["scholarly_title"]


def test_utility_alone_is_the_sum_of_the_metrics() -> None:
    score = scored(Objective(MOVIE, ["comedy", "action"], 0.0), [["comedy", "action"]], [[["comedy", "comedy"]]])
    assert score.utility == pytest.approx(1.0 + 2 / 15)  # accuracy, macro-F1 over 15 labels
    assert score.loss == pytest.approx(-score.utility)


def test_resembling_the_sharers_costs_penalty_times_mean_similarity() -> None:
    golds, answers = ["comedy", "action"], ["comedy", "romance"]
    sharers = [["comedy", "romance"], ["action", "action"]]
    score = scored(Objective(MOVIE, golds, penalty=0.5), [answers], [[own] for own in sharers])
    one, other = (scored(Objective(MOVIE, own, 0.0), [answers], [[golds]]).utility for own in sharers)
    assert score.similarity == pytest.approx((one + other) / 2)
    assert score.loss == pytest.approx(-(score.utility - 0.5 * score.similarity))


def test_for_error_metrics_less_is_better_and_distance_from_sharers_is_rewarded() -> None:
    golds = ["5", "5"]
    objective = Objective(RATING, golds, penalty=0.5)
    exact_copy = scored(objective, [["5", "5"]], [[["5", "5"]]])
    exact_apart = scored(objective, [["5", "5"]], [[["1", "1"]]])
    wrong = scored(objective, [["1", "1"]], [[["5", "5"]]])
    assert exact_copy.loss == 0 and exact_copy.similarity == 0
    assert exact_apart.loss == pytest.approx(-0.5 * 8)  # MAE 4 + RMSE 4 away from the sharer
    assert scored(Objective(RATING, golds, 0.0), [["5", "5"]], [[["1", "1"]]]).loss < wrong.loss


def published_similarity(answers: list[str], sharer: list[str], labels: Sequence[str]) -> float:
    """As the published code computes it: texts become places among the labels, all others -1."""
    places = {label: place for place, label in enumerate(labels)}
    preds, golds = ([places.get(text, -1) for text in texts] for texts in (answers, sharer))
    f1 = f1_score(golds, preds, labels=range(len(labels)), average="macro", zero_division=0)
    return float(accuracy_score(golds, preds) + f1)


def test_unknown_answers_resemble_each_other_as_published_and_nobody_by_default() -> None:
    golds = ["comedy"] * 4
    answers, sharer = ["comedy", "a film", "what?", "action"], ["comedy", "who knows", "classic", "no tag"]
    alike = Objective(MOVIE, golds, 0.1, unknown_answers="alike")
    assert alike.resemblance(answers, sharer) == pytest.approx(
        published_similarity(answers, sharer, MOVIE.history_labels or ())
    )
    assert alike.resemblance(answers, sharer) == pytest.approx(
        Objective(MOVIE, golds, 0.1).resemblance(answers, sharer) + 1 / 4
    )
    assert alike.agreement(answers, golds) == Objective(MOVIE, golds, 0.1).agreement(answers, golds)


def test_a_sharers_rating_that_is_no_number_is_in_the_middle_as_published() -> None:
    alike, distinct = (Objective(RATING, ["3"], 0.1, "first", unknown_answers=how) for how in ("alike", "distinct"))
    assert alike.resemblance(["4"], ["good"]) == 1.5
    assert alike.resemblance(["bad"], ["good"]) == 2.5  # an answer that is none is at the farther end
    assert (distinct.resemblance(["4"], ["good"]), distinct.resemblance(["bad"], ["good"])) == (3, 0)


def test_the_error_of_the_search_has_the_ends_of_the_scale() -> None:
    ten = dataclasses.replace(RATING, scale=(0.0, 10.0))
    objective, alike = (Objective(ten, ["8"], 0.1, "first", unknown_answers=how) for how in ("distinct", "alike"))
    assert objective.agreement(["none"], ["8"]) == 8 and objective.agreement(["none"], ["2"]) == 8
    assert alike.resemblance(["4"], ["none"]) == 1  # half of the highest is 5


@pytest.mark.parametrize(("reducer", "expected"), [("mean", -0.5), ("min", -1.0), ("max", 0.0)])
def test_repeats_are_reduced_by_name(reducer: str, expected: float) -> None:
    trials = [["a b", "c d"], ["x", "y"]]
    objective = Objective(TITLE, ["a b", "c d"], 0.0, m_reduce="mean", t_reduce=reducer)
    score = scored(objective, trials, [[["q", "q"], ["q", "q"]]])
    assert score.loss == score.unpenalised == pytest.approx(expected)
    assert score.utility == pytest.approx(0.5)


def test_metric_reducers() -> None:
    golds, answers = ["comedy"], [["comedy"]]
    by = {
        name: scored(Objective(MOVIE, golds, 0.0, m_reduce=name), answers, [[["action"]]]).utility
        for name in ("sum", "mean", "first")
    }
    assert by["first"] == 1.0 and by["sum"] == pytest.approx(1 + 1 / 15) and by["mean"] == pytest.approx(by["sum"] / 2)


def test_lorahubs_score_is_the_records_mean_nll_plus_the_weights_size() -> None:
    logprobs = [torch.tensor([-1.0, -3.0]), torch.tensor([-4.0])]  # token means 2 and 4
    found = score_by_likelihood(logprobs, torch.tensor([1.5, -0.5, 0.0]))
    assert found.unpenalised == pytest.approx(3.0) and found.utility == -found.unpenalised
    assert found.loss == pytest.approx(3.0 + 0.05 * 2.0 / 3) and found.similarity == 0.0
    by_layer = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert score_by_likelihood(logprobs, by_layer).loss == pytest.approx(3.0 + 0.05 * 0.5)


def test_without_history_lorahub_stays_at_the_base() -> None:
    assert score_by_likelihood([], torch.zeros(3)).loss == 0.0 < score_by_likelihood([], torch.ones(3)).loss


@pytest.mark.parametrize("task", [MOVIE, RATING], ids=lambda task: task.name)
def test_the_loss_is_unpenalised_plus_penalty_times_cost(task: Task) -> None:
    golds, answers, sharers = ["5", "1"], [["5", "3"]], [[["4", "3"]], [["5", "1"]]]
    free, dear = (scored(Objective(task, golds, penalty), answers, sharers) for penalty in (0.0, 0.5))
    assert free.loss == free.unpenalised == dear.unpenalised
    assert dear.loss == pytest.approx(dear.unpenalised + 0.5 * dear.cost) and free.cost == dear.cost
    assert free.cost == pytest.approx(free.similarity if task is MOVIE else -free.similarity)
