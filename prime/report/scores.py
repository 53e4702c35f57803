"""How good predictions are: users' statistics, scores with intervals, and comparisons paired by user.

Letters: `u` users, `s` sufficient statistics of a metric (see `prime.users.metrics`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prime.report.predictions import Sample, predictions_of, setting_of
from prime.runs.files import write_json
from prime.runs.run import read_results, read_settings
from prime.users.metrics import METRICS, OUTSIDE, bootstrap, paired_bootstrap, score, sum_stats
from prime.users.tasks import Task

Stats = dict[str, np.ndarray]  # metric -> [u, s], or [s] of one user


def user_stats(task: Task, by_user: Mapping[str, Sequence[Sample]], golds: Mapping[str, str]) -> dict[str, Stats]:
    """Each user's sufficient statistics [s] for each of the task's metrics; users without samples are left out."""
    return {user: _stats(task, samples, golds) for user, samples in by_user.items() if samples}


def _stats(task: Task, samples: Sequence[Sample], golds: Mapping[str, str]) -> Stats:
    answers = [sample["output"] for sample in samples]
    right = [golds[sample["id"]] for sample in samples]
    return {metric: sum_stats(METRICS[metric], answers, right, task.choices) for metric in task.metrics}


def stack(stats: Mapping[str, Stats], users: Sequence[str]) -> Stats:
    """[u, s] for each metric, one row per user in the order of `users`."""
    stacked: Stats = {}
    for metric in stats[users[0]]:
        stacked[metric] = np.stack([stats[user][metric] for user in users])
    return stacked


def metric_intervals(task: Task, stats: Stats) -> dict[str, dict[str, float]]:
    """Each metric with its 95 % interval from resampling users."""
    return {metric: bootstrap(stats[metric], METRICS[metric].finish)._asdict() for metric in task.metrics}


def outside_share(task: Task, by_user: Mapping[str, Sequence[Sample]], users: Sequence[str]) -> dict[str, float]:
    """The share of these users' answers that are no label, or no number on the scale, with its interval."""
    stats = []
    for user in users:
        answers = [sample["output"] for sample in by_user[user]]
        stats.append(sum_stats(OUTSIDE, answers, answers, task.choices))
    return bootstrap(np.stack(stats), OUTSIDE.finish)._asdict()


def paired_comparison(task: Task, ours: Stats, reference: Stats) -> dict[str, Any]:
    """Paired by user: each metric's difference (ours minus reference), and users better, equal and worse off.

    Users are counted by the task's first metric, in its direction: "better" means better than the reference.
    """
    differences: dict[str, Any] = {}
    for metric in task.metrics:
        interval = paired_bootstrap(ours[metric], reference[metric], METRICS[metric].finish)
        differences[metric] = interval._asdict()
    first = METRICS[task.metrics[0]]
    gain = first.finish(ours[first.name]) - first.finish(reference[first.name])
    gain = gain if first.higher_is_better else -gain
    tie = np.isclose(gain, 0, atol=1e-9)
    counts = {"better": gain[~tie] > 0, "equal": tie, "worse": gain[~tie] < 0}
    return differences | {name: int(np.sum(mask)) for name, mask in counts.items()}


def gain_of_reference(pair: Mapping[str, Any], metric: str) -> dict[str, float]:
    """An entry of summary.json's `paired` (a row's metric minus the reference's) from the side of the reference: by how
    much its metric is better, above 0 in the metric's own direction.
    """
    difference = pair[metric]
    if not METRICS[metric].higher_is_better:
        return {end: difference[end] for end in ("mean", "low", "high")}
    return {end: 0 - difference[other] for end, other in (("mean", "mean"), ("low", "high"), ("high", "low"))}  # no -0


def write_stage_files(stage_dir: Path, task: Task, golds: Mapping[str, str]) -> list[Path]:
    """`output-k{k}[-profile].json` and `eval-...` of the stage's own method; returns the paths written."""
    own_method = read_settings(stage_dir)["method"]
    written: list[Path] = []
    for cell, by_user in predictions_of(read_results(stage_dir)).items():
        if cell.method != own_method:
            continue
        samples: list[Sample] = []
        for of_user in by_user.values():
            samples += [{"id": sample["id"], "output": sample["output"]} for sample in of_user]
        answers = [sample["output"] for sample in samples]
        right = [golds[sample["id"]] for sample in samples]
        output, evaluation = (stage_dir / f"{kind}-{setting_of(cell)}.json" for kind in ("output", "eval"))
        write_json(output, {"task": task.lamp, "golds": samples})
        write_json(evaluation, score(task.metrics, answers, right, task.choices))
        written += [output, evaluation]
    return written
