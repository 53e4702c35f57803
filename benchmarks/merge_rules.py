"""Which merge rule needs how much search? `factor` and `delta`, budgets 10 and 30, over tasks and seeds of the demo.

Reads   the embedded demo; stages 1 to 3 of every (task, seed) are run first, by reproduce.sh
Writes  <output_dir>/seed<seed>/<task>/merge_rules-<start>-<step>.json   scores at k = 0 of every method
        prints one table over all finished (task, seed), and the same as one JSON line
Takes   about 8 minutes per task and seed on one core; resumes by task and seed

The search is run once per rule with the larger budget. Its first evaluations are those of a search with the smaller
budget (the trajectory does not depend on the budget, see tests/test_search.py), so the best of the first 10 is what a
budget of 10 finds.

    python benchmarks/merge_rules.py --tasks movie_tagging,news_headline,product_rating --seeds 0,1,2
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora_composition_evo as stage  # noqa: E402
from benchmarks import demo_runs  # noqa: E402
from prime import cli  # noqa: E402
from prime.data import User  # noqa: E402
from prime.engine import Engine, Predictions, predict  # noqa: E402
from prime.errors import InputError  # noqa: E402
from prime.evolution import Evaluation  # noqa: E402
from prime.journal import Journal  # noqa: E402
from prime.lora import RULES  # noqa: E402
from prime.metrics import METRICS, score  # noqa: E402
from prime.runs import derive_seed, read_json, write_json  # noqa: E402
from prime.sampling import Sampler  # noqa: E402
from prime.sharers import Pool  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--tasks", default="movie_tagging,news_headline,product_rating", help="tasks, with commas")
    parser.add_argument("--seeds", type=cli.int_list, default=(0, 1, 2), help="run seeds, with commas")
    parser.add_argument("--budgets", type=cli.int_list, default=(10, 30), help="evaluations, with commas")
    parser.add_argument("--start", default="ranked", help="where the search begins, see lora_composition_evo.py")
    parser.add_argument("--step", type=cli.above_zero, default=0.3, help="standard deviation of its first candidates")
    parser.add_argument("--users", type=cli.positive, default=24, help="test users, the first ones")
    parser.add_argument("--output_dir", default=str(ROOT / "output" / "benchmarks" / "merge_rules"), help="results")
    return parser


def best_of(evaluations: list[Evaluation], budget: int) -> Evaluation:
    """What a search of `budget` candidates finds; the others are known before it."""
    known = sum(one.origin != "search" for one in evaluations)
    return min(evaluations[: known + budget], key=lambda one: one.loss)


def measured(args: argparse.Namespace, task: str, seed: int) -> dict:
    """Scores of `run_one`, from the file where it ran before under the same options."""
    path = Path(args.output_dir) / f"seed{seed}" / task / f"merge_rules-{args.start}-{args.step:g}.json"
    options = {key: getattr(args, key) for key in ("users", "start", "step")} | {"budgets": list(args.budgets)}
    if not path.exists():
        write_json(path, options | {"scores": run_one(args, task, seed)})
    stored = read_json(path)
    changed = [key for key, value in options.items() if stored[key] != value]
    if changed:
        told = ", ".join(f"--{key} {stored[key]}, now {options[key]}" for key in changed)
        raise InputError(f"{path}: measured with {told}; remove it to measure anew")
    return stored["scores"]


def run_one(args: argparse.Namespace, task: str, seed: int) -> dict:
    """Scores at k = 0: task_lora, best_sharer, and per rule uniform and prime at each budget."""
    start = demo_runs.start(task, seed, args.output_dir)
    own, texts, engine, pool, golds = start.args, start.texts, start.engine, start.pool, start.golds
    own.start, own.step = args.start, args.step
    users = start.users
    answers: dict[str, list[tuple[str, str]]] = {}
    with cli.bar(args.users * len(RULES), f"{task}, seed {seed}", "search") as progress:
        for index, user in enumerate(users[: args.users]):
            for rule in RULES:
                for name, found in search_and_predict(args, own, texts, engine, pool, user, index, rule).items():
                    answers.setdefault(name, []).extend((a["output"], golds[a["id"]]) for a in found["k0"])
                progress.update()
    task_row = texts.task
    return {
        name: score(task_row.metrics, *zip(*pairs, strict=True), task_row.labels) for name, pairs in answers.items()
    }


def search_and_predict(
    args: argparse.Namespace, own: argparse.Namespace, texts: cli.Texts, engine: Engine, pool: Pool, user: User,
    index: int, rule: str,
) -> Predictions:  # fmt: skip
    """Answers of one user at k = 0 by everything that is compared under one rule."""
    own.merge_rule, own.opt_budget = rule, max(args.budgets)
    engine.bank.load(pool.adapters(index))
    n = own.n_sim
    with tempfile.TemporaryDirectory() as scratch, cli.bar(0, "answers") as progress:
        logs, journal = [Path(scratch) / "log.jsonl"], Journal(Path(scratch) / "journal.jsonl")
        (evaluations,) = stage.search_user(own, texts, engine, user, n, logs, journal, progress.update)
    chosen = {f"prime, {rule}, budget {b}": best_of(evaluations, b).weights for b in args.budgets}
    chosen[f"uniform, {rule}"] = torch.full((n,), 1 / n)
    if rule == "delta":  # alike under both rules
        chosen["best_sharer"] = min(evaluations[1 : 1 + n], key=lambda one: one.unpenalised).weights
        chosen["task_lora"] = torch.zeros(n)
    engine.bank.combine(torch.stack(list(chosen.values())), rule)
    sampler = Sampler(own.temperature, own.top_p, derive_seed(own.seed, user.user_id))
    methods = {name: row for row, name in enumerate(chosen)}
    return predict(engine, texts, user, methods, sampler, (), own.max_gen_len)


def table(rows: dict[str, dict[int, dict]]) -> str:
    """Mean over seeds of each task's first metric, with the seeds' values behind it."""
    methods = list(dict.fromkeys(name for by_seed in rows.values() for found in by_seed.values() for name in found))
    lines = ["| method | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
    for method in sorted(methods):
        cells = []
        for by_seed in rows.values():
            values = [next(iter(found[method].values())) for found in by_seed.values()]
            cells.append(f"{fmean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    rows: dict[str, dict[int, dict]] = {}
    for task in args.tasks.split(","):
        for seed in args.seeds:
            rows.setdefault(task, {})[seed] = measured(args, task, seed)
    first = {task: next(iter(next(iter(by_seed.values()))["task_lora"])) for task, by_seed in rows.items()}
    better = {task: "higher" if METRICS[name].higher_is_better else "lower" for task, name in first.items()}
    told = [f"{task}: {name}, {better[task]} is better" for task, name in first.items()]
    print(f"{'; '.join(told)}; mean (seeds {', '.join(map(str, args.seeds))})\n{table(rows)}")
    print(json.dumps(rows))


if __name__ == "__main__":
    cli.run(main)
