"""What a run's tables are made of, a line a number, for further work: scores.csv and weights.csv beside summary.json.

    pandas.read_csv("scores.csv", dtype={"user": str}).query("k == 0").pivot_table("value", "user", "method")
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prime.report.predictions import CellPredictions
from prime.report.scores import user_stats
from prime.runs.files import write_text
from prime.runs.run import read_results, read_settings
from prime.users.metrics import METRICS
from prime.users.tasks import Task

SCORES = ("user", "method", "k", "profile", "metric", "value")
WEIGHTS = ("user", "method", "sharer", "rank", "layer", "weight", "deployed")


def write_records(
    folder: Path, task: Task, predictions: CellPredictions, golds: Mapping[str, str], sources: Mapping[str, Path]
) -> None:
    """scores.csv: each user's score by each metric in each row of the table. weights.csv: what each user's merge gives
    to each sharer. `sources`: the folder that each method's predictions come from.
    """
    write_text(folder / "scores.csv", _as_csv(SCORES, score_records(task, predictions, golds)))
    write_text(folder / "weights.csv", _as_csv(WEIGHTS, weight_records(sources)))


def _as_csv(header: Sequence[str], records: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *records])
    return text.getvalue()


def score_records(task: Task, predictions: CellPredictions, golds: Mapping[str, str]) -> Iterator[list[Any]]:
    for cell, by_user in predictions.items():
        for user, stats in user_stats(task, by_user, golds).items():
            for metric in task.metrics:
                yield [user, *cell, metric, float(METRICS[metric].finish(stats[metric]))]


def weight_records(sources: Mapping[str, Path]) -> Iterator[list[Any]]:
    """A line for each user and sharer of the methods that merge, most similar first; of weights by layer one for each,
    numbered from 0. A user who deploys the base has weights of 0.
    """
    for method, folder in sources.items():
        if read_settings(folder)["method"] != method:
            continue
        for result in read_results(folder):
            pairs = zip(result.get("sharers", []), result.get("weights", []), strict=False)
            for rank, (sharer, weights) in enumerate(pairs, 1):
                layers = enumerate(weights) if isinstance(weights, list) else [("", weights)]
                for layer, weight in layers:
                    yield [result["user_id"], method, sharer, rank, layer, weight, result.get("deployed", "")]
