"""What do stages 1 to 5 take at a model's real size? Seconds and peak memory of each stage script, one after the other.

Reads   nothing; data/demo/model (its tokenizer for every shape, its weights for the shape `demo`)
Writes  <work_dir>/<shape>/   the model with random weights, written once as a Hugging Face directory and loaded by the
        stages as any other; generated data and what the stages write, anew each time
Takes   shape demo 4 CPU minutes; 30m was not run in full on a CPU; less with --items, --anchors, --queries

Each stage is a process of its own, so that its peak is its own: on a GPU that of torch's allocations, on a CPU that of
the process. Options that are not given here are the published ones. The data are those of the embedded demo's
generator, in the demo's tokens, which are more to a word than Llama's. For a Llama shape, stage 2 embeds with random
weights of the published encoder's shape (DeBERTa-v3-large), for the others with the model itself, as reproduce.sh does.
Random weights hardly ever end an answer, so nearly all have the full length; what is learned means nothing.

    python benchmarks/stages.py --shape demo
    python benchmarks/stages.py --shape llama-3.2-3b --device cuda
"""

import argparse
import importlib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "demo")]

import make_world

from benchmarks import measuring, shapes
from prime import cli
from prime.checkpoints.loading import pick_device, pick_dtype
from prime.runs.files import write_text
from prime.runs.run import read_results
from prime.settings import positive

MEMBERS = 3  # sharers of a merge, the announcement's --n_sim


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    names = (shapes.DEMO, *shapes.SHAPES)
    parser.add_argument("--shape", choices=names, default=shapes.DEMO, help="model; see benchmarks/shapes.py")
    parser.add_argument("--task_name", choices=tuple(make_world.WORLDS), default="movie_tagging", help="whose data")
    parser.add_argument("--users", type=positive, default=4, help="test users")
    parser.add_argument("--queries", type=positive, default=30, help="of a test user, at most")
    parser.add_argument("--items", type=positive, default=50, help="history items used (--recent_k)")
    parser.add_argument("--anchors", type=positive, default=16, help="at most, more than 3 (--k of stage 2)")
    parser.add_argument("--base_users", type=positive, default=40, help="whose queries train the task adapter")
    parser.add_argument("--epochs", type=positive, default=3, help="of stages 1 and 3")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in stages 1 and 3")
    parser.add_argument("--work_dir", default=str(ROOT / "output/benchmarks/stages"), help="what is made on the way")
    measuring.add_machine(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return parser


def write_data(args: argparse.Namespace, folder: Path) -> None:
    """The task's files of the demo's generator, with as many users as asked for."""
    for name, content in make_world.files(args.task_name).items():
        data: Any = content
        if name == "user_base_LLM.json":
            data = data[: args.base_users]
        if name == "test_100/user_test_100.json":
            data = [user | {"query": user["query"][: args.queries]} for user in data[: args.users]]
        write_text(folder / name, make_world.to_json(data))


def commands(args: argparse.Namespace, model: Path, encoder: Path, folder: Path) -> dict[str, list[str]]:
    """The stages' options, by script."""
    data = ["--task_name", args.task_name, "--data_dir", str(folder / "data")]
    machine = ["--device", args.device, "--dtype", args.dtype, "--max_batch_tokens", str(args.max_batch_tokens)]
    base = [*data, "--llama_model_path", str(model), "--seed", str(args.seed), *machine]
    training = ["--epochs", str(args.epochs)] + ["--gradient_checkpointing"] * args.gradient_checkpointing
    task, chosen, anchors, merged = (str(folder / name) for name in ("task", "selection", "anchors", "merged"))
    adapted = [*base, "--lora_ckpt", task, "--recent_k", str(args.items)]
    selected = ["--anchor_selection_dir", chosen]
    sharers = ["--anchor_dir", anchors, "--n_sim", str(MEMBERS)]
    select = ["--encoder", str(encoder), "--k", str(args.anchors), "--device", args.device]
    search = ["--opt_type", "cma", "--opt_budget", "10", "--sim_penalty", "0.1"]
    return {
        "task_lora.py": [*base, *training, "--output_dir", task],
        "history_anchor.py": [*data, *select, "--output_dir", chosen],
        "train_anchor_peft.py": [*adapted, *selected, *training, "--output_dir", anchors],
        "lora_composition_evo.py": [*adapted, *selected, *sharers, *search, "--output_dir", merged],
        "mia.py": [*adapted, *sharers, "--exp_dir", merged],
    }


def child(words: Sequence[str]) -> dict[str, float]:
    """One stage in this process: seconds of its work without imports, CPU seconds with them, peak memory."""
    stage = importlib.import_module(words[0].removesuffix(".py"))
    started = time.perf_counter()
    stage.main(words[1:])
    seconds = time.perf_counter() - started
    device = cli.parser_of(stage.Settings, stage.__doc__).parse_args(words[1:]).device
    peak = measuring.peak_mb(pick_device(device))
    return {"work_seconds": seconds, "cpu_seconds": time.process_time(), "peak_mb": peak}


def in_process(words: Sequence[str], threads: int) -> dict[str, float]:
    started = time.perf_counter()
    figures = measuring.child_report([__file__, "--threads", str(threads), "--child", "--", *words])
    return {"seconds": time.perf_counter() - started} | figures


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    measuring.set_threads(args.threads)
    if args.child:
        return measuring.report(child(args.words))
    folder = Path(args.work_dir).resolve() / args.shape
    device = pick_device(args.device)
    model = shapes.model_dir(args.shape, folder, args.device, args.dtype)
    encoder = shapes.encoder_dir(folder) if args.shape.startswith("llama") else model
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    write_data(args, run / "data")
    head = ("seconds", "work_seconds", "cpu_seconds", "peak_mb")  # `seconds` with the start of Python and imports
    by_stage, rows = {}, []
    for script, words in commands(args, model, encoder, run).items():
        figures = by_stage[script] = in_process([script, *words], args.threads)
        rows.append([script, *(figures[key] for key in head)])
        print(f"{script}: {figures}", file=sys.stderr, flush=True)
    print(measuring.table(rows, ("stage", *head)))
    measuring.report(
        {
            "benchmark": "stages", "shape": args.shape, "stages": by_stage,
            "users": len(read_results(run / "merged")), "anchors": len(read_results(run / "anchors")),
            "settings": {key: value for key, value in vars(args).items() if key not in ("child", "words")},
            "environment": measuring.environment(device, pick_dtype(args.dtype, device)),
        }
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
