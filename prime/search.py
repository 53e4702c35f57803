"""Gradient-free search by ask and tell; it knows nothing of language models.

nevergrad's `CMA` with bounds is a diagonal, elitist CMA-ES with a population of 4 + int(ln d). Candidates of one
generation do not depend on each other's losses, so a whole generation is asked, evaluated together, and told in ask
order: the trajectory is bit for bit that of one candidate at a time (num_workers stays 1; a larger one changes it).
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from prime.errors import InputError

with warnings.catch_warnings():  # nevergrad and its dependencies warn on import about packages we do not use
    warnings.simplefilter("ignore")
    import nevergrad as ng
    from nevergrad.optimization import optimizerlib

Evaluate = Callable[[list[np.ndarray]], Sequence[float]]

BOUND = 1.5  # weights live in [-1.5, 1.5] (published)
STEP = 1.0  # standard deviation of the first generation (published: nevergrad's default)
SHORT_NAMES = {"cma": "CMA", "ngopt": "NGOpt", "tbpsa": "TBPSA"}


def optimizer_name(opt_type: str) -> str:
    """nevergrad's name of `--opt_type`: cma, ngopt, tbpsa, or any name of its registry."""
    name = SHORT_NAMES.get(opt_type.lower(), opt_type)
    if name not in ng.optimizers.registry:
        near = [key for key in ng.optimizers.registry if key.lower().startswith(opt_type.lower()[:3])]
        hint = f"; did you mean one of {', '.join(sorted(near)[:8])}?" if near else ""
        raise InputError(f"--opt_type {opt_type}: nevergrad has no such optimizer{hint}")
    return name


def make_optimizer(
    start: np.ndarray, opt_type: str, budget: int, seed: int, step: float = STEP
) -> ng.optimizers.base.Optimizer:
    """An optimizer over arrays like `start`, where it begins, bounded to +-1.5, with a random state of its own."""
    space = ng.p.Array(init=np.array(start, dtype=np.float64))
    space.random_state = np.random.RandomState(seed % 2**32)  # else set_bounds draws from numpy's global stream
    space.set_bounds(-BOUND, BOUND)
    space.set_mutation(sigma=step)
    space.random_state = np.random.RandomState(seed % 2**32)  # anew, also for the step, which is a part of its own
    name = optimizer_name(opt_type)
    try:
        optimizer = ng.optimizers.registry[name](space, budget=budget, num_workers=1)
        generation_size(optimizer)
    except (ImportError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--opt_type {opt_type}: nevergrad cannot start {name}: {error}") from error
    return optimizer


def generation_size(optimizer: ng.optimizers.base.Optimizer) -> int:
    """How many candidates may be asked before telling without changing the search: CMA's population, else 1."""
    inner = optimizer
    while hasattr(inner, "optim"):
        inner = inner.optim
    return inner._popsize if isinstance(inner, optimizerlib._CMA) else 1


def minimise(
    start: np.ndarray, evaluate: Evaluate, opt_type: str, budget: int, seed: int, step: float = STEP
) -> list[tuple[np.ndarray, float]]:
    """Ask, evaluate, tell until `budget` candidates are evaluated.

    Args:
        start: weights where the search begins, `[n]` or `[n, l]` (published: zeros).
        evaluate: losses of a list of weight arrays, to be minimised.
        opt_type: see `optimizer_name`.
        budget: number of evaluations (published: 10).
        seed: of the search's own random state.
        step: standard deviation of the first generation around `start`; optimizers that have none ignore it.

    Returns:
        All evaluated points in order, `(weights, loss)`. nevergrad drops a tail shorter than a population, so its
        recommendation can be worse than the best evaluated point; callers take the best of these.
    """
    if budget < 1:
        return []
    with warnings.catch_warnings():
        # Harmless remarks of the optimisers about missing plots and their own tolerances.
        warnings.filterwarnings("ignore", module=r"(cma|scipy)\.")
        return _loop(make_optimizer(start, opt_type, budget, seed, step), evaluate, budget)


def ranked_weights(losses: Sequence[float]) -> np.ndarray:
    """Weights `[n]` that sum to 1 and fall with the rank of each loss: ln(n + 1/2) - ln(rank), as CMA-ES weighs the
    parents of a generation (Hansen 2016, "The CMA Evolution Strategy: A Tutorial"). Equal losses keep their order.
    """
    order = np.argsort(np.asarray(losses), kind="stable")
    weights = np.empty(len(order))
    weights[order] = np.log(len(order) + 0.5) - np.log(np.arange(1, len(order) + 1))
    return weights / weights.sum()


def _loop(
    optimizer: ng.optimizers.base.Optimizer, evaluate: Evaluate, budget: int
) -> list[tuple[np.ndarray, float]]:
    history: list[tuple[np.ndarray, float]] = []
    while len(history) < budget:
        size = min(generation_size(optimizer), budget - len(history))
        asked = [optimizer.ask() for _ in range(size)]
        points = [np.array(candidate.value, dtype=np.float64) for candidate in asked]
        losses = [float(loss) for loss in evaluate(points)]
        for candidate, loss in zip(asked, losses, strict=True):
            optimizer.tell(candidate, loss)
        history += zip(points, losses, strict=True)
    return history
