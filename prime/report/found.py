"""What a search found, a line a user: printed by lora_composition_evo.py when it has finished."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from prime.errors import InputError
from prime.report.tables import aligned
from prime.runs.forms import EVALUATED_UTILITY, NUMBER, form_problems, read_form_lines
from prime.runs.penalties import shared_evaluations, sharing_text
from prime.runs.run import read_results, user_dirname
from prime.settings import FitnessSettings
from prime.users.metrics import METRICS
from prime.users.tasks import Task

FOUND = {"utility": NUMBER, "deployed": str}


def found_text(runs: Sequence[Path], user_ids: Collection[str], task: Task, fitness: FitnessSettings) -> str:
    """A table for the run of each penalty, and what several shared."""
    parts = [found_table(run, user_ids, task, fitness) for run in runs]
    return "\n\n".join(parts + ([sharing_text(shared_evaluations(runs))] if len(runs) > 1 else []))


def found_table(run: Path, user_ids: Collection[str], task: Task, fitness: FitnessSettings) -> str:
    """The history's score with the base and with what is deployed, each sharer's weight, and where the adapter lies."""
    rows = [["user", "base", "found", "deployed", "sharers and weights", "adapter"]]
    for result in read_results(run):
        if result["user_id"] not in user_ids:
            continue
        folder = Path("users") / user_dirname(result["user_id"])
        problems = form_problems(result, FOUND, f"{run / folder / 'result.json'}: the file")
        if problems:
            raise InputError.many(problems)
        path = run / folder / "evaluations.jsonl"
        evaluations = read_form_lines(path, EVALUATED_UTILITY)
        if not evaluations:
            raise InputError(f"{path}: empty, the base's evaluation expected first")
        merged = (run / folder / "adapter").is_dir()
        rows.append([
            result["user_id"], f"{evaluations[0]['utility']:.3f}", f"{result['utility']:.3f}", result["deployed"],
            weights_text(result), str(folder / "adapter") if merged else "-",
        ])  # fmt: skip
    return f"{run}: {measure(task, fitness)}\n{aligned(rows)}"


def measure(task: Task, fitness: FitnessSettings) -> str:
    """What a search goes by, but for its penalty."""
    if fitness.objective == "nll":
        return "mean log-likelihood of the user's history (higher is better)"
    names, better = task.history_metrics, "higher" if METRICS[task.history_metrics[0]].higher_is_better else "lower"
    return f"{fitness.m_reduce} of {' and '.join(names)} on the user's history ({better} is better)"


def weights_text(result: Mapping[str, Any]) -> str:
    """`1043: +0.79, 1041: +0.23`, most similar first; of weights by layer their mean."""
    parts = []
    for sharer, weight in zip(result.get("sharers", []), result.get("weights", []), strict=False):
        parts.append(f"{sharer}: {fmean(weight) if isinstance(weight, list) else weight:+.2f}")
    return ", ".join(parts) or "-"
