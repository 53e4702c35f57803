"""PriME's objective: utility on the target user's history minus a penalty for resembling the sharers.

    U = reduce over the task's metrics of (predictions, gold) on the history records          (--m_reduce)
    S = mean over the chosen sharers of the same, with that sharer's own predictions as gold
    loss = -(U - penalty * S) where higher is better, U - penalty * S for error metrics

Kim, Shin and Kim (EMNLP 2025). The direction belongs to the task's metrics; nobody passes a flag for it.

LoraHub's objective (Huang et al., 2023), `nll`, asks for no text: the cross-entropy of the history's targets plus
0.05 times the mean |w|. It knows no sharers to resemble.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from torch import Tensor

from prime.users.answers import Choices, number
from prime.users.metrics import METRICS, in_their_script, score
from prime.users.task import Task

Answers = Sequence[str]

Reducer = Callable[[list[float]], float]
REDUCERS: dict[str, Reducer] = {"sum": sum, "mean": fmean, "min": min, "max": max, "median": median}
METRIC_REDUCERS = REDUCERS | {"first": lambda values: values[0]}

LORAHUB_L1 = 0.05  # weight of the mean |w| in LoraHub's objective (published)


class Trial(NamedTuple):
    """What one decoding of the history shows; it does not depend on any penalty."""

    utility: float
    similarity: float


@dataclass(frozen=True)
class Score:
    """One evaluated candidate: `loss` is minimised; `utility` and `similarity` are means over the repeats."""

    loss: float
    unpenalised: float  # the loss at penalty 0
    utility: float
    similarity: float
    cost: float = 0.0  # what the penalty weighs: the similarity, signed so that more of it is more alike


class Objective:
    """The objective of one target user.

    Args:
        task: gives the metrics, their direction and the labels of the history task.
        golds: gold answer of each history record.
        penalty: weight of the similarity (published `--sim_penalty`; 0.1 in the announcement).
        m_reduce: how a task's metrics become one number (published: sum).
        t_reduce: how the losses of repeated decodings (`--num_repeat`) become one.
        unknown_answers: in the similarity, `alike` (published) or `distinct`, see `as_published`.
    """

    def __init__(
        self,
        task: Task,
        golds: Answers,
        penalty: float,
        m_reduce: str = "sum",
        t_reduce: str = "mean",
        unknown_answers: str = "distinct",
    ):
        self.task, self.golds, self.penalty, self.unknown_answers = task, golds, penalty, unknown_answers
        self.reduce_metrics = METRIC_REDUCERS[m_reduce]
        self.reduce_trials = REDUCERS[t_reduce]
        # The published ROUGE of other scripts than Latin is 0 for equal texts, and a search by it blind.
        self.metrics = task.history_metrics if task.published_texts else in_their_script(task.history_metrics, golds)
        self.sign = -1.0 if METRICS[task.history_metrics[0]].higher_is_better else 1.0

    def agreement(self, answers: Answers, reference: Answers) -> float:
        """The task's history metrics of answers against reference, reduced to one number; 0 without any record."""
        if not reference:
            return 0.0
        values = score(self.metrics, answers, reference, self.task.history_choices)
        return self.reduce_metrics(list(values.values()))

    def resemblance(self, answers: Answers, sharer: Answers) -> float:
        """The same of a candidate's answers against a sharer's own."""
        if self.unknown_answers == "alike":
            answers, sharer = as_published(self.task, answers, sharer)
        return self.agreement(answers, sharer)

    def trials(self, trials: Sequence[Answers], sharers: Sequence[Sequence[Answers]]) -> list[Trial]:
        """What a candidate's answers show, whatever the penalty.

        Args:
            trials: `[repeats]` answers to the history records.
            sharers: `[n][repeats]` the sharers' own answers to the same records, decoded with the same noise.
        """
        measured = []
        for repeat, answers in enumerate(trials):
            similarity = fmean(self.resemblance(answers, sharer[repeat]) for sharer in sharers)
            measured.append(Trial(self.agreement(answers, self.golds), similarity))
        return measured

    def score(self, trials: Sequence[Trial], weights: Tensor) -> Score:
        """Score of a candidate. Every objective is given the candidate's weights; this one does not look at them."""
        # For errors both terms change sign: a small error is utility, a small distance to the sharers resemblance.
        unpenalised = [self.sign * trial.utility for trial in trials]
        costs = [-self.sign * trial.similarity for trial in trials]
        losses = [loss + self.penalty * cost for loss, cost in zip(unpenalised, costs, strict=True)]
        return Score(
            self.reduce_trials(losses),
            self.reduce_trials(unpenalised),
            fmean(trial.utility for trial in trials),
            fmean(trial.similarity for trial in trials),
            self.reduce_trials(costs),
        )


def as_published(task: Task, answers: Answers, sharer: Answers) -> tuple[Answers, Answers]:
    """Both sides as the published similarity reads them: all texts outside the labels are one class, and a sharer's
    rating that is no number is a 2.5, half of the highest. Answers against golds are read alike either way.
    """
    choices = task.history_choices
    if choices.scale is not None:
        middle = f"{choices.scale[1] / 2:g}"
        return answers, [text if number(text) is not None else middle for text in sharer]
    if choices.labels is None:
        return answers, sharer
    return [known(text, choices) for text in answers], [known(text, choices) for text in sharer]


def known(text: str, choices: Choices) -> str:
    """The label that a text is, or "": no label's class."""
    return choices.label(text) or ""


def score_by_likelihood(logprobs: Sequence[Tensor], weights: Tensor) -> Score:
    """LoraHub's score of a candidate: every record counts alike, by the mean over its target tokens.

    Args:
        logprobs: log-probabilities of each history record's target tokens under the candidate.
        weights: `[n]` or `[n, l]`.
    """
    nll = -fmean(float(record.mean()) for record in logprobs) if logprobs else 0.0
    return Score(nll + LORAHUB_L1 * float(weights.abs().mean()), unpenalised=nll, utility=-nll, similarity=0.0)
