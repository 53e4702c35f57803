"""The search against plain nevergrad, asked and told one candidate at a time."""

from collections.abc import Callable

import nevergrad as ng
import numpy as np
import pytest

from prime import settings
from prime.errors import InputError
from prime.merging.optimizer import (
    BOUND,
    STEP,
    Search,
    generation_size,
    make_optimizer,
    optimizer_name,
    ranked_weights,
)


def loss(weights: np.ndarray) -> float:
    """A rotated bowl with ripples; its minimum is outside the box, so that bounds matter."""
    flat = np.asarray(weights).ravel()
    slope = np.cumsum(flat) - 2.0
    return float(np.sum(slope**2) + 0.3 * np.sum(np.sin(5 * flat)))


def minimise(
    start: np.ndarray, evaluate: Callable[[list[np.ndarray]], list[float]], opt_type: str, budget: int, seed: int,
    step: float = STEP,
) -> list[tuple[np.ndarray, float]]:  # fmt: skip
    """One search from beginning to end, as `prime.merging.evolution.evolve` runs it: all points with their losses."""
    search = Search(start, opt_type, budget, seed, step)
    while search.open:
        search.tell(evaluate(search.ask()))
    return search.history


def published_box(shape: tuple[int, ...]) -> ng.p.Array:
    """As the published code makes it: nevergrad takes the step from the bounds, too, a sixth of the box."""
    return ng.p.Array(shape=shape, lower=-1.5, upper=1.5)


def one_at_a_time(space: ng.p.Array, name: str, budget: int, seed: int) -> list[tuple[np.ndarray, float]]:
    """nevergrad as its manual shows it."""
    space.random_state = np.random.RandomState(seed)
    optimizer = ng.optimizers.registry[name](space, budget=budget, num_workers=1)
    history = []
    for _ in range(budget):
        candidate = optimizer.ask()
        value = loss(candidate.value)
        history.append((candidate.value.copy(), value))
        optimizer.tell(candidate, value)
    return history


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 4)])
@pytest.mark.parametrize("opt_type", ["cma", "ngopt", "tbpsa"])
def test_the_published_step_asks_what_the_published_code_asks(opt_type: str, shape: tuple[int, ...]) -> None:
    step = settings.published(settings.SearchSettings)["step"]
    history = minimise(np.zeros(shape), lambda points: [loss(point) for point in points], opt_type, 12, 3, step)
    expected = one_at_a_time(published_box(shape), optimizer_name(opt_type), 12, 3)
    for (weights, _), (asked, _) in zip(history, expected, strict=True):
        np.testing.assert_array_equal(weights, asked)


def batched(shape: tuple[int, ...], opt_type: str, budget: int, seed: int) -> tuple[list, list[int]]:
    """The history and the sizes of the batches."""
    sizes: list[int] = []

    def evaluate(points: list[np.ndarray]) -> list[float]:
        sizes.append(len(points))
        return [loss(point) for point in points]

    return minimise(np.zeros(shape), evaluate, opt_type, budget, seed), sizes


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other)
    for (x, fx), (y, fy) in zip(one, other, strict=True):
        assert np.array_equal(x, y) and fx == fy


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
@pytest.mark.parametrize("budget", [7, 10, 23])
@pytest.mark.parametrize("seed", [0, 3])
def test_a_generation_at_once_is_the_trajectory_one_at_a_time(shape: tuple[int, ...], budget: int, seed: int) -> None:
    found, sizes = batched(shape, "cma", budget, seed)
    assert_same(found, one_at_a_time(published_box(shape), "CMA", budget, seed))
    population = 4 + int(np.log(np.prod(shape)))
    full, rest = divmod(budget, population)
    assert sizes == [population] * full + [rest] * (rest > 0)


@pytest.mark.parametrize(
    "name", ["NGOpt", "TBPSA", "OnePlusOne", "DiagonalCMA", "CMAstd", "DE", "PSO", "ChainCMAPowell", "MetaCMA"]
)
def test_other_optimisers_keep_their_trajectory(name: str) -> None:
    found, _ = batched((3,), name, 17, 1)
    space = ng.p.Array(init=np.zeros(3)).set_bounds(-1.5, 1.5).set_mutation(sigma=0.5)
    assert_same(found, one_at_a_time(space, name, 17, 1))


@pytest.mark.parametrize("opt_type", ["cma", "ngopt", "tbpsa", "RandomSearch"])
@pytest.mark.parametrize("budget", [1, 4, 12])
def test_the_budget_is_kept_inside_the_bounds(opt_type: str, budget: int) -> None:
    found, sizes = batched((3, 2), opt_type, budget, 0)
    assert len(found) == sum(sizes) == budget
    points = np.array([point for point, _ in found])
    assert points.shape == (budget, 3, 2) and points.dtype == np.float64
    assert (np.abs(points) <= BOUND).all()
    assert [value for _, value in found] == [loss(point) for point, _ in found]


