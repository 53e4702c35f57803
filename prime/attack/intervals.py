"""Intervals for an audit of any two sets of records: whole units (users, or single records) are resampled.

A unit may hold members, non-members, or both; units of each kind are drawn among themselves, so that no resample lacks
a side. Where all resamples agree (a perfect attack, a rate of 0) their interval would have no width and claim a
certainty that no sample gives: a closed form for small samples takes its place.

Letters: `x` records, `u` units, `s` resamples, `k` different scores.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import numpy as np

from prime.attack.statistics import FPRS, auroc, tpr_at_fpr
from prime.users.metrics import Interval, percentile_interval

LEAST_UNITS = 5  # on either side; of fewer users single records are resampled
AT_ONCE = 1 << 20  # numbers drawn at once
Z = NormalDist().inv_cdf(0.975)

Name = TypeVar("Name", bound=Hashable)  # of an attack


@dataclass(frozen=True)
class Units:
    """What is resampled: the unit of each record `[x]`, counted from 0, and which records are members `[x]`."""

    name: str  # user or record
    of: np.ndarray
    is_member: np.ndarray

    @classmethod
    def choose(cls, users: Sequence[str], is_member: Sequence[bool]) -> "Units":
        """Users where every record names one and either side has `LEAST_UNITS` of them, else records."""
        members = np.asarray(is_member, dtype=bool)
        names = np.asarray(users)
        enough = all(len(set(names[side])) >= LEAST_UNITS for side in (members, ~members))
        if all(users) and enough:
            return cls("user", np.unique(names, return_inverse=True)[1], members)
        return cls("record", np.arange(len(members)), members)

    def count(self, side: np.ndarray) -> int:
        """Units with a record of a side `[x]`."""
        return len(np.unique(self.of[side]))

    def draws(self, n: int, seed: int) -> Iterator[np.ndarray]:
        """`n` times how often each record is drawn, some at once `[s, x]`: units with replacement, kind by kind."""
        kinds = np.zeros(self.of.max() + 1, dtype=int)
        np.bitwise_or.at(kinds, self.of, np.where(self.is_member, 1, 2))
        strata = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        stream, at_once = np.random.default_rng(seed), max(1, AT_ONCE // len(self.of))
        for start in range(0, n, at_once):
            times = np.zeros((min(at_once, n - start), len(kinds)))
            for stratum in strata:
                share = np.full(len(stratum), 1 / len(stratum))
                times[:, stratum] = stream.multinomial(len(stratum), share, size=len(times))
            yield times[:, self.of]


def set_summaries(
    scores: Mapping[Name, np.ndarray], units: Units, *, n: int = 2000, seed: int = 0
) -> dict[Name, dict[str, object] | None]:
    """By attack AUROC and true positive rates of its scores `[x]`, with intervals over the same resamples.

    None where all scores are one number. A rate that so few non-members cannot show is None.
    """
    told = {name: values for name, values in scores.items() if np.ptp(values) > 0}
    resampled: dict[Name, list] = {name: [] for name in told}
    for times in units.draws(n, seed):
        for name, values in told.items():
            resampled[name].append(weighted(values, units.is_member, times))
    found: dict[Name, dict[str, object] | None] = dict.fromkeys(scores)
    for name, parts in resampled.items():
        found[name] = _summary(told[name], units, *map(np.concatenate, zip(*parts, strict=True)))
    return found


def _summary(scores: np.ndarray, units: Units, areas: np.ndarray, rates: np.ndarray) -> dict[str, object]:
    """Of one attack; `areas` [s] and `rates` [s, 3] are those of the resamples."""
    sides = scores[units.is_member], scores[~units.is_member]
    sizes = units.count(units.is_member), units.count(~units.is_member)
    area = percentile_interval(auroc(*sides), areas)
    of_fpr: dict[str, object] = {}
    for fpr, of_resamples in zip(FPRS, rates.T, strict=True):
        rate = tpr_at_fpr(*sides, fpr)
        of_fpr[str(fpr)] = None
        if rate is not None:
            found = percentile_interval(rate, of_resamples)
            of_fpr[str(fpr)] = _with_width(found, wilson(rate, sizes[0]))._asdict()
    return {"auroc": _with_width(area, newcombe(area.mean, *sizes))._asdict(), "tpr_at_fpr": of_fpr}


def weighted(scores: np.ndarray, is_member: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC [s], and the rates at `FPRS` [s, 3], of records that count several times.

    Args:
        scores: `[x]`
        times: how often each record counts `[s, x]`.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of equal scores
    ordered = times[:, order]
    members = np.add.reduceat(ordered * is_member[order], starts, axis=1)  # [s, k]
    non_members = np.add.reduceat(ordered * ~is_member[order], starts, axis=1)
    upto, caught = np.cumsum(non_members, axis=1), np.cumsum(members, axis=1)
    all_members, all_others = caught[:, -1:], upto[:, -1:]
    areas = (members * (upto - non_members / 2)).sum(1) / (all_members * all_others)[:, 0]
    caught = (all_members - caught) / all_members  # by a threshold at each score: those above it
    rates = []
    for fpr in FPRS:
        lowest = np.argmax(all_others - upto <= fpr * all_others + 1e-9, axis=1)
        rates.append(np.take_along_axis(caught, lowest[:, None], axis=1))
    return areas, np.hstack(rates)


def _with_width(found: Interval, otherwise: tuple[float, float]) -> Interval:
    return found if found.high - found.low > 1e-9 else Interval(found.mean, *otherwise)


def newcombe(area: float, members: int, non_members: int) -> tuple[float, float]:
    """95 % interval of an AUROC by inverting its standard error at each hypothesis (Newcombe 2006, "Confidence
    intervals for an effect size measure based on the Mann-Whitney statistic", method 5).
    """

    def too_far(hypothesis: float) -> bool:
        mean_size = (members + non_members) / 2
        spread = 1 + (mean_size - 1) * ((1 - hypothesis) / (2 - hypothesis) + hypothesis / (1 + hypothesis))
        error = (hypothesis * (1 - hypothesis) * spread / (members * non_members)) ** 0.5
        return abs(area - hypothesis) > Z * error

    def end(outside: float) -> float:
        inside = area + (0.5 - area) * 1e-9  # where the error is not 0
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if too_far(middle) else (middle, outside)
        return outside

    return (end(0.0) if area > 0 else 0.0, end(1.0) if area < 1 else 1.0)


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % interval of a rate of n (Wilson 1927)."""
    centre, spread = rate + Z**2 / (2 * n), Z * (rate * (1 - rate) / n + Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, (centre - spread) / (1 + Z**2 / n)), min(1.0, (centre + spread) / (1 + Z**2 / n))
