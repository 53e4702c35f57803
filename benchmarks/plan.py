"""Is what `--plan` says true? Its estimate beside the measured peak of the same command, for a search and a training.

Reads   the embedded demo: its trained stages 1 to 3 (shape demo), its data and tokenizer (30m, whose weights and
        adapters are random; drafts are then never right, so more rows wait than with a trained model)
Writes  <work_dir>/<shape>/   model and adapters of the shape 30m, what the measured stages write (anew each time)
Takes   5 minutes (2 CPU cores), and 3 for stages 1 to 3 the first time

`bound` is the plan's peak if no row ends before its limit, `expected` the one if rows end as the plan expects.
Measured is the highest resident size of a process that ran nothing but the stage (VmHWM of /proc/self/status, mapped
weights included). `before` is its size when all modules were imported; `own` is peak minus `before`, so that the
part that both sides share cannot hide an error.

    python benchmarks/plan.py
"""

import argparse
import importlib
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.demo_runs import trained
from benchmarks.measuring import (
    add_threads,
    child_report,
    names_of,
    report,
    set_threads,
    status_mb,
    table,
)
from benchmarks.shapes import DEMO, model_dir, random_adapter
from prime import cli
from prime.checkpoints.loading import load_model
from prime.checkpoints.peft import save_adapter
from prime.checkpoints.plan import plan_of
from prime.merging.sharers import adapter_folder
from prime.users.data import load_users
from prime.users.tasks import TASKS, get_task

# Enough work for the peak, and no more: the demo as reproduce.sh runs it, 30m with short histories.
STAGES = {
    "search": ["lora_composition_evo.py", "--user_idxs", "0-1"],
    "training": ["train_anchor_peft.py", "--epochs", "1"],
}
SHORT = {
    "search": ["--recent_k", "8", "--opt_budget", "5"],
    "training": ["--recent_k", "4", "--user_idxs", "0-4"],
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    shapes = (DEMO, "30m", "tiny")
    parser.add_argument("--shapes", type=names_of(shapes), default=shapes[:2], help="models, with commas")
    parser.add_argument("--task_name", choices=tuple(TASKS), default="movie_tagging", help="task of the demo")
    parser.add_argument("--stages", type=names_of(tuple(STAGES)), default=tuple(STAGES), help="stages, with commas")
    parser.add_argument("--demo_dir", help="finished stages 1 to 3 of the demo; default: run or found as elsewhere")
    parser.add_argument("--work_dir", default=str(ROOT / "output/benchmarks/plan"), help="what is made on the way")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of the training")
    parser.add_argument("--child", choices=("plan", "run"), help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    add_threads(parser)
    return parser


def child(kind: str, words: list[str]) -> dict[str, float]:
    """One stage in this process, planned or run: megabytes."""
    stage = importlib.import_module(words[0].removesuffix(".py"))
    before = status_mb("VmRSS")
    if kind == "run":
        stage.main(words[1:])
        return {"before": before, "peak": status_mb("VmHWM")}
    found = plan_of(words[0].removesuffix(".py"), stage.build_parser().parse_args(words[1:]))
    sides = {"before": found.process, "bound": found.peak, "expected": found.expected or found.peak}
    return {name: size / 2**20 for name, size in sides.items()}


def in_process(kind: str, words: list[str], threads: int) -> dict[str, float]:
    return child_report([__file__, "--threads", str(threads), "--child", kind, "--", *words])


def prepare(shape: str, task: str, demo: Path, folder: Path) -> tuple[Path, Path]:
    """Model directory, and the folder with task-base_LLM and Anchor_PEFT/LoRA; of the shape unless it is the demo."""
    directory = model_dir(shape, folder, "cpu", "float32")
    if shape == DEMO:
        return directory, demo
    model = load_model(str(directory), "cpu")
    save_adapter(random_adapter(model, 0), folder / "task-base_LLM", "base")
    users = load_users(ROOT / "data/demo" / task / "user_anchor_candidate.json", get_task(task))
    for place, user in enumerate(users, start=1):
        save_adapter(random_adapter(model, place), adapter_folder(folder / "Anchor_PEFT/LoRA", user.user_id), "base")
    return directory, folder


def command(args: argparse.Namespace, stage: str, shape: str, made: tuple[Path, Path], demo: Path) -> list[str]:
    """The stage's command; `made` as `prepare` returned it."""
    model, trained_dir = made
    words = [*STAGES[stage], "--task_name", args.task_name, "--data_dir", str(ROOT / "data/demo" / args.task_name)]
    words += ["--device", "cpu", "--llama_model_path", str(model), "--lora_ckpt", str(trained_dir / "task-base_LLM")]
    words += ["--anchor_selection_dir", str(demo / "anchor_selection"), "--train_gen_len", "48"]
    if stage == "search":
        words += ["--anchor_dir", str(trained_dir / "Anchor_PEFT/LoRA"), "--k_list", "1", "--max_gen_len", "48"]
    if stage == "training" and args.gradient_checkpointing:
        words += ["--gradient_checkpointing"]
    return words + (SHORT[stage] if shape != DEMO else [])


def compare(planned: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    """Both sides in megabytes, and what is planned over what was measured."""
    own = measured["peak"] - measured["before"]
    ratios = {name: planned[name] / measured["peak"] for name in ("bound", "expected")}
    ratios |= {f"{name}_own": (planned[name] - planned["before"]) / own for name in ("bound", "expected")}
    sizes = planned | {"measured_before": measured["before"], "measured": measured["peak"], "measured_own": own}
    return {k: round(v, 1) for k, v in sizes.items()} | {f"{k}_over_measured": round(v, 3) for k, v in ratios.items()}


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    set_threads(args.threads)
    if args.child:
        return report(child(args.child, args.words))
    demo = Path(args.demo_dir or trained(args.task_name, 0, ROOT / "output/benchmarks/demo")).resolve()
    found = {}
    for shape in args.shapes:
        folder = Path(args.work_dir).resolve() / shape
        made = prepare(shape, args.task_name, demo, folder)
        for stage in args.stages:
            shutil.rmtree(folder / stage, ignore_errors=True)
            words = [*command(args, stage, shape, made, demo), "--output_dir", str(folder / stage)]
            sides = {kind: in_process(kind, words, args.threads) for kind in ("plan", "run")}
            found[f"{shape}, {stage}"] = compare(sides["plan"], sides["run"])
    over = [f"{name}_over_measured" for name in ("bound", "expected", "bound_own", "expected_own")]
    head = ("bound", "expected", "measured", *over)
    print(table([[name, *(own[key] for key in head)] for name, own in found.items()], ("megabytes", *head)))
    report(found)


if __name__ == "__main__":
    cli.run(main)
