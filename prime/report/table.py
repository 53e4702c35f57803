"""From per-user results to the files a person looks at: predictions, scores and the one table of a run.

A *cell* of the table is a method at one test setting: k retrieved items, with or without the textual profile.
Letters: `u` users, `s` sufficient statistics of a metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prime.attack import scoring
from prime.errors import InputError
from prime.report import methods
from prime.report.methods import BLIND_ROWS, METHODS, PERSONALISING, REFERENCE
from prime.report.tables import markdown
from prime.runs.files import write_json, write_text
from prime.runs.forms import MIA_SUMMARY, read_form
from prime.runs.run import read_results, read_settings, user_dirname
from prime.users import metrics
from prime.users.tasks import Task

CONTROLLED_NOTE = "controlled: the same attack, records that the sharers trained on against their held-out ones."
LEAKAGE = {  # key of a row -> its column; the controlled ones are shown where something was held out
    "auroc": "AUROC", "blind_auroc": "AUROC, blind",
    "controlled_auroc": "controlled AUROC", "controlled_blind_auroc": "controlled, blind",
}  # fmt: skip

Sample = Mapping[str, str]  # {"id", "output"}
Stats = dict[str, np.ndarray]  # metric -> [u, s], or [s] of one user


class Cell(NamedTuple):
    method: str
    k: int
    profile: bool

    def order(self) -> tuple[int, bool, tuple[int, str]]:
        return self.k, self.profile, methods.place(self.method)


Predictions = dict[Cell, dict[str, list[Sample]]]  # cell -> user id -> samples


# --- gathering -------------------------------------------------------------------------------------


def cell_of(method: str, setting: str) -> Cell:
    """("base", "k4-profile") -> the cell ("rag", 4, True)."""
    k = int(setting.removesuffix("-profile").removeprefix("k"))
    return Cell("rag" if method == "base" and k > 0 else method, k, setting.endswith("-profile"))


def setting_of(cell: Cell) -> str:
    return f"k{cell.k}" + ("-profile" if cell.profile else "")


def predictions_of(results: Iterable[Mapping[str, Any]]) -> Predictions:
    """All predictions of a stage's per-user results, by cell and user."""
    found: Predictions = {}
    for result in results:
        for method, settings in result.get("predictions", {}).items():
            for setting, samples in settings.items():
                found.setdefault(cell_of(method, setting), {})[result["user_id"]] = samples
    return found


def check_stage(stage_dir: Path, task: Task) -> None:
    """InputError unless `stage_dir` holds predictions for the task; it says which stage has to run."""
    if not any(result.get("predictions") for result in read_results(stage_dir)):
        raise InputError(
            f"{stage_dir}: no user's predictions there; run the stage that fills it first: task_lora.py, "
            "lora_composition_evo.py, lora_composition.py or train_user_peft.py with this --output_dir"
        )
    other = task_of(stage_dir)
    if other != task.name:
        raise InputError(f"{stage_dir}: made for task {other}, not {task.name}")


def task_of(stage_dir: Path) -> str | None:
    """Name of the task a stage directory was made for; None where it is no stage directory."""
    if not (stage_dir / "settings.json").is_file():
        return None
    return read_settings(stage_dir)["settings"].get("task_name")


def gather(stage_dir: Path, task: Task) -> tuple[Predictions, dict[str, Path]]:
    """Predictions of `stage_dir` and of the task's stages beside it, and the folder each method came from.

    Where two folders hold the same method, `stage_dir` wins, then the folder that comes first by name; a run of the
    method's own goes before one that it only comes along with, also where it is not finished (the table says so).
    """
    stage_dir = stage_dir.resolve()
    beside = sorted(p for p in stage_dir.parent.iterdir() if p.is_dir() and p != stage_dir)
    merged: Predictions = {}
    source: dict[str, Path] = {}
    found = {p: predictions_of(read_results(p)) for p in (stage_dir, *beside) if task_of(p) == task.name}
    for folder, own in found.items():
        if (method := read_settings(folder)["method"]) in {cell.method for cell in own}:
            source.setdefault(method, folder)
    for folder, own in found.items():
        for cell, by_user in own.items():
            if source.setdefault(cell.method, folder) == folder:
                merged[cell] = by_user
    return dict(sorted(merged.items(), key=lambda entry: entry[0].order())), source


