"""What private training spends: epsilon of a noise multiplier, and the noise for an epsilon, by Opacus' accountants."""

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
