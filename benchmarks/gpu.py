"""What only a GPU can tell, in one run: is the bank right there, how fast is it, and does `--plan` foresee its memory?

Reads   nothing; models are random weights
Writes  --out, one JSON object, again after every step; a step that fails or has no time left does not stop the others
Takes   at most --minutes (8), on one GPU of 24 GB or more at the shape llama-3.2-3b

    bash benchmarks/gpu.sh --out gpu.json
    bash benchmarks/gpu.sh --device cpu --shape tiny --dtype float32 --quick    # do its steps run, without a GPU?

Needs torch, transformers, peft and pytest, no network. The goals are those of benchmarks/README.md.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measuring, shapes
from prime import cli
from prime.settings import positive

SCORING = "ours,peft_loop,forward_limit,distinct_limit"
ANSWERING = f"{SCORING},published"
STEPS: dict[str, list[str]] = {
    "tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "tests/test_device.py"],
    "tag": ["benchmarks/merge.py", "--workload", "tag", "--contenders", ANSWERING, "--published_candidates", "1"],
    "title": ["benchmarks/merge.py", "--workload", "title", "--contenders", SCORING],
    "training": ["benchmarks/train_anchors.py", "--contenders", "ours,peft_loop,forward_limit"],
    "membership": ["benchmarks/membership.py", "--contenders", SCORING],
    "plan": ["benchmarks/plan.py"],
}
# How much of a benchmark's work fits into the time; for --quick the least that has every part.
SIZES = {
    "tag": ["--prompts", "99", "--repeats", "1"],
    "title": ["--prompts", "16", "--budget", "5", "--repeats", "1"],
    "membership": ["--adapters", "8", "--records", "99", "--repeats", "1"],
    "training": ["--anchors", "8", "--records", "12", "--repeats", "1"],
}
QUICK = {
    "tag": ["--prompts", "3", "--budget", "5", "--repeats", "1"],
    "title": ["--prompts", "3", "--budget", "5", "--repeats", "1"],
    "membership": ["--adapters", "2", "--records", "6", "--repeats", "1"],
    "training": ["--anchors", "2", "--records", "6", "--repeats", "1"],
}
TAIL = 3000  # characters of a failed step's output that are kept


def run_step(words: Sequence[str], seconds: float) -> dict[str, Any]:
    """One step in a process of its own: its command, seconds and exit code, and the object in its last line."""
    step: dict[str, Any] = {"command": " ".join(["python", *words])}
    if seconds <= 0:
        return step | {"exit": None, "error": "no time left"}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=measuring.ROOT, timeout=seconds, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        code, output = None, bytes(stopped.stdout or b"").decode(errors="replace")
    step |= {"exit": code, "seconds": time.perf_counter() - started}
    print(output, flush=True)
    last = (output.strip().splitlines() or [""])[-1]
    if code == 0:
        return step | {"result": json.loads(last) if last.startswith("{") else last}
    return step | {"error": "stopped: no time left" if code is None else "failed", "output": output[-TAIL:]}


def rows_of(name: str, step: dict[str, Any]) -> list[object]:
    """A step's line of the table: its own ratios, or its last line, or why there is none."""
    result = step.get("result", step.get("error"))
    if not isinstance(result, dict):
        return [name, step["exit"], step.get("seconds", 0.0), result]
    if name == "plan":
        apart = {phase: f"{sides['planned'] / sides['measured']:.2f}" for phase, sides in result.items()}
        return [name, 0, step["seconds"], f"planned over measured: {apart}"]
    ratios = {key: f"{value:.3g}" for key, value in result.items() if "_over_" in key and value is not None}
    return [name, 0, step["seconds"], f"equal: {result['outputs_equal']}, {ratios}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the figures of all steps")
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="llama-3.2-3b", help="model")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="where to compute")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the base model")
    parser.add_argument("--minutes", type=positive, default=8, help="at most, for all steps")
    parser.add_argument("--quick", action="store_true", help="little work: to see whether every step runs")
    parser.add_argument("--steps", type=measuring.names_of(tuple(STEPS)), default=tuple(STEPS), help="with commas")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    figures: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(args).items()}, "steps": {}}
    sizes, place = (
        QUICK if args.quick else SIZES,
        ["--shape", args.shape, "--device", args.device, "--dtype", args.dtype],
    )
    for name in args.steps:
        words = [*STEPS[name], *(["-k", args.device] if name == "tests" else place)]
        if name in sizes:
            words = [*words, *sizes[name], "--profile"]
        figures["steps"][name] = run_step(words, end - time.monotonic())
        args.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    rows = [rows_of(name, step) for name, step in figures["steps"].items()]
    print(measuring.table(rows, ["step", "exit", "seconds", ""]))
    if any(step["exit"] != 0 for step in figures["steps"].values()):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
