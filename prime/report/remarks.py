"""Why a row of the table is as bad as it can be: answers that are empty, or nothing that a score could count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from prime.report.predictions import Cell, CellPredictions
from prime.users.metrics import METRICS, number
from prime.users.tasks import Task

SHOWN = 60  # characters of an answer


def remarks(
    task: Task, predictions: CellPredictions, golds: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """A sentence for each row of the first test setting in which nothing was right."""
    found = []
    for row in rows:
        if (row["k"], row["profile"]) != (rows[0]["k"], rows[0]["profile"]):
            continue
        by_user = predictions[Cell(row["method"], row["k"], row["profile"])].values()
        answers = [sample["output"].strip() for sample in chain.from_iterable(by_user)]
        if why := _why_nothing_is_right(task, answers, golds, row[task.metrics[0]]["mean"]):
            found.append(f"{row['method']}: {why}")
    return found


def _why_nothing_is_right(task: Task, answers: Sequence[str], golds: Mapping[str, str], value: float) -> str:
    """"" where something is."""
    metric, n = METRICS[task.metrics[0]], len(answers)
    if not any(answers):
        return f"all {n} answers are empty (--max_gen_len, or a prompt that the model ends at once)."
    example = next(answer for answer in answers if answer)
    shown = example if len(example) <= SHOWN else f"{example[: SHOWN - 1]}…"
    if not metric.higher_is_better:
        readable = sum(number(answer) is not None for answer in answers)
        return "" if readable else f"none of {n} answers is a number; the first is {shown!r}."
    if value > 0:
        return ""
    if task.labels is None:
        return f"none of {n} answers has a word of what was expected; the first is {shown!r}."
    known = set(map(str.strip, golds.values()))
    labels = sum(answer in known for answer in answers)
    if labels:
        return f"none of {n} answers is right, though {labels} of them are labels."
    return f"none of {n} answers is one of the labels asked for; the first is {shown!r}."
