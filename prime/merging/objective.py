"""PriME's objective: utility on the target user's history minus a penalty for resembling the sharers.

    U = reduce over the task's metrics of (predictions, gold) on the history records          (--m_reduce)
    S = mean over the chosen sharers of the same, with that sharer's own predictions as gold
    loss = -(U - penalty * S) where higher is better, U - penalty * S for error metrics

Kim, Shin and Kim (EMNLP 2025). The direction belongs to the task's metrics; nobody passes a flag for it.

LoraHub's objective (Huang et al., 2023), `nll`, asks for no text: the cross-entropy of the history's targets plus
0.05 times the mean |w|. It knows no sharers to resemble.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor

from prime.users.metrics import METRICS, score
from prime.users.tasks import Task

Answers = Sequence[str]

METRIC_REDUCERS: dict[str, Callable[[list[float]], float]] = {"sum": sum, "mean": fmean, "first": lambda x: x[0]}
TRIAL_REDUCERS: dict[str, Callable[[list[float]], float]] = {"mean": fmean, "min": min, "max": max, "median": median}

LORAHUB_L1 = 0.05  # weight of the mean |w| in LoraHub's objective (published)


class Trial(NamedTuple):
    """What one decoding of the history shows; it does not depend on any penalty."""

    utility: float
    similarity: float


class Candidate(NamedTuple):
    """What a penalty may look at: `resemblance` is the similarity, signed so that more of it is more alike."""

    resemblance: float
    weights: Tensor  # [n] or [n, l]


@dataclass(frozen=True)
class Score:
    """One evaluated candidate: `loss` is minimised; `utility` and `similarity` are means over the repeats."""

    loss: float
    unpenalised: float  # the loss at penalty 0
    utility: float
    similarity: float
    cost: float = 0.0  # what the penalty weighs; the similarity, where it is the published one


def unevenness(weights: Tensor) -> float:
    """1 - entropy of the shares |w| / sum |w|, over ln n: 0 for equal weights, 1 for a single sharer; 0 for the base.

    Weights `[n, l]` are taken layer by layer, and averaged.
    """
    sizes = weights.abs().double().reshape(len(weights), -1)
    if len(sizes) < 2:
        return 0.0
    shares = sizes / sizes.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    entropy = -torch.xlogy(shares, shares).sum(0) / math.log(len(sizes))
    return float(((1 - entropy) * (sizes.sum(0) > 0)).mean())


def size(weights: Tensor) -> float:
    """Euclidean norm of the weights `[n]`; of `[n, l]` the mean over layers."""
    return float(weights.double().reshape(len(weights), -1).norm(dim=0).mean())


# What `--sim_penalty` is the weight of.
PENALTIES: dict[str, Callable[[Candidate], float]] = {
    "output": lambda candidate: candidate.resemblance,  # published: the sharers' own answers
    "entropy": lambda candidate: unevenness(candidate.weights),
    "norm": lambda candidate: size(candidate.weights),
}


class Objective:
    """The objective of one target user.

    Args:
        task: gives the metrics, their direction and the labels of the history task.
        golds: gold answer of each history record.
        penalty: weight of the similarity (published `--sim_penalty`; 0.1 in the announcement).
        m_reduce: how a task's metrics become one number (published: sum).
        t_reduce: how the losses of repeated decodings (`--num_repeat`) become one.
        kind: what `penalty` is the weight of, a name of `PENALTIES` (published: output).
    """

    def __init__(
        self, task: Task, golds: Answers, penalty: float, m_reduce: str = "sum", t_reduce: str = "mean",
        kind: str = "output",
    ):  # fmt: skip
        self.task, self.golds, self.penalty = task, golds, penalty
        self.reduce_metrics = METRIC_REDUCERS[m_reduce]
        self.reduce_trials = TRIAL_REDUCERS[t_reduce]
        self.of_candidate = PENALTIES[kind]
        self.sign = -1.0 if METRICS[task.history_metrics[0]].higher_is_better else 1.0

    def agreement(self, answers: Answers, reference: Answers) -> float:
        """The task's history metrics of answers against reference, reduced to one number; 0 without any record."""
        if not reference:
            return 0.0
        values = score(self.task.history_metrics, answers, reference, self.task.history_labels)
        return self.reduce_metrics(list(values.values()))

    def trials(self, trials: Sequence[Answers], sharers: Sequence[Sequence[Answers]]) -> list[Trial]:
        """What a candidate's answers show, whatever the penalty.

        Args:
            trials: `[repeats]` answers to the history records.
            sharers: `[n][repeats]` the sharers' own answers to the same records, decoded with the same noise.
        """
        return [
            Trial(self.agreement(answers, self.golds), fmean(self.agreement(answers, own[i]) for own in sharers))
            for i, answers in enumerate(trials)
        ]

    def score(self, trials: Sequence[Trial], weights: Tensor) -> Score:
        """Score of the candidate of these weights, `[n]` or `[n, l]`."""
        # For errors both terms change sign: a small error is utility, a small distance to the sharers resemblance.
        unpenalised = [self.sign * one.utility for one in trials]
        costs = [self.of_candidate(Candidate(-self.sign * one.similarity, weights)) for one in trials]
        return Score(
            self.reduce_trials([loss + self.penalty * cost for loss, cost in zip(unpenalised, costs, strict=True)]),
            self.reduce_trials(unpenalised),
            fmean(one.utility for one in trials),
            fmean(one.similarity for one in trials),
            self.reduce_trials(costs),
        )


def score_by_likelihood(logprobs: Sequence[Tensor], weights: Tensor) -> Score:
    """LoraHub's score of a candidate: every record counts alike, by the mean over its target tokens.

    Args:
        logprobs: log-probabilities of each history record's target tokens under the candidate.
        weights: `[n]` or `[n, l]`.
    """
    nll = -fmean(float(own.mean()) for own in logprobs) if logprobs else 0.0
    return Score(nll + LORAHUB_L1 * float(weights.abs().mean()), unpenalised=nll, utility=-nll, similarity=0.0)
