"""The comparison of all methods over several seeds: every stage anew for each seed, users pooled over the seeds.

Reads   the embedded demo, through reproduce.sh --methods all
Writes  <output_dir>/seed<seed>/<task>/   what reproduce.sh writes; finished steps are skipped
        <output_dir>/seeds.json           the figures of the printed tables
Takes   about 10 minutes per task and seed on 2 cores; resumes by step

A user is the unit that is resampled: the statistics of a user's answers are added up over the seeds, so that the
intervals tell how much the choice of test users matters, and the column of seeds how much the seed does.

    python experiments/seeds.py --tasks all --seeds 0,1,2
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import demo_runs
from prime import cli
from prime.report.methods import REFERENCE, place
from prime.report.predictions import Cell, gather, task_of
from prime.report.scores import Stats, metric_intervals, paired_comparison, stack, user_stats
from prime.report.tables import interval_text, markdown
from prime.runs.files import read_json, write_json
from prime.settings import int_list
from prime.users.data import TEST_FILE, load_users
from prime.users.metrics import METRICS
from prime.users.tasks import Task, get_task

EXPERIMENTS = {"": "published", "controlled_": "controlled"}  # prefix of a row's key -> sets of the attacks
COSTS = ("seconds_per_user", "bytes_per_user")
LEAKAGE = {  # key of a row -> attack, and its figure
    "auroc": ("loss", "auroc"),
    "blind_auroc": ("loss", "blind_auroc"),
    "calibrated_auroc": ("calibrated", "auroc"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--tasks", default="all", help="tasks of the demo, with commas; all: the six of them")
    parser.add_argument("--seeds", type=int_list, default=(0, 1, 2), help="run seeds, with commas")
    parser.add_argument("--holdout", default="0", help="share of sharers' items held out, for the controlled attack")
    parser.add_argument("--output_dir", default=str(ROOT / "output" / "experiments" / "seeds"), help="runs and results")
    parser.add_argument("--only_table", action="store_true", help="run nothing, take what is finished")
    return parser


def reproduce(task: str, seed: int, holdout: str, folder: Path) -> None:
    """Run the whole job of one task and seed; steps that are finished are skipped."""
    command = ["bash", str(ROOT / "reproduce.sh"), "--methods", "all", "--tasks", task, "--seed", str(seed)]
    command += ["--holdout", holdout]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{task}.log", "w", encoding="utf-8") as log:
        subprocess.run([*command, "--output_dir", str(folder)], check=True, stdout=log, env=os.environ)


def stats_of(task: Task, folder: Path, users: Sequence[str], golds: Mapping[str, str]) -> dict[str, dict[str, Stats]]:
    """Of one seed, at k = 0 without profile: method -> user -> sufficient statistics of each metric."""
    stages = sorted(path for path in folder.iterdir() if task_of(path) == task.name)
    predictions, _ = gather(stages[0], task)
    by_method = {}
    for cell, by_user in predictions.items():
        if cell == Cell(cell.method, 0, False):
            stats = user_stats(task, by_user, golds)
            by_method[cell.method] = {user: stats[user] for user in stats if user in users}
    return by_method


def pooled(by_seed: Sequence[Mapping[str, Stats]]) -> dict[str, Stats]:
    """Each user's statistics added up over the seeds; users that every seed has."""
    totals = {}
    for user in by_seed[0]:
        if all(user in stats for stats in by_seed):
            totals[user] = reduce(added, (stats[user] for stats in by_seed))
    return totals


def against(task: Task, totals: Mapping[str, Mapping[str, Stats]], reference: str) -> dict[str, dict[str, Any]]:
    """By row: `scores` with intervals, and `paired`, the differences to the reference's row by user."""
    expected = stack(totals[reference], list(totals[reference]))
    rows = {}
    for name, total in totals.items():
        stacked = stack(total, list(total))
        rows[name] = {"scores": metric_intervals(task, stacked), "paired": paired_comparison(task, stacked, expected)}
    return rows