# --- scoring ---------------------------------------------------------------------------------------


def check_golds(predictions: Predictions, golds: Mapping[str, str], labels_path: Path) -> None:
    """InputError naming the label file and the sample ids it lacks."""
    lists = (samples for by_user in predictions.values() for samples in by_user.values())
    wanted = {sample["id"] for samples in lists for sample in samples}
    missing = sorted(wanted - golds.keys())
    if missing:
        named = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise InputError(f"{labels_path}: no gold for {len(missing)} predicted sample ids: {named}")


def check_users(predictions: Predictions, users: Sequence[str], users_path: Path) -> None:
    """InputError unless some user of the test file has a prediction."""
    predicted = {user for by_user in predictions.values() for user, samples in by_user.items() if samples}
    if not predicted & set(users):
        raise InputError(f"{users_path}: none of its {len(users)} users has a prediction; is this the data of the run?")


def user_stats(task: Task, by_user: Mapping[str, Sequence[Sample]], golds: Mapping[str, str]) -> dict[str, Stats]:
    """Each user's sufficient statistics [s] for each of the task's metrics."""

    def one(samples: Sequence[Sample]) -> Stats:
        answers, right = [s["output"] for s in samples], [golds[s["id"]] for s in samples]
        return {m: metrics.sum_stats(metrics.METRICS[m], answers, right, task.labels) for m in task.metrics}

    return {user: one(samples) for user, samples in by_user.items() if samples}


def stack(stats: Mapping[str, Stats], users: Sequence[str]) -> Stats:
    """[u, s] for each metric, one row per user in the order of `users`."""
    return {m: np.stack([stats[u][m] for u in users]) for m in stats[users[0]]}


def scores(task: Task, stats: Stats) -> dict[str, dict[str, float]]:
    """Each metric with its 95 % interval from resampling users."""
    return {m: _interval(metrics.bootstrap(stats[m], metrics.METRICS[m].finish)) for m in task.metrics}


def _interval(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), (float(v) for v in values), strict=True))


def compare(task: Task, ours: Stats, reference: Stats) -> dict[str, Any]:
    """Paired by user: each metric's difference (ours minus reference), and users better, equal and worse off.

    Users are counted by the task's first metric, in its direction: "better" means better than the reference.
    """
    out: dict[str, Any] = {}
    for m in task.metrics:
        out[m] = _interval(metrics.paired_bootstrap(ours[m], reference[m], metrics.METRICS[m].finish))
    first = metrics.METRICS[task.metrics[0]]
    gain = first.finish(ours[task.metrics[0]]) - first.finish(reference[task.metrics[0]])
    gain = gain if first.higher_is_better else -gain
    tie = np.isclose(gain, 0, atol=1e-9)
    counts = {"better": gain[~tie] > 0, "equal": tie, "worse": gain[~tie] < 0}
    return out | {name: int(np.sum(mask)) for name, mask in counts.items()}


