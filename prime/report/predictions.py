"""What the stages predicted, gathered from their results by cell of the table, and checked against the data.

A *cell* of the table is a method at one test setting: k retrieved items, with or without the textual profile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prime.errors import InputError
from prime.report import methods
from prime.runs.run import read_results, read_settings
from prime.users.data import User
from prime.users.tasks import Task

Sample = Mapping[str, str]  # {"id", "output"}


class Cell(NamedTuple):
    method: str
    k: int
    profile: bool

    def order(self) -> tuple[int, bool, tuple[int, str]]:
        return self.k, self.profile, methods.place(self.method)


CellPredictions = dict[Cell, dict[str, list[Sample]]]  # cell -> user id -> samples


def cell_of(method: str, setting: str) -> Cell:
    """The cell of a stored prediction: ("base", "k4-profile") is of the row rag, with 4 items and the profile."""
    k = int(setting.removesuffix("-profile").removeprefix("k"))
    return Cell("rag" if method == "base" and k > 0 else method, k, setting.endswith("-profile"))


def setting_of(cell: Cell) -> str:
    return f"k{cell.k}" + ("-profile" if cell.profile else "")


def predictions_of(results: Iterable[Mapping[str, Any]]) -> CellPredictions:
    """All predictions in the results of a stage's users."""
    predictions: CellPredictions = {}
    for result in results:
        for method, settings in result.get("predictions", {}).items():
            for setting, samples in settings.items():
                predictions.setdefault(cell_of(method, setting), {})[result["user_id"]] = samples
    return predictions


# --- gathering -------------------------------------------------------------------------------------


def task_of(stage_dir: Path) -> str | None:
    """Name of the task that a stage directory was made for; None where it is no stage directory."""
    if not (stage_dir / "settings.json").is_file():
        return None
    return read_settings(stage_dir)["settings"].get("task_name")


def check_stage(stage_dir: Path, task: Task) -> None:
    """InputError unless `stage_dir` holds predictions for the task; it says which stage has to run."""
    if not any(result.get("predictions") for result in read_results(stage_dir)):
        raise InputError(
            f"{stage_dir}: no user's predictions there; run the stage that fills it first: task_lora.py, "
            "lora_composition_evo.py, lora_composition.py or train_user_peft.py with this --output_dir"
        )
    made_for = task_of(stage_dir)
    if made_for != task.name:
        raise InputError(f"{stage_dir}: made for task {made_for}, not {task.name}")


def gather(stage_dir: Path, task: Task) -> tuple[CellPredictions, dict[str, Path]]:
    """Predictions of `stage_dir` and of the task's stages beside it, and the folder that each method comes from.

    Of several folders with the same method the method's own run comes first, also where it is unfinished (the table
    says so), before runs that predict it beside their own; among equals `stage_dir`, then the first by name.
    """
    stage_dir = stage_dir.resolve()
    beside = sorted(path for path in stage_dir.parent.iterdir() if path.is_dir() and path != stage_dir)
    folders = [folder for folder in (stage_dir, *beside) if task_of(folder) == task.name]
    by_folder = {folder: predictions_of(read_results(folder)) for folder in folders}
    sources = _sources(by_folder)
    gathered: CellPredictions = {}
    for folder, predictions in by_folder.items():
        for cell, by_user in predictions.items():
            if sources[cell.method] == folder:
                gathered[cell] = by_user
    return dict(sorted(gathered.items(), key=lambda entry: entry[0].order())), sources


def _sources(by_folder: Mapping[Path, CellPredictions]) -> dict[str, Path]:
    """The folder that each method's predictions are taken from."""
    sources: dict[str, Path] = {}
    for folder, predictions in by_folder.items():
        own_method = read_settings(folder)["method"]
        if own_method in {cell.method for cell in predictions}:
            sources.setdefault(own_method, folder)
    for folder, predictions in by_folder.items():
        for cell in predictions:
            sources.setdefault(cell.method, folder)
    return sources


# --- checks ----------------------------------------------------------------------------------------


def check_golds(predictions: CellPredictions, golds: Mapping[str, str], labels_path: Path) -> None:
    """InputError that names the label file and the sample ids it lacks."""
    predicted: set[str] = set()
    for by_user in predictions.values():
        for samples in by_user.values():
            predicted.update(sample["id"] for sample in samples)
    missing = sorted(predicted - golds.keys())
    if missing:
        named = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise InputError(f"{labels_path}: no gold for {len(missing)} predicted sample ids: {named}")


def check_answers(predictions: CellPredictions, users: Sequence[User], sources: Mapping[str, Path]) -> None:
    """InputError unless each predicted user of the test file has one answer to each of his queries, and no other.

    Args:
        sources: the folder that each method's predictions come from.
    """
    queries = {user.user_id: Counter(query.id for query in user.queries) for user in users}
    problems: list[str] = []
    for cell, by_user in predictions.items():
        for user_id in by_user.keys() & queries.keys():
            answers = Counter(sample["id"] for sample in by_user[user_id])
            if problem := _answers_problem(answers, queries[user_id]):
                where = f"{sources[cell.method]}: user {user_id}: {cell.method} at {setting_of(cell)}"
                problems.append(f"{where}: {problem}")
    if problems:
        raise InputError.many(sorted(problems))


def _answers_problem(answers: Counter[str], queries: Counter[str]) -> str:
    missing, more = queries - answers, answers - queries
    if missing:
        return f"no answer to {len(missing)} of {len(queries)} queries, {min(missing)} for one"
    twice = [query for query in more if query in queries]
    if twice:
        return f"more than one answer to {len(twice)} of {len(queries)} queries, {min(twice)} for one"
    return f"an answer to {min(more)}, which is not asked" if more else ""


def check_users(predictions: CellPredictions, users: Sequence[str], users_path: Path) -> None:
    """InputError unless some user of the test file has a prediction."""
    predicted: set[str] = set()
    for by_user in predictions.values():
        predicted.update(user for user, samples in by_user.items() if samples)
    if not predicted & set(users):
        raise InputError(f"{users_path}: none of its {len(users)} users has a prediction; is this the data of the run?")
