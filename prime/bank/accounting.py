"""What private training spends: epsilon of a noise multiplier, and the noise for an epsilon, by Opacus' accountants."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from prime.errors import InputError

PRV_LIMIT = 200  # the memory of Opacus' prv accountant grows with epsilon: gigabytes at 10^4

Spent = tuple[float, float, int]  # what an accountant counts: sigma, sampling rate, steps


def spent_epsilon(history: Sequence[Spent], delta: float, accountant: str) -> float:
    """Epsilon at delta of all these trainings together, by Opacus' `rdp` or `prv` accountant.

    Raises:
        InputError: a budget beyond what `prv` counts.
    """
    if accountant == "prv":
        _check_countable(spent_epsilon(history, delta, "rdp"))
    with _opacus() as accountants:
        counter = accountants.create_accountant(mechanism=accountant)
        counter.history = list(history)
        return float(counter.get_epsilon(delta=delta))


@cache
def sigma_for(epsilon: float, delta: float, rate: float, steps: int, accountant: str) -> float:
    """The least noise multiplier, to a hundredth of epsilon, that keeps within epsilon at delta.

    Raises:
        ValueError: no noise does, by this accountant.
        InputError: a budget beyond what `prv` counts.
    """
    if accountant == "prv":
        _check_countable(epsilon)
    with _opacus() as accountants:
        return accountants.utils.get_noise_multiplier(
            target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=accountant
        )


def auroc_bound(spends: Spent, epsilon: float, delta: float) -> float:
    """The largest AUROC of any attack that asks whether one item was in the training.

    Where every step takes all items (rate 1) the training is one Gaussian mechanism, mu = sqrt(steps) / sigma, and its
    ROC curve is known: Phi(mu / sqrt 2) (Dong, Roth and Su, 2022, "Gaussian differential privacy"). Else the
    bound of epsilon alone, e^epsilon / (1 + e^epsilon) plus delta, which is far above what can be reached.
    """
    sigma, rate, steps = spends
    by_epsilon = 1 / (1 + math.exp(-epsilon)) + delta
    gaussian = (1 + math.erf(math.sqrt(steps) / sigma / 2)) / 2  # Phi(x / sqrt 2) = (1 + erf(x / 2)) / 2
    return min(1.0, by_epsilon, gaussian if rate == 1 else 1.0)


def _check_countable(epsilon: float) -> None:
    if epsilon > PRV_LIMIT:
        limit = f"--accountant prv counts budgets up to epsilon {PRV_LIMIT}"
        raise InputError(f"{limit}, this one is about {epsilon:.0f}; take --accountant rdp")


@contextmanager
def _opacus() -> Iterator[Any]:
    """Opacus' accountants, imported only here (it takes seconds), without their hints about looser bounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import opacus.accountants.utils

        yield opacus.accountants
