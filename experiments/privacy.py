"""What protects the sharers, and at which cost in utility? The output penalty and other mechanisms, on the demo.

Reads   the embedded demo; stages 1 to 3 of every (task, seed) are run first by reproduce.sh, with a fifth of each
        anchor's history held out
Writes  <output_dir>/seed<seed>/<task>/privacy/<mechanism>/   what stages 4 and 5 write; finished users are skipped
        <output_dir>/privacy.json                             the figures of the printed tables
        <output_dir>/frontier-<task>.png, .svg                the same as plots
Takes   about 4 CPU minutes per task and seed for stages 1 to 3, then 1 to 2 per mechanism with 8 users

Utility is at k = 0 without profile. The published attack tells records of merged sharers from other anchors', the
controlled one from held-out records of the same sharers; both by base-calibrated loss. Intervals are from resampling
test users, those of several seeds together; the change in utility is paired by user and relative to `penalty 0`.

    python experiments/privacy.py --tasks movie_tagging,news_headline,product_rating --seeds 0,1,2
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora_composition_evo
import mia
from experiments import demo_runs
from prime import cli
from prime.attack.sets import set_summary
from prime.report import plots
from prime.report.figures.trade import draw_frontier
from prime.report.predictions import Cell, predictions_of
from prime.report.scores import user_stats
from prime.report.tables import interval_text, markdown
from prime.runs.files import write_json
from prime.runs.run import read_results
from prime.settings import int_list, natural, positive
from prime.users.metrics import METRICS, bootstrap
from prime.users.tasks import Task, get_task

HOLDOUT = "0.2"
ATTACK = "calibrated"

FREE = ("--sim_penalty", "0")
PENALTIES = "0,0.1,0.5,1"
REFERENCE = "penalty 0"
MECHANISMS: dict[str, tuple[str, ...]] = {  # name of a row -> options of stage 4
    "penalty": ("--sim_penalty", PENALTIES),  # one run, a row for each
    "keep_rank 1": (*FREE, "--keep_rank", "1"),
    "uniform": (*FREE, "--opt_budget", "0", "--start", "uniform", "--search_only"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--tasks", default="movie_tagging,news_headline,product_rating", help="tasks, with commas")
    parser.add_argument("--seeds", type=int_list, default=(0, 1, 2), help="run seeds, with commas")
    parser.add_argument("--users", type=positive, default=8, help="test users, the first ones")
    parser.add_argument("--mechanisms", default="all", help=f"with ;, of: {'; '.join(MECHANISMS)}")
    parser.add_argument("--max_records", type=natural, default=20, help="records of an anchor attacked; 0 = all")
    parser.add_argument("--output_dir", default=str(ROOT / "output" / "experiments" / "privacy"), help="runs, results")
    parser.add_argument("--only_table", action="store_true", help="run nothing, take what is finished")
    return parser


# -- running --------------------------------------------------------------------------------------------------------


def folder_name(mechanism: str) -> str:
    return mechanism.replace(", ", "-").replace(" ", "_")


def rows_of(mechanism: str, folder: Path) -> dict[str, Path]:
    """The run directories of a mechanism by the name of their row."""
    run_dir = folder / "privacy" / folder_name(mechanism)
    if mechanism != "penalty":
        return {mechanism: run_dir}
    return {f"penalty {penalty}": run_dir / f"penalty-{penalty}" for penalty in PENALTIES.split(",")}


def run(args: argparse.Namespace, task: str, seed: int, folder: Path, name: str) -> None:
    """Stage 4 by one mechanism for the first users, and the attack on what it deployed."""
    users = ["--user_idxs", f"0-{args.users}", "--output_dir", str(folder / "privacy" / folder_name(name))]
    lora_composition_evo.main([*demo_runs.search_options(task, seed, folder), *MECHANISMS[name], *users])
    attack = [*demo_runs.model_options(task, seed, folder), "--anchor_dir", str(folder / "Anchor_PEFT/LoRA")]
    attack += ["--skip_sharers", "--references", "0", "--max_records", str(args.max_records)]
    for run_dir in rows_of(name, folder).values():
        mia.main([*attack, "--exp_dir", str(run_dir)])


# -- figures --------------------------------------------------------------------------------------------------------


def users_of(task: Task, seed: int, run_dir: Path, golds: Mapping[str, str]) -> list[dict[str, Any]]:
    """Of each user finished and attacked in a run: statistics of the metric, similarity, and the attack's scores."""
    results = read_results(run_dir)
    predictions = predictions_of(results).get(Cell("prime", 0, False), {})
    stats = user_stats(task, predictions, golds)
    attacks = {result["user_id"]: result for result in read_results(run_dir / "mia")}
    users = []
    for result in results:
        name = result["user_id"]
        if name in attacks and name in stats:
            user = {"user": (seed, name), "stats": stats[name][task.metrics[0]], "similarity": result["similarity"]}
            users.append(user | {"deployed": result["origin"], "attack": attacks[name]})
    return users


