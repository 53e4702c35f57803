"""Gradient-free search by ask and tell; it knows nothing of language models.

nevergrad's `CMA` with bounds is a diagonal, elitist CMA-ES with a population of 4 + int(ln d). Candidates of one
generation do not depend on each other's losses, so a whole generation is asked, evaluated together, and told in ask
order: the trajectory is bit for bit that of one candidate at a time (num_workers stays 1; a larger one changes it).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from prime.errors import InputError

if TYPE_CHECKING:
    from nevergrad.optimization.base import Optimizer
    from nevergrad.parametrization.core import Parameter

Loss = float | list[float]  # a list: one loss per objective
Points = list[np.ndarray]

BOUND = 1.5  # weights live in [-1.5, 1.5] (published)
STEP = 2 * BOUND / 6  # standard deviation of the first generation (published: nevergrad's, for bounds of an Array)
PARETO = "pareto"  # CMA-ES told two losses, which nevergrad turns into each point's gain in dominated volume
SHORT_NAMES = {"cma": "CMA", "ngopt": "NGOpt", "tbpsa": "TBPSA", PARETO: "CMA"}


def loaded_nevergrad() -> ModuleType:
    """nevergrad, where it is needed and not before: with scikit-learn and pandas it takes over a second."""
    with warnings.catch_warnings():  # it and its dependencies warn on import about packages we do not use
        warnings.simplefilter("ignore")
        import nevergrad
    return nevergrad


def optimizer_name(opt_type: str) -> str:
    """nevergrad's name of `--opt_type`: cma, ngopt, tbpsa, pareto, or any name of its registry."""
    if opt_type.lower() in SHORT_NAMES:
        return SHORT_NAMES[opt_type.lower()]
    registry = loaded_nevergrad().optimizers.registry
    if opt_type not in registry:
        near = [key for key in registry if key.lower().startswith(opt_type.lower()[:3])]
        hint = f"; did you mean one of {', '.join(sorted(near)[:8])}?" if near else ""
        raise InputError(f"--opt_type {opt_type}: nevergrad has no such optimizer{hint}")
    return opt_type


def is_pareto(opt_type: str) -> bool:
    return opt_type.lower() == PARETO


def make_optimizer(start: np.ndarray, opt_type: str, budget: int, seed: int, step: float = STEP) -> "Optimizer":
    """An optimizer over arrays like `start`, where it begins, bounded to +-1.5, with a random state of its own."""
    ng = loaded_nevergrad()
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


def generation_size(optimizer: "Optimizer") -> int:
    """How many candidates may be asked before telling without changing the search: CMA's population, else 1."""
    from nevergrad.optimization.optimizerlib import _CMA

    inner = optimizer
    while hasattr(inner, "optim"):
        inner = inner.optim
    return inner._popsize if isinstance(inner, _CMA) else 1


def first_generation(n: int, opt_type: str, budget: int) -> int:
    """How many candidates a search over n weights evaluates together, at first."""
    return len(Search(np.zeros(n), opt_type, budget, 0).ask())


class Search:
    """One search, a whole generation at a time: `ask` for its points, `tell` their losses, until nothing is `open`.

    Args:
        start: weights where the search begins, `[n]` or `[n, l]` (published: zeros).
        opt_type: see `optimizer_name`.
        budget: number of evaluations (published: 10).
        seed: of the search's own random state.
        step: standard deviation of the first generation around `start`; optimizers that have none ignore it.
        worst: with several objectives, the loss of each above which a point is pointless (nevergrad's reference of
            the dominated volume; without it nevergrad would spend its first 15 points on finding one).

    `history` holds all told points in order, `(weights, loss)`. nevergrad drops a tail shorter than a population, so
    its recommendation can be worse than the best evaluated point; callers take the best of these.
    """

    def __init__(
        self, start: np.ndarray, opt_type: str, budget: int, seed: int, step: float = STEP, worst: Sequence[float] = ()
    ):
        self.budget = budget
        self.history: list[tuple[np.ndarray, Loss]] = []
        self._asked: list[Parameter] = []
        self._optimizer = make_optimizer(start, opt_type, budget, seed, step) if budget > 0 else None
        if worst and self._optimizer is not None:
            self._optimizer.tell(loaded_nevergrad().p.MultiobjectiveReference(), list(worst))

    @property
    def open(self) -> bool:
        """Whether there is anything left to ask."""
        return len(self.history) < self.budget

    def ask(self) -> Points:
        """The points of the next generation; none when the budget is spent."""
        if self._optimizer is None or not self.open:
            return []
        size = min(generation_size(self._optimizer), self.budget - len(self.history))
        with _quiet():
            self._asked = [self._optimizer.ask() for _ in range(size)]
        return [np.array(candidate.value, dtype=np.float64) for candidate in self._asked]

    def tell(self, losses: Sequence[Loss]) -> None:
        """Losses of the points just asked, in their order; several objectives as one list of losses per point.

        Raises:
            ValueError: not as many losses as points were asked.
        """
        for candidate, loss in zip(self._asked, losses, strict=True):
            value = [float(part) for part in loss] if isinstance(loss, Sequence) else float(loss)
            if self._optimizer is not None:
                with _quiet():
                    self._optimizer.tell(candidate, value)
            self.history.append((np.array(candidate.value, dtype=np.float64), value))
        self._asked = []


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the optimisers' harmless remarks about missing plots and their own tolerances.

    With several objectives, nevergrad's own loss of a dominated point may be infinite; it clips that by itself.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(cma|scipy)\.")
        warnings.filterwarnings("ignore", "Updating fitness with inf|Clipping very high value inf")
        yield


def ranked_weights(losses: Sequence[float]) -> np.ndarray:
    """Weights `[n]` that sum to 1 and fall with the rank of each loss: ln(n + 1/2) - ln(rank), as CMA-ES weighs the
    parents of a generation (Hansen 2016, "The CMA Evolution Strategy: A Tutorial"). Equal losses keep their order.
    """
    order = np.argsort(np.asarray(losses), kind="stable")
    weights = np.empty(len(order))
    weights[order] = np.log(len(order) + 0.5) - np.log(np.arange(1, len(order) + 1))
    return weights / weights.sum()
