"""Is what `--plan` says true? Its estimate beside the measured peak of the same command, for a search and a training.

Reads   the embedded demo: its trained stages 1 to 3 (shape demo), its data and tokenizer (30m, whose weights and
        adapters are random; drafts are then never right, so more rows wait than with a trained model)
Writes  <work_dir>/<shape>/   model and adapters of the shape 30m, what the measured stages write (anew each time)
Takes   5 minutes (2 CPU cores), and 3 for stages 1 to 3 the first time

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

from benchmarks.demo_runs import trained  # noqa: E402
from benchmarks.measuring import (  # noqa: E402
    add_threads,
    child_report,
    names_of,
    report,
    set_threads,
    status_mb,
    table,
)
from benchmarks.shapes import DEMO, model_dir, random_adapter  # noqa: E402
from prime import cli  # noqa: E402
from prime.checkpoint import load_model  # noqa: E402
from prime.data import load_users  # noqa: E402
from prime.lora import save_adapter  # noqa: E402
from prime.plan import plan_of  # noqa: E402
from prime.sharers import adapter_folder  # noqa: E402
from prime.tasks import get_task  # noqa: E402

TASK = "movie_tagging"
DATA = ROOT / "data/demo" / TASK
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
    return {"before": found.process / 2**20, "peak": found.peak / 2**20}


def in_process(kind: str, words: list[str], threads: int) -> dict[str, float]:
    return child_report([__file__, "--threads", str(threads), "--child", kind, "--", *words])


def prepare(shape: str, demo: Path, folder: Path) -> tuple[Path, Path]:
    """Model directory, and the folder with task-base_LLM and Anchor_PEFT/LoRA; of the shape unless it is the demo."""
    directory = model_dir(shape, folder, "cpu", "float32")
    if shape == DEMO:
        return directory, demo
    model = load_model(str(directory), "cpu")
    save_adapter(random_adapter(model, 0), folder / "task-base_LLM", "base")
    for place, user in enumerate(load_users(DATA / "user_anchor_candidate.json", get_task(TASK)), start=1):
        save_adapter(random_adapter(model, place), adapter_folder(folder / "Anchor_PEFT/LoRA", user.user_id), "base")
    return directory, folder


def command(stage: str, shape: str, model: Path, made: Path, demo: Path, folder: Path, more: list[str]) -> list[str]:
    words = [*STAGES[stage], "--task_name", TASK, "--data_dir", str(DATA), "--llama_model_path", str(model)]
    words += ["--device", "cpu", "--lora_ckpt", str(made / "task-base_LLM")]
    words += ["--anchor_selection_dir", str(demo / "anchor_selection"), "--output_dir", str(folder / stage)]
    if stage == "search":
        words += ["--anchor_dir", str(made / "Anchor_PEFT/LoRA"), "--k_list", "1", "--max_gen_len", "48"]
    return words + (SHORT[stage] if shape != DEMO else []) + (more if stage == "training" else [])


def compare(planned: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    own = {"planned_own": planned["peak"] - planned["before"], "measured_own": measured["peak"] - measured["before"]}
    found = {f"planned_{k}": v for k, v in planned.items()} | {f"measured_{k}": v for k, v in measured.items()} | own
    ratios = {"ratio": planned["peak"] / measured["peak"], "ratio_own": own["planned_own"] / own["measured_own"]}
    return {k: round(v, 1) for k, v in found.items()} | {k: round(v, 3) for k, v in ratios.items()}


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    set_threads(args.threads)
    if args.child:
        return report(child(args.child, args.words))
    demo = Path(args.demo_dir) if args.demo_dir else trained(TASK, 0, ROOT / "output/benchmarks/demo")
    more = ["--gradient_checkpointing"] if args.gradient_checkpointing else []
    found = {}
    for shape in args.shapes:
        folder = Path(args.work_dir).resolve() / shape
        model, made = prepare(shape, demo, folder)
        for stage in args.stages:
            shutil.rmtree(folder / stage, ignore_errors=True)
            words = command(stage, shape, model, made, demo, folder, more)
            sides = {kind: in_process(kind, words, args.threads) for kind in ("plan", "run")}
            found[f"{shape}, {stage}"] = compare(sides["plan"], sides["run"])
    head = ("planned_peak", "measured_peak", "ratio", "planned_own", "measured_own", "ratio_own")
    print(table([[name, *(own[key] for key in head)] for name, own in found.items()], ("megabytes", *head)))
    report(found)


if __name__ == "__main__":
    main()
