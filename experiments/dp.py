"""Sharers' adapters under differential privacy: what merges of them are worth, and what attacks find in them.

Reads   the embedded demo; stages 1 and 2 of the task and seed are run first, by reproduce.sh
Writes  <output_dir>/seed<seed>/<task>/dp/<arm>/   stages 3, 4 and 5 of every arm
        <output_dir>/seed<seed>/<task>/dp/frontier.png, .svg
        prints one table over the arms, and the same as one JSON line
Takes   2 to 4 minutes per arm on one core; resumes by stage and user

Arms: `plain`, reproduce.sh's training, two records per item; `clipped`, the private training with next to no noise
(epsilon infinity), one record per item; and the private training at each epsilon. All hold a fifth of the items out, so
that the controlled attack has non-members. The settings of the private arms were chosen on anchors' held-out items
(experiments/dp_tuning.py), never on merges or test users.

    python experiments/dp.py --epsilons 8,4,1 --users 8
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora_composition_evo
import mia
import train_anchor_peft
from experiments import demo_runs
from prime import cli
from prime.report import plots
from prime.report.predictions import predictions_of, setting_of
from prime.report.scores import metric_intervals, stack, user_stats
from prime.report.tables import interval_text, markdown
from prime.runs.files import read_json
from prime.runs.run import read_results
from prime.settings import int_list, natural, positive
from prime.users.metrics import METRICS
from prime.users.tasks import Task, get_task

PLAIN = ["--lr", "1e-2", "--epochs", "5"]  # as reproduce.sh trains anchors
NO_NOISE = 0.01  # a noise multiplier whose noise is lost in the gradients
ATTACK = "calibrated"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--task", default="movie_tagging", help="task of the demo")
    parser.add_argument("--seed", type=natural, default=0, help="run seed")
    parser.add_argument("--epsilons", type=int_list, default=(8, 4, 1), help="budgets, with commas")
    parser.add_argument("--users", type=positive, default=8, help="test users, the first ones")
    parser.add_argument("--lora_r", type=positive, default=1, help="rank of the private adapters")
    parser.add_argument("--lr", default="4e-2", help="learning rate of the private training")
    parser.add_argument("--epochs", type=positive, default=10, help="its steps: each takes all items")
    parser.add_argument("--max_norm", default="0.05", help="clip norm of an item's gradient")
    parser.add_argument("--output_dir", default=demo_runs.DEFAULT_DIR, help="results")
    return parser


def arms(args: argparse.Namespace) -> dict[str, list[str]]:
    """Training options of every arm."""
    private = ["--enable_dp", "--batch_size", "50", "--max_per_sample_grad_norm", args.max_norm, "--lr", args.lr]
    private += ["--epochs", str(args.epochs), "--lora_r", str(args.lora_r), "--lora_alpha", str(args.lora_r)]
    options = {"plain": PLAIN, "clipped": [*private, "--sigma", str(NO_NOISE)]}
    return options | {f"epsilon {epsilon}": [*private, "--epsilon", str(epsilon)] for epsilon in args.epsilons}


def run_arm(args: argparse.Namespace, folder: Path, arm: str, training: list[str]) -> Path:
    """Stages 3 to 5 of one arm; its folder."""
    setting = "" if arm == "plain" else f"-rank{args.lora_r}-lr{args.lr}-epochs{args.epochs}-clip{args.max_norm}"
    here = folder / "dp" / f"{arm.replace(' ', '')}{setting}"
    lora, merged = here / "LoRA", here / "LoRA-Composition-evo"
    run = args.task, args.seed, folder
    holdout = ["--holdout", "0.2", "--output_dir", str(lora)]
    train_anchor_peft.main([*demo_runs.training_options(*run), *training, *holdout])
    users = ["--user_idxs", f"0-{args.users}", "--output_dir", str(merged)]
    lora_composition_evo.main([*demo_runs.search_options(*run, anchor_dir=lora), *users])
    attack = ["--anchor_dir", str(lora), "--n_sim", "3", "--max_records", "20", "--references", "0"]
    mia.main([*demo_runs.model_options(*run), *attack, "--exp_dir", str(merged)])
    return here


def utility(task: Task, golds: dict[str, str], folder: Path, users: list[str] | None = None) -> dict[str, dict]:
    """By method at k = 0, the first metric with its interval over users."""
    by_method = {}
    for cell, by_user in predictions_of(read_results(folder)).items():
        if setting_of(cell) == "k0":
            stats = user_stats(task, by_user, golds)
            chosen = [user for user in stats if users is None or user in users]
            by_method[cell.method] = metric_intervals(task, stack(stats, chosen))[task.metrics[0]]
    return by_method


def figures(task: Task, golds: dict[str, str], here: Path) -> dict[str, Any]:
    """Everything the table shows of one arm."""
    merged = here / "LoRA-Composition-evo"
    summary = read_json(merged / "mia_summary.json")
    anchors = read_results(here / "LoRA")
    spent = [anchor["privacy"]["epsilon"] for anchor in anchors if "privacy" in anchor]
    sigmas = [anchor["privacy"]["sigma"] for anchor in anchors if "privacy" in anchor]
    auroc, own_history = {}, {}
    for whose, sets in (("merged", summary["sets"]), ("sharers", summary["sharers"]["sets"])):
        for name in ("published", "controlled"):
            auroc[f"{whose} {name}"] = sets[name]["attacks"][ATTACK]["auroc"]
    for when in ("before", "after"):
        own_history[when] = fmean(anchor["history"][when][task.history_metrics[0]] for anchor in anchors)
    about = {"epsilon": max(spent, default=None), "sigma": fmean(sigmas) if sigmas else None}
    return about | {"own_history": own_history, "utility": utility(task, golds, merged), "auroc": auroc}


def table(task: Task, base: dict, rows: dict[str, dict[str, Any]]) -> str:
    methods, attacks = ("prime", "best_sharer", "uniform"), list(next(iter(rows.values()))["auroc"])
    header = ["arm", "sigma", *(f"{task.metrics[0]}, {method}" for method in methods)]
    header += [f"AUROC, {name}" for name in attacks]
    cells = [header, ["task_lora", "-", interval_text(base)]]
    cells[-1] += ["-"] * (len(header) - len(cells[-1]))
    for arm, row in rows.items():
        sigma = "-" if row["sigma"] is None else f"{row['sigma']:.2f}"
        cells.append([arm, sigma, *(interval_text(row["utility"][method]) for method in methods)])
        cells[-1] += [interval_text(row["auroc"][name]) for name in attacks]
    return markdown(cells)


def plot(task: Task, base: dict, rows: dict[str, dict[str, Any]], stem: Path) -> None:
    """Utility of the merged adapters against the controlled and the published AUROC."""
    made, axes = plots.figure()
    for place, name in enumerate(("merged controlled", "merged published")):
        x, left_right = with_errors([row["auroc"][name] for row in rows.values()])
        y, down_up = with_errors([row["utility"]["prime"] for row in rows.values()])
        axes.errorbar(
            x, y, xerr=left_right, yerr=down_up, color=plots.COLOURS[4 + place], marker=plots.MARKERS[place],
            linestyle=plots.LINES[place], linewidth=1, elinewidth=0.4, label=name,
        )  # fmt: skip
        for arm, point in zip(rows, zip(x, y, strict=True), strict=True):
            axes.annotate(arm, point, textcoords="offset points", xytext=(4, 4 - 12 * place), fontsize=7)
    axes.axhline(base["mean"], color=plots.COLOURS[7], linestyle=":", label="task_lora, no sharer")
    axes.axvline(0.5, color=plots.COLOURS[7], linewidth=0.5)
    better = "higher" if METRICS[task.metrics[0]].higher_is_better else "lower"
    axes.set(xlabel=f"AUROC, {ATTACK} attack", ylabel=f"{task.metrics[0]} ({better} is better)")
    axes.legend(frameon=False, fontsize=7)
    plots.save(made, stem)


def with_errors(estimates: list[dict[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far their intervals reach below and above them."""
    below = [estimate["mean"] - estimate["low"] for estimate in estimates]
    above = [estimate["high"] - estimate["mean"] for estimate in estimates]
    return [estimate["mean"] for estimate in estimates], [below, above]


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    task = get_task(args.task)
    folder = demo_runs.trained(args.task, args.seed, args.output_dir, until="task_lora")
    golds = demo_runs.golds_of(args.task)
    rows: dict[str, dict[str, Any]] = {}
    for arm, training in arms(args).items():
        rows[arm] = figures(task, golds, run_arm(args, folder, arm, training))
        print(f"{arm}: {json.dumps(rows[arm])}", file=sys.stderr)
    users = [result["user_id"] for result in read_results(folder / "dp" / "plain" / "LoRA-Composition-evo")]
    base = utility(task, golds, folder / "task-base_LLM", users)["task_lora"]
    plot(task, base, rows, folder / "dp" / "frontier")
    print(f"{args.task}, seed {args.seed}, {len(users)} users, k = 0; {ATTACK} attack; 95 % intervals over users")
    print(table(task, base, rows))
    print(json.dumps({"task_lora": base, **rows}))


if __name__ == "__main__":
    cli.run(main)