def figures(task: Task, users: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row: utility, its loss relative to the reference (above 0: worse), similarity, AUROC of both sets."""
    metric = METRICS[task.metrics[0]]
    stats = np.stack([user["stats"] for user in users])
    of_reference = {user["user"]: user["stats"] for user in reference}
    paired = [np.r_[user["stats"], of_reference[user["user"]]] for user in users if user["user"] in of_reference]
    half, sign = stats.shape[1], -1 if metric.higher_is_better else 1

    def loss(sums: np.ndarray) -> np.ndarray:
        before = metric.finish(sums[..., half:])
        return sign * (metric.finish(sums[..., :half]) - before) / before

    attacks = [user["attack"] for user in users]
    sets = {name: set_summary(attacks, name)["attacks"][ATTACK] for name in ("published", "controlled")}
    similarity = np.array([[user["similarity"], 1.0] for user in users])
    return {
        task.metrics[0]: bootstrap(stats, metric.finish)._asdict(),
        "relative_loss": bootstrap(np.stack(paired), loss)._asdict(),
        "similarity": bootstrap(similarity, lambda sums: sums[..., 0] / sums[..., 1])._asdict(),
        **{name: attacked["auroc"] for name, attacked in sets.items()},
        "seeds": sorted({user["user"][0] for user in users}),
        "users": len(users),
        "single_sharer": fmean(user["deployed"] == "sharer" for user in users),
    }


def compare_task(args: argparse.Namespace, task: Task) -> dict[str, dict[str, Any]]:
    """Figures of all rows that have a user finished and attacked, seeds together."""
    golds = demo_runs.golds_of(task.name)
    users_by_row: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        folder = Path(args.output_dir) / f"seed{seed}" / task.name
        for mechanism in MECHANISMS:
            for row, run_dir in rows_of(mechanism, folder).items():
                users_by_row.setdefault(row, []).extend(users_of(task, seed, run_dir, golds))
    reference = users_by_row[REFERENCE]
    return {row: figures(task, users, reference) for row, users in users_by_row.items() if users and reference}


def table(task: Task, rows: Mapping[str, Mapping[str, Any]]) -> str:
    metric = task.metrics[0]
    direction = "higher" if METRICS[metric].higher_is_better else "lower"
    header = [task.name, f"{metric} ({direction} is better)", "relative loss", "similarity", "AUROC, published"]
    header += ["AUROC, controlled", "deploys a single sharer", "seeds x users"]
    cells = [header]
    for name, row in rows.items():
        cells.append([name, interval_text(row[metric]), interval_text(row["relative_loss"], sign="+")])
        cells[-1] += [interval_text(row[key]) for key in ("similarity", "published", "controlled")]
        cells[-1] += [f"{row['single_sharer']:.0%}", f"{len(row['seeds'])}, {row['users']} in all"]
    return markdown(cells)


def points(task: Task, rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as points of `prime.report.figures.trade`: short labels, and the numbers of the penalties."""
    metric = task.metrics[0]
    return [
        {
            "label": name.replace("keep_rank", "rank"),
            "penalty": float(name.removeprefix("penalty ")) if name.startswith("penalty ") else None,
            metric: row[metric],
            "auroc": row["published"],
            "controlled_auroc": row["controlled"],
        }
        for name, row in rows.items()
    ]


def show(task: Task, rows: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Draw the rows; their table, and the figure in a sentence."""
    if not rows:
        return f"{task.name}: nothing finished"
    made, sentence = draw_frontier(points(task, rows), task.metrics[0])
    plots.save(made, folder / f"frontier-{task.name}")
    return f"{table(task, rows)}\n\n{sentence}"


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    tasks = [get_task(name) for name in args.tasks.split(",")]
    chosen = list(MECHANISMS) if args.mechanisms == "all" else [name.strip() for name in args.mechanisms.split(";")]
    for seed in () if args.only_table else args.seeds:
        for task in tasks:
            with open(os.devnull, "w", encoding="utf-8") as silent, contextlib.redirect_stdout(silent):
                folder = demo_runs.trained(task.name, seed, args.output_dir, options=["--holdout", HOLDOUT])
                for name in chosen:
                    run(args, task.name, seed, folder, name)
    rows_by_task = {task.name: compare_task(args, task) for task in tasks}
    for task in tasks:
        print(f"{show(task, rows_by_task[task.name], Path(args.output_dir))}\n")
    write_json(Path(args.output_dir) / "privacy.json", rows_by_task)
    print(json.dumps(rows_by_task))


if __name__ == "__main__":
    cli.run(main)