def test_the_bounds_are_reached_for() -> None:
    """The bowl lies outside, so a search without bounds would leave the box."""
    found, _ = batched((1,), "cma", 60, 0)
    assert max(float(point[0]) for point, _ in found) > 1.3


def test_it_gets_better_and_starts_near_zero() -> None:
    found, _ = batched((3,), "cma", 60, 0)
    assert min(value for _, value in found[30:]) < min(value for _, value in found[:5])


def test_no_budget_no_evaluations() -> None:
    assert batched((3,), "cma", 0, 0) == ([], [])


@pytest.mark.parametrize("opt_type", ["cma", "OnePlusOne", "tbpsa"])
def test_the_random_state_is_its_own(opt_type: str) -> None:
    runs = []
    for outside in (1, 2):
        np.random.seed(outside)
        before = np.random.get_state()[1].copy(), np.random.get_state()[2]
        runs.append(batched((3,), opt_type, 12, 5)[0])
        after = np.random.get_state()[1], np.random.get_state()[2]
        assert np.array_equal(before[0], after[0]) and before[1] == after[1]
    assert_same(*runs)


def test_seeds_differ_and_may_be_large() -> None:
    first = [batched((3,), "cma", 5, seed)[0] for seed in (0, 1, 2**63 - 1)]
    assert len({tuple(run[0][0]) for run in first}) == 3


def test_losses_are_told_in_ask_order() -> None:
    """A loss that depends on the place in the batch would otherwise be credited to another candidate."""
    history = minimise(np.zeros(2), lambda points: [float(i) for i in range(len(points))], "cma", 8, 0)
    assert [value for _, value in history] == [0.0, 1.0, 2.0, 3.0] * 2


def test_the_wrong_number_of_losses_is_an_error() -> None:
    with pytest.raises(ValueError):
        minimise(np.zeros(3), lambda points: [0.0], "cma", 10, 0)


def test_start_and_step_are_nevergrads_init_and_sigma() -> None:
    start = np.array([0.6, 0.3, 0.1])
    space = ng.p.Array(init=start).set_bounds(-1.5, 1.5).set_mutation(sigma=0.2)
    space.random_state = np.random.RandomState(4)
    optimizer = ng.optimizers.registry["CMA"](space, budget=5, num_workers=1)
    asked = [optimizer.ask().value for _ in range(5)]
    found = minimise(start, lambda points: [0.0] * len(points), "cma", 5, 4, step=0.2)
    assert all(np.array_equal(point, value) for (point, _), value in zip(found, asked, strict=True))
    near = max(np.abs(point - start).max() for point, _ in found)
    wide = minimise(start, lambda points: [0.0] * len(points), "cma", 5, 4, step=1.0)
    near, far = (max(np.abs(point - start).max() for point, _ in history) for history in (found, wide))
    assert 0 < 2 * near < far


def test_ranked_weights_fall_with_the_rank_and_sum_to_one() -> None:
    weights = ranked_weights([0.5, -1.0, 0.5])
    assert weights.sum() == pytest.approx(1)
    assert weights[1] > weights[0] > weights[2] > 0  # of equals the first is the better
    expected = np.log(3.5) - np.log([2, 1, 3])
    assert weights == pytest.approx(expected / expected.sum())
    assert ranked_weights([3.0]) == pytest.approx([1.0])


def test_names() -> None:
    names = {"cma": "CMA", "CMA": "CMA", "ngopt": "NGOpt", "tbpsa": "TBPSA", "DE": "DE"}
    assert {name: optimizer_name(name) for name in names} == names
    with pytest.raises(InputError, match="--opt_type cmaes: nevergrad has no such optimizer.*CMA"):
        optimizer_name("cmaes")
    with pytest.raises(InputError, match="--opt_type zzzz"):
        minimise(np.zeros(3), lambda points: [0.0], "zzzz", 10, 0)


def test_the_generation_is_the_inner_optimisers_population() -> None:
    optimizer = make_optimizer(np.zeros((3, 4)), "cma", 30, 0)
    size = generation_size(optimizer)
    optimizer.ask()
    inner = optimizer
    while hasattr(inner, "optim"):
        inner = inner.optim
    assert size == inner.es.popsize == 6
    assert generation_size(make_optimizer(np.zeros(3), "OnePlusOne", 30, 0)) == 1


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_a_smaller_budget_is_the_beginning_of_a_larger_one(shape: tuple[int, ...]) -> None:
    """What experiments/ablation.py rests on."""

    def losses(points: list[np.ndarray]) -> list[float]:
        return [float(np.abs(point - 0.4).sum().round(1)) for point in points]

    small, large = (minimise(np.zeros(shape), losses, "cma", budget, seed=7) for budget in (10, 30))
    for (point, loss), (other, other_loss) in zip(small, large, strict=False):
        assert np.array_equal(point, other) and loss == other_loss
