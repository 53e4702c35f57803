"""How one's own pairs are judged: `--metric`, of the toolkit or a function of one's own.

    rouge-1, rouge-L   words in common, for free text
    accuracy           share of right labels; the labels are the pairs' outputs
    exact              share of answers that are the whole output, letter by letter
    mae                mean distance of numbers, lower is better; an answer that is no number is as far off as can be
    module:function    (prediction, reference) -> number, higher is better; the module is imported, from the current
                       folder or as installed: this option is the one place where code of others is run

The similarity to an adapter's answers calls the function with these as reference; either text may then be empty.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from prime.errors import InputError, tell
from prime.runs.inputs import Source, file_digest
from prime.users.answers import Choices, number
from prime.users.metrics import METRICS, Metric, in_their_script
from prime.users.pairs import Pair

NAMES = ("rouge-1", "rouge-L", "accuracy", "exact", "mae")

Function = Callable[[str, str], float]


def own_metric(name: str, path: str, pairs: Sequence[Pair]) -> Metric:
    """The metric of this name for these pairs.

    Args:
        path: of the pairs, for messages.

    Raises:
        InputError: no such metric, module or function, or outputs that are no numbers.
    """
    if ":" in name:
        return Metric(name, True, partial(_function_stats, name, lru_cache(1 << 16)(_imported(name))), _MEAN)
    if name == "mae":
        return Metric(name, False, partial(_distance_stats, Choices(scale=_scale(path, pairs))), _MEAN)
    if name == "exact":
        return replace(METRICS["accuracy"], name=name)
    if name in NAMES:
        return METRICS[in_their_script((name,), [pair.output for pair in pairs])[0]]
    raise InputError(f"--metric {name}: no such metric; give {', '.join(NAMES)}, or module:function")


@contextmanager
def listed(metric: Metric) -> Iterator[None]:
    """Within the block the metric is a row of `METRICS`, where the objective looks."""
    before = METRICS.get(metric.name)
    METRICS[metric.name] = metric
    try:
        yield
    finally:
        if before is None:
            del METRICS[metric.name]
        else:
            METRICS[metric.name] = before


def labels_of(name: str, pairs: Sequence[Pair]) -> tuple[str, ...] | None:
    """The outputs of the pairs, each once, where they are labels; None for free text."""
    if name != "accuracy":
        return None
    labels = tuple(dict.fromkeys(pair.output.strip() for pair in pairs))
    if len(labels) > len(pairs) / 2:
        tell(
            f"--metric accuracy: {len(labels)} different outputs in {len(pairs)} pairs; free text is for exact, rouge-1"
        )
    return labels


def metric_source(name: str) -> dict[str, Source]:
    """A function of one's own by the content of its file, as a run records what it read."""
    module = sys.modules.get(name.partition(":")[0]) if ":" in name else None
    path = getattr(module, "__file__", None)
    return {"metric": Source(file_digest(path), path)} if path else {}


_MEAN = METRICS["accuracy"].finish


# -- a function of one's own ----------------------------------------------------------------------------------------


def _imported(name: str) -> Function:
    module_name, _, function_name = name.partition(":")
    if Path(module_name).suffix == ".py" or "/" in module_name:
        raise InputError(f"--metric {name}: give the module, not its file: {Path(module_name).stem}:{function_name}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the code of others can raise whatever it likes
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--metric {name}: {module_name} cannot be imported from here: {reason}") from error
    finally:
        sys.path.remove(os.getcwd())
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"--metric {name}: {module_name} has no function {function_name!r}")
    return function


def _function_stats(name: str, function: Function, pred: str, gold: str, choices: Choices) -> np.ndarray:
    """[value, 1]."""
    pair = f"for the prediction {pred[:60]!r} and the reference {gold[:60]!r}"
    try:
        value = float(function(pred.strip(), gold.strip()))
    except Exception as error:  # the same
        raise InputError(f"--metric {name}: {type(error).__name__}: {error} ({pair})") from error
    if not math.isfinite(value):
        raise InputError(f"--metric {name}: gave {value} {pair}; a number is expected")
    return np.array([value, 1.0])


# -- distances ------------------------------------------------------------------------------------------------------


def _scale(path: str, pairs: Sequence[Pair]) -> tuple[float, float]:
    """The ends of the outputs' scale."""
    values = [number(pair.output) for pair in pairs]
    problems = []
    for pair, value in zip(pairs, values, strict=True):
        if value is None:
            problems.append(f"{path}: line {pair.line}: the output {pair.output[:40]!r} is no number; --metric mae")
    if problems:
        raise InputError.many(problems)
    known = [value for value in values if value is not None]
    return min(known), max(known)


def _distance_stats(scale: Choices, pred: str, gold: str, choices: Choices) -> np.ndarray:
    """[distance, 1] on the outputs' scale."""
    return METRICS["MAE"].stats(pred, gold, scale)
