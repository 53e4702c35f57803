"""One setting of stage 4 changed at a time, on the trained demo: scores with intervals, differences, a plot.

Reads   the embedded demo; stages 1 to 3 of every (task, seed) are run first, by reproduce.sh
Writes  <output_dir>/seed<seed>/<task>/sweep/<option>-<value>/   what stage 4 writes
        <output_dir>/sweep-<option>.json, sweep-<option>-<task>.{png,svg}      the figures of the tables, and plots
Takes   a minute per task, seed and value on one core; resumes by user

The first value is what the others are compared with: a user's statistics are added up over the seeds, and intervals
resample users. `--vary sharers` holds PriME against its null controls: random or the farthest sharers, and noise of
the same size in place of the nearest ones' adapters.

    python experiments/sweep.py --vary sharers --tasks movie_tagging,news_headline,product_rating --seeds 0,1,2
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora_composition_evo as stage
from experiments import demo_runs, seeds
from prime import cli
from prime.report import plots
from prime.report.predictions import Cell, predictions_of
from prime.report.scores import Stats, user_stats
from prime.report.tables import interval_text, markdown
from prime.runs.files import write_json
from prime.runs.run import read_results
from prime.settings import int_list
from prime.users.metrics import METRICS
from prime.users.tasks import Task, get_task

VALUES = {  # option of stage 4 -> values, the default first
    "sharers": ("nearest", "random", "farthest", "noise"),
    "n_sim": ("3", "1", "2", "5", "8"),
    "opt_budget": ("10", "0", "5", "20", "40"),
    "opt_type": ("cma", "ngopt", "tbpsa", "RandomSearch"),
    "sim_penalty": ("0.1", "0", "0.3", "1"),
    "piece_merge": ("no", "yes"),
    "merge_rule": ("delta", "factor"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--vary", required=True, choices=VALUES, help="the setting")
    parser.add_argument("--values", help=f"with commas; default, for instance: {','.join(VALUES['n_sim'])}")
    parser.add_argument("--seeds", type=int_list, default=(0,), help="run seeds, with commas")
    demo_runs.add_options(parser, users=24)
    return parser


def options_of(name: str, value: str) -> list[str]:
    """A value as options of stage 4."""
    if name == "piece_merge":
        return ["--piece_merge"] if value == "yes" else []
    return [f"--{name}", value]


def run(args: argparse.Namespace, task: str, seed: int, value: str) -> dict[str, Stats]:
    """Stage 4 at one value for the first users, unless it ran before: statistics of each user's answers."""
    folder = demo_runs.trained(task, seed, args.output_dir)
    output = folder / "sweep" / f"{args.vary}-{value}"
    asked = ["--fitness", get_task(task).fitness]
    words = [*demo_runs.search_options(task, seed, folder), *asked, *options_of(args.vary, value)]
    stage.main([*words, "--user_idxs", f"0-{args.users}", "--output_dir", str(output)])
    answers = predictions_of(read_results(output))[Cell("prime", 0, False)]
    return user_stats(get_task(task), answers, demo_runs.golds_of(task))


def compare(args: argparse.Namespace, task: Task, values: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By value: scores with intervals, and differences to the first value, paired by user."""
    totals = {value: seeds.pooled([run(args, task.name, seed, value) for seed in args.seeds]) for value in values}
    return seeds.against(task, totals, values[0])


def table(task: Task, rows: Mapping[str, Mapping[str, Any]], name: str) -> str:
    metric = task.metrics[0]
    better = "higher" if METRICS[metric].higher_is_better else "lower"
    body = []
    for value, row in rows.items():
        pair = row["paired"]
        counts = f"{pair['better']}/{pair['equal']}/{pair['worse']}"
        body.append([value, interval_text(row["scores"][metric]), interval_text(pair[metric], sign="+"), counts])
    header = [name, metric, f"minus {next(iter(rows))}", "users better/equal/worse"]
    return f"**{task.name}**, {metric}, {better} is better\n\n{markdown([header, *body])}"


def draw(results: Mapping[str, Mapping[str, Any]], name: str, stem: Path) -> None:
    """The task's first metric by value, with its interval; a figure per task."""
    for place, (task, rows) in enumerate(results.items()):
        made, axes = plots.figure()
        metric = get_task(task).metrics[0]
        scores = [row["scores"][metric] for row in rows.values()]
        means = [score["mean"] for score in scores]
        ends = [[s["mean"] - s["low"] for s in scores], [s["high"] - s["mean"] for s in scores]]
        axes.errorbar(range(len(means)), means, ends, fmt=plots.MARKERS[0], color=plots.COLOURS[place], capsize=3)
        axes.set_xticks(range(len(means)), list(rows))
        axes.set_xlabel(name)
        axes.set_ylabel(f"{task}, {metric}")
        plots.save(made, stem.with_name(f"{stem.name}-{task}"))


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    values = args.values.split(",") if args.values else VALUES[args.vary]
    results = {name: compare(args, get_task(name), values) for name in demo_runs.tasks_of(args.tasks)}
    for name, rows in results.items():
        print(f"\n{table(get_task(name), rows, args.vary)}")
    stem = Path(args.output_dir) / f"sweep-{args.vary}"
    write_json(stem.with_suffix(".json"), {"seeds": list(args.seeds), "users": args.users, "tasks": results})
    draw(results, args.vary, stem)


if __name__ == "__main__":
    cli.run(main)
