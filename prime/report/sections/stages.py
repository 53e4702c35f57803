"""The section "What was run": the stages' folders below a run, what failed, and what was not run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prime.report.methods import METHODS
from prime.report.predictions import task_of
from prime.report.sections.content import Content
from prime.report.summary_table import missing_users
from prime.runs.run import read_results, read_settings
from prime.users.tasks import Task

PART_OF = {"sharers": "search"}  # a part of a result's seconds that another part holds already
# Scripts of a whole run in their order, and what a reader misses without them; "" where nothing of the page needs it.
STAGES = {
    "gen_profile": "",
    "task_lora": "the untouched and the task-adapted model",
    "history_anchor": "",  # its folder is often elsewhere (./anchor_selection); no sharer is trained without it
    "train_anchor_peft": "the sharers' adapters",
    "train_anchor_gate": "",
    "lora_composition_evo": "PriME",
    "lora_composition": "",
    "train_user_peft": "",
    "mia": "how much leaks",
}


class StageFolder(NamedTuple):
    """What one stage left: the users it finished, those it began, and the seconds by part that all results record."""

    path: str
    stage: str
    method: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: str
    finished: int
    unfinished: Sequence[str]
    seconds: Mapping[str, float]

    def order(self) -> tuple[int, str]:
        known = list(STAGES)
        return known.index(self.stage) if self.stage in known else len(known), self.path

    def begun(self) -> bool:
        return bool(self.finished or self.unfinished)

    def seconds_text(self) -> str:
        if not self.seconds:
            return "not recorded"
        total = sum(spent for part, spent in self.seconds.items() if part not in PART_OF)
        return f"{total:,.1f} ({', '.join(f'{part} {spent:,.1f}' for part, spent in self.seconds.items())})"


def stage_folders(root: Path, task: Task) -> list[StageFolder]:
    """All stages' folders below `root` made for the task, in the order of the pipeline."""
    folders = [_stage_folder(root, path) for path in _run_dirs(root) if task_of(path) == task.name]
    # An attack that left the sharers out has an empty folder for them.
    return sorted((folder for folder in folders if folder.begun() or folder.stage != "mia"), key=StageFolder.order)


def _run_dirs(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name != "users" and not name.startswith(".")]
        if "settings.json" in files:
            yield Path(folder)


def _stage_folder(root: Path, path: Path) -> StageFolder:
    record, results = read_settings(path), read_results(path)
    seconds: dict[str, float] = {}
    for result in results:
        for part, spent in (result.get("seconds") or {}).items():
            seconds[part] = seconds.get(part, 0.0) + spent
    return StageFolder(
        path=path.relative_to(root).as_posix(),
        stage=record["stage"],
        method=str(record.get("method", "")),
        settings=record["settings"],
        versions=record.get("versions", {}),
        machine=str(record.get("machine", "")),
        finished=len(results),
        unfinished=sorted(p.name for p in path.glob("users/*/") if not (p / "result.json").is_file()),
        seconds=seconds,
    )


def versions(folders: Sequence[StageFolder]) -> dict[str, str]:
    """Each library's versions; several where stages ran with several."""
    by_name: dict[str, set[str]] = {}
    for folder in folders:
        for name, version in folder.versions.items():
            by_name.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(several)) for name, several in by_name.items()}


def machines(folders: Sequence[StageFolder]) -> list[str]:
    return list(dict.fromkeys(folder.machine for folder in folders if folder.machine))


# --- what is missing -------------------------------------------------------------------------------


def failures(content: Content, folders: Sequence[StageFolder]) -> list[str]:
    """Rows in which nothing is right, rows that lack users, and users that a stage began and did not finish."""
    lines = [*content.summary["remarks"], *missing_users(content.summary)]
    for folder in folders:
        if folder.unfinished:
            names = ", ".join(folder.unfinished[:5]) + (", ..." if len(folder.unfinished) > 5 else "")
            begun = f"{len(folder.unfinished)} begun and not finished ({names})"
            lines.append(f"{folder.path}: {begun}; the same command again finishes them.")
    return lines


def absences(content: Content, folders: Sequence[StageFolder]) -> list[str]:
    """Stages that have not run, and rows that nobody made."""
    stages = {folder.stage for folder in folders}
    lines = [f"{stage}.py has not run: {lost}." for stage, lost in STAGES.items() if lost and stage not in stages]
    if others := [name for name in METHODS if name not in content.summary["users"]]:
        lines.append(f"rows that no stage has made: {', '.join(others)}.")
    return lines