def attack_results(source: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The published attack by row: each attacked method's AUROC and blind baseline, in the published and the controlled
    experiment (`prime.attack.scoring.SETS`); base rows are blind themselves.
    """
    found: dict[str, dict[str, Any]] = {}
    for method in sorted(source, key=lambda name: name != REFERENCE):  # prime's blind baseline, if there
        path = source[method] / "mia_summary.json"
        if not path.is_file():
            continue
        summary = read_form(path, MIA_SUMMARY)
        attack = summary["attacks"].get(scoring.PUBLISHED_ATTACK)
        if summary["method"] != method or attack is None:
            continue
        held = summary.get("sets", {}).get("controlled", {}).get("attacks", {}).get(scoring.PUBLISHED_ATTACK, {})
        found[method] = {
            "auroc": attack["auroc"], "blind_auroc": attack["blind_auroc"],
            "controlled_auroc": held.get("auroc"), "controlled_blind_auroc": held.get("blind_auroc"),
        }  # fmt: skip
        for row in BLIND_ROWS:
            found.setdefault(row, {"auroc": attack["blind_auroc"], "controlled_auroc": held.get("blind_auroc")})
    return found


def seconds_per_user(method: str, results: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean seconds that personalising a user took; None where a result does not tell."""
    known = METHODS.get(method)
    parts = known.seconds if known else PERSONALISING
    needed = set(parts) if known and known.comes_with_search else {"predict"}
    recorded = [result.get("seconds", {}) for result in results]
    if not all(seconds.keys() >= needed for seconds in recorded):
        return None
    return float(np.mean([sum(seconds.get(part, 0.0) for part in parts) for seconds in recorded]))


def bytes_per_user(method: str, folder: Path, results: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean size of what is stored for a user: an adapter, or nothing where the base is deployed."""
    known = METHODS.get(method)
    if known and known.comes_with_search and read_settings(folder)["method"] != method:
        return None
    files = [folder / "users" / user_dirname(r["user_id"]) / "adapter" / "adapter_model.safetensors" for r in results]
    return float(np.mean([file.stat().st_size if file.is_file() else 0 for file in files]))


def about_methods(source: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What is the same in all rows of a method: leakage, and what a user costs."""
    attacks = attack_results(source)
    found: dict[str, dict[str, Any]] = {}
    for method, folder in source.items():
        results = read_results(folder)
        found[method] = {
            **{key: attacks.get(method, {}).get(key) for key in LEAKAGE},
            "seconds_per_user": seconds_per_user(method, results),
            "bytes_per_user": bytes_per_user(method, folder, results),
            "gradient": method in METHODS and METHODS[method].gradients,
        }
    return found


def summarise(
    task: Task,
    predictions: Predictions,
    golds: Mapping[str, str],
    about: Mapping[str, dict[str, Any]],
    expected: Sequence[str],
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        about: of each method, what stands in all of its rows, see `about_methods`.
        expected: ids of all test users; other users are left out.
    """
    stats = {cell: user_stats(task, by_user, golds) for cell, by_user in predictions.items()}
    users = {cell: [u for u in expected if u in of_cell] for cell, of_cell in stats.items()}
    rows: list[dict[str, Any]] = []
    paired: list[dict[str, Any]] = []
    present: dict[str, int] = {}
    for cell in (cell for cell in stats if users[cell]):
        present[cell.method] = min(present.get(cell.method, len(expected)), len(users[cell]))
        measured = scores(task, stack(stats[cell], users[cell]))
        rows.append(cell._asdict() | measured | about[cell.method])
        other = Cell(REFERENCE, cell.k, cell.profile)
        both = [u for u in users[cell] if u in stats.get(other, {})]
        if both and cell != other:
            paired.append(cell._asdict() | compare(task, stack(stats[cell], both), stack(stats[other], both)))
    return {
        "task": task.name,
        "rows": rows,
        "paired": paired,
        "auroc_attack": f"{scoring.PUBLISHED_ATTACK} (published: summed token loss), pooled over users; "
        f"rows {' and '.join(BLIND_ROWS)} are the blind baseline: the same attack on the task-adapted base. "
        "oppu merges nobody: its members are each user's own records, its non-members the other users'",
        "users": {method: {"present": n, "expected": len(expected)} for method, n in present.items()},
    }


# --- files -----------------------------------------------------------------------------------------


def write_stage_files(stage_dir: Path, task: Task, golds: Mapping[str, str]) -> list[Path]:
    """`output-k{k}[-profile].json` and `eval-...` of the stage's own method; returns the paths written."""
    own = read_settings(stage_dir)["method"]
    written: list[Path] = []
    for cell, by_user in predictions_of(read_results(stage_dir)).items():
        if cell.method != own:
            continue
        samples = [{"id": s["id"], "output": s["output"]} for of_user in by_user.values() for s in of_user]
        answers, right = [s["output"] for s in samples], [golds[s["id"]] for s in samples]
        files = {
            f"output-{setting_of(cell)}.json": {"task": task.lamp, "golds": samples},
            f"eval-{setting_of(cell)}.json": metrics.score(task.metrics, answers, right, task.labels),
        }
        for name, content in files.items():
            write_json(stage_dir / name, content)
            written.append(stage_dir / name)
    return written


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json and the same as two tables in summary.md."""
    write_json(folder / "summary.json", summary)
    tables = f"{markdown(table_rows(summary))}\n\n{markdown(method_rows(summary))}"
    write_text(folder / "summary.md", f"# {summary['task']}\n\n{tables}\n\n{notes(summary)}\n")


# --- the table -------------------------------------------------------------------------------------


def cell_text(value: Mapping[str, float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def leading(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of the first test setting: k = 0 without profile."""
    first = summary["rows"][0]
    return [row for row in summary["rows"] if (row["k"], row["profile"]) == (first["k"], first["profile"])]


def metric_names(summary: Mapping[str, Any]) -> list[str]:
    return [m for m in metrics.METRICS if m in summary["rows"][0]]


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and body: method, setting, metrics with intervals, and the comparison to prime."""
    names = metric_names(summary)
    header = ["method", "k", "profile", *names, f"{names[0]} - {REFERENCE}'s", "better/equal/worse"]
    paired = {Cell(p["method"], p["k"], p["profile"]): p for p in summary["paired"]}
    body = []
    for row in summary["rows"]:
        pair = paired.get(Cell(row["method"], row["k"], row["profile"]))
        counts = f"{pair['better']}/{pair['equal']}/{pair['worse']}" if pair else "-"
        values = [cell_text(row[m]) for m in names]
        difference = cell_text(pair[names[0]] if pair else None, sign="+")
        profile = "yes" if row["profile"] else "no"
        body.append([row["method"], str(row["k"]), profile, *values, difference, counts])
    return [header, *body]


def held_out(summary: Mapping[str, Any]) -> bool:
    """Whether any method was attacked in the controlled experiment."""
    return any(row["controlled_auroc"] for row in summary["rows"])


def method_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and body of what a method has one value of: leakage beside its blind baseline, and the cost of a user."""
    leakage = [key for key in LEAKAGE if held_out(summary) or not key.startswith("controlled")]
    header = ["method", *(LEAKAGE[key] for key in leakage), "seconds/user", "bytes/user", "gradient"]
    body = []
    by_method = {row["method"]: row for row in summary["rows"]}
    for row in (by_method[method] for method in sorted(by_method, key=methods.place)):
        attack = [cell_text(row[key]) for key in leakage]
        cost = [
            "-" if row[key] is None else format(row[key], style)
            for key, style in (("seconds_per_user", ".1f"), ("bytes_per_user", ",.0f"))
        ]
        body.append([row["method"], *attack, *cost, "yes" if row["gradient"] else "no"])
    return [header, *body]


def notes(summary: Mapping[str, Any]) -> str:
    """What the reader has to know beside the table: direction, intervals, the attack, missing users."""
    names = metric_names(summary)
    directions = ", ".join(f"{'higher' if metrics.METRICS[m].higher_is_better else 'lower'} {m}" for m in names)
    lines = [
        f"Better: {directions}. Brackets: 95 % intervals from resampling users.",
        f"better/equal/worse: users, by {names[0]}, against {REFERENCE}.",
        f"AUROC of attack {summary['auroc_attack']}.",
        CONTROLLED_NOTE if held_out(summary) else "",
        "seconds/user: to search, compose or train, the share of each of those trained together; without predicting. "
        "bytes/user: of the stored adapter.\ngradient: whether the user's own history is trained on.",
    ]
    for method, n in summary["users"].items():
        if n["present"] < n["expected"]:
            lines.append(f"{method}: partial, {n['present']} of {n['expected']} users.")
    return "\n".join(line for line in lines if line)