def added(stats: Stats, others: Stats) -> Stats:
    return {metric: stats[metric] + others[metric] for metric in stats}


def attacked(folder: Path) -> dict[str, dict[str, Any]]:
    """Of one seed: method -> set of `prime.attack.sets.SETS` -> its attacks, of all runs that were attacked."""
    summaries = map(read_json, sorted(folder.glob("*/mia_summary.json")))
    return {summary["method"]: summary["sets"] for summary in summaries}


def leakage(by_seed: Sequence[Mapping[str, Mapping[str, Any]]], method: str, name: str) -> dict[str, float | None]:
    """In one set, mean over the seeds: AUROC of the published attack and its blind baseline, and of the base-calibrated
    attack, whose blind baseline is 0.5 by construction.
    """
    means: dict[str, float | None] = dict.fromkeys(LEAKAGE)
    if all(name in sets.get(method, {}) for sets in by_seed):
        for key, (attack, figure) in LEAKAGE.items():
            means[key] = fmean(sets[method][name]["attacks"][attack][figure]["mean"] for sets in by_seed)
    return means


def cost(summaries: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    """Mean over the seeds of what personalising a user takes and stores; whether it trains on the user's history."""
    rows = []
    for summary in summaries:
        rows.append(next((row for row in summary["rows"] if row["method"] == method), {}))
    costs: dict[str, Any] = {"gradient": any(row.get("gradient") for row in rows)}
    for key in COSTS:
        by_seed = [row.get(key) for row in rows]
        costs[key] = None if None in by_seed else fmean(by_seed)
    return costs


def verdict(task: Task, difference: Mapping[str, float]) -> str:
    """Of a method against prime, by the interval of the paired difference (method minus prime)."""
    better = METRICS[task.metrics[0]].higher_is_better
    low, high = (difference["low"], difference["high"]) if better else (-difference["high"], -difference["low"])
    return "prime wins" if high < 0 else "prime loses" if low > 0 else "tie"


def compare_task(task: Task, folders: Mapping[int, Path]) -> dict[str, Any]:
    """All figures of one task: a row per method, and which seeds they come from."""
    golds = demo_runs.golds_of(task.name)
    users = [user.user_id for user in load_users(demo_runs.DEMO / task.name / TEST_FILE, task)]
    by_seed = [stats_of(task, folder, users, golds) for folder in folders.values()]
    attacks = [attacked(folder) for folder in folders.values()]
    summaries = [read_json(folder / "summary.json") for folder in folders.values()]
    rows = []
    for method in sorted(by_seed[0], key=place):
        if not all(method in stats for stats in by_seed):
            continue
        total = pooled([stats[method] for stats in by_seed])
        reference = pooled([stats[REFERENCE] for stats in by_seed])
        stacked = stack(total, list(total))
        row: dict[str, Any] = {"method": method, **metric_intervals(task, stacked)}
        for prefix, name in EXPERIMENTS.items():
            row |= {prefix + key: auroc for key, auroc in leakage(attacks, method, name).items()}
        row |= cost(summaries, method)
        singles = [metric_intervals(task, stack(stats[method], list(stats[method]))) for stats in by_seed]
        row["seeds"] = [intervals[task.metrics[0]]["mean"] for intervals in singles]
        if method != REFERENCE:
            row["paired"] = paired_comparison(task, stacked, stack(reference, list(total)))
            row["verdict"] = verdict(task, row["paired"][task.metrics[0]])
        rows.append(row)
    return {"task": task.name, "metric": task.metrics[0], "seeds": list(folders), "rows": rows}


def marked(mean: float, verdict: str) -> str:
    """A score with + or - where it is better or worse than prime's, by its verdict."""
    return f"{mean:.3f}" + {"prime loses": " +", "prime wins": " -"}.get(verdict, "")


def table(result: Mapping[str, Any]) -> str:
    """One task as a table in Markdown."""
    metric = result["metric"]
    direction = "higher" if METRICS[metric].higher_is_better else "lower"
    header = ["method", metric, "seeds", "minus prime", "users better/equal/worse", "AUROC"]
    header += ["blind", "calibrated AUROC", "prime"]
    body = []
    for row in result["rows"]:
        pair = row.get("paired")
        body.append(
            [
                row["method"],
                interval_text(row[metric]),
                ", ".join(f"{value:.3f}" for value in row["seeds"]),
                interval_text(pair[metric], sign="+") if pair else "-",
                f"{pair['better']}/{pair['equal']}/{pair['worse']}" if pair else "-",
                *("-" if row[key] is None else f"{row[key]:.3f}" for key in LEAKAGE),
                row.get("verdict", "-").removeprefix("prime "),
            ]
        )
    title = f"**{result['task']}**, {metric}, {direction} is better; seeds {', '.join(map(str, result['seeds']))}"
    return f"{title}\n\n{markdown([header, *body])}"


def overview(results: Sequence[Mapping[str, Any]]) -> str:
    """All tasks beside each other: the metric of each method, with + and - where it is better or worse than prime."""
    columns = {}
    for result in results:
        task, metric, rows = result["task"], result["metric"], result["rows"]
        columns[f"{task}, {metric}"] = {
            row["method"]: marked(row[metric]["mean"], row.get("verdict", "")) for row in rows
        }
    return by_method(columns)


def leakages(results: Sequence[Mapping[str, Any]], prefix: str) -> str:
    """All tasks beside each other: AUROC of the published attack (its blind baseline), and base-calibrated; "" where
    no method has any.
    """
    columns: dict[str, dict[str, str]] = {}
    for result in results:
        column = columns[result["task"]] = {}
        for row in result["rows"]:
            auroc, blind, calibrated = (row[prefix + key] for key in LEAKAGE)
            if auroc is not None:
                column[row["method"]] = f"{auroc:.3f} ({blind:.3f}), {calibrated:.3f}"
    return by_method(columns) if any(columns.values()) else ""


def costs(results: Sequence[Mapping[str, Any]]) -> str:
    """All tasks beside each other: seconds and stored kilobytes per user; "gradient" where a method trains on him."""
    columns: dict[str, dict[str, str]] = {}
    for result in results:
        column = columns[result["task"]] = {}
        for row in result["rows"]:
            seconds, stored = (row[key] for key in COSTS)
            parts = ["-" if seconds is None else f"{seconds:.1f} s"]
            parts += ["-" if stored is None else f"{stored / 1000:.0f} kB"] + ["gradient"] * row["gradient"]
            column[row["method"]] = ", ".join(parts)
    return by_method(columns)


def by_method(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A row per method that any column has, in the order of the tables."""
    return side_by_side("method", sorted(set().union(*columns.values()), key=place), columns)


def side_by_side(title: str, names: Sequence[str], columns: Mapping[str, Mapping[str, str]]) -> str:
    """A table of cells by column and row name, `-` where there is none."""
    table = [[title, *columns]]
    for name in names:
        table.append([name, *(column.get(name, "-") for column in columns.values())])
    return markdown(table)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    root = Path(args.output_dir)
    tasks = [get_task(name) for name in demo_runs.tasks_of(args.tasks)]
    for seed in () if args.only_table else args.seeds:
        for task in tasks:
            reproduce(task.name, seed, args.holdout, root / f"seed{seed}")
    results = []
    for task in tasks:
        folders = {seed: root / f"seed{seed}" / task.name for seed in args.seeds}
        finished = {seed: folder for seed, folder in folders.items() if (folder / "summary.json").is_file()}
        if finished:
            results.append(compare_task(task, finished))
            print(table(results[-1]) + "\n")
    if results:
        print(f"{overview(results)}\n\n{costs(results)}\n")
    for prefix, name in EXPERIMENTS.items():
        if leaked := leakages(results, prefix):
            print(f"{name}\n\n{leaked}\n")
    write_json(root / "seeds.json", {"tasks": results})
    print(json.dumps({"tasks": results}))


if __name__ == "__main__":
    cli.run(main)
