"""What a run's page is made of, and each user's score in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prime.report.methods import REFERENCE
from prime.report.predictions import Cell, CellPredictions, Sample, setting_of
from prime.report.scores import user_stats
from prime.runs.run import read_results
from prime.users.metrics import METRICS
from prime.users.tasks import Task


class Content(NamedTuple):
    """A run as postprocess.py has gathered it; each section of the page takes what it needs."""

    root: Path  # <output>/<task>
    task: Task
    summary: Mapping[str, Any]
    predictions: CellPredictions
    golds: Mapping[str, str]
    sources: Mapping[str, Path]  # method -> folder
    inputs: Mapping[str, str]  # query id -> input

    @property
    def metric(self) -> str:
        """The task's first metric, which the page goes by."""
        return self.task.metrics[0]

    def samples(self, method: str) -> Mapping[str, Sequence[Sample]]:
        """A method's predictions at the first test setting, by user."""
        row = self.summary["rows"][0]
        return self.predictions.get(Cell(method, row["k"], row["profile"]), {})

    def compared(self, users: Iterable[str]) -> list[str]:
        """Those of the users whom the rows of the first test setting are of."""
        row = self.summary["rows"][0]
        common = self.summary["compared"][setting_of(Cell(row["method"], row["k"], row["profile"]))]
        return [user for user in users if user in common or not common]

    def user_scores(self, method: str) -> dict[str, float]:
        """Each user's own score by the task's first metric, at the first test setting."""
        finish = METRICS[self.metric].finish
        by_user = user_stats(self.task, self.samples(method), self.golds)
        return {user: float(finish(stats[self.metric])) for user, stats in by_user.items()}

    def reference_results(self) -> list[Mapping[str, Any]]:
        """PriME's results; none where it has not run."""
        return list(read_results(self.sources[REFERENCE])) if REFERENCE in self.sources else []
