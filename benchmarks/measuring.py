"""What every benchmark measures alike: repeated seconds, peak memory, the machine's matrix-product peak.

Reads   nothing
Writes  nothing; `report` prints one JSON object as the last line
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from prime import cli
from prime.bank import cpu as products
from prime.report.tables import markdown
from prime.settings import natural, positive

ROOT = Path(__file__).resolve().parent.parent


def new_parser(
    doc: str | None, shapes: Sequence[str], shape: str, contenders: Sequence[str]
) -> argparse.ArgumentParser:
    """Parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--shape", choices=tuple(shapes), default=shape, help="model; see benchmarks/shapes.py")
    parser.add_argument(
        "--contenders", type=names_of(contenders), default=tuple(contenders), help="who is measured, with commas"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each contender; the median counts")
    parser.add_argument("--profile", action="store_true", help="once more ours, to see where its time goes")
    add_machine(parser)
    return parser


def add_machine(parser: argparse.ArgumentParser) -> None:
    add_threads(parser)
    parser.add_argument("--seed", type=int, default=0, help="of prompts, answers and adapters")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the base model"
    )
    parser.add_argument(
        "--max_batch_tokens", type=natural, default=0, help="tokens of one pass of ours; 0 = as the stages choose"
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=natural, default=0, help="threads of torch; 0 = as it starts")


def names_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Option type: some of the known names, with commas."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(name.strip() for name in text.split(",") if name.strip())
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}")
        return chosen

    return parse


def set_threads(threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # so that a stage keeps them


# -- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One contender's repeats."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of the process: steadier where others use the machine, too
    peak_mb: list[float] = field(default_factory=list)  # of the process (CPU) or of torch's allocations (GPU)
    extra_mb: list[float] = field(default_factory=list)  # the peak over what was in use before
    result: Any = None  # what the last repeat returned

    @property
    def median(self) -> float:
        return median(self.seconds)

    def figures(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "median": self.median,
            "cpu_seconds": self.cpu_seconds,
            "peak_mb": max(self.peak_mb),
            "extra_mb": max(self.extra_mb),
        }


def measure(runs: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, Measured]:
    """Run every contender `repeats` times, in turn, so that a slow minute of the machine meets all of them."""
    measured = {name: Measured() for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            contender = measured[name]
            contender.result = None
            before = reset_peak(device)
            started, cpu_started = time.perf_counter(), time.process_time()
            contender.result = run()
            wait(device)
            contender.seconds.append(time.perf_counter() - started)
            contender.cpu_seconds.append(time.process_time() - cpu_started)
            contender.peak_mb.append(peak_mb(device))
            contender.extra_mb.append(contender.peak_mb[-1] - before)
            print(f"{name}, repeat {repeat + 1}: {contender.seconds[-1]:.3f} s", file=sys.stderr, flush=True)
    return measured


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> float:
    """Forget the peak so far; megabytes in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, so that one contender's is not another's
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is in use
    return status_mb("VmRSS")


def peak_mb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else status_mb("VmHWM")


def status_mb(name: str) -> float:
    """A line of /proc/self/status; where there is none, the process's peak since its start."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def product_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations per second of the best of several square matrix products, PyTorch's and oneDNN's."""
    best = 0.0
    kinds: list[Callable[[Tensor, Tensor], Tensor]] = [torch.matmul]
    if device.type == "cpu" and dtype == torch.float32 and products.available():
        kinds.append(products.product)
    tries_of = list(itertools.product((1024, 2048) if device.type == "cpu" else (4096, 8192), kinds))
    for size, multiply in tries_of:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        stop = time.perf_counter() + seconds / len(tries_of)
        tries = 0
        while tries < 3 or time.perf_counter() < stop:
            wait(device)
            started = time.perf_counter()
            multiply(a, b)
            wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
            tries += 1
    return best


PROFILED = 12  # operations that a profile lists


def profile(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Where a run's time goes: the operations with the most seconds of their own, on the GPU where there is one.

    Returns:
        `busy_seconds`, of all operations together; on a GPU less than the run's seconds where it waits for the CPU to
        launch them. `operations`: name, seconds, calls.
    """
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        run()
        wait(device)
    seconds = []
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds.append((event.key, own / 1e6, event.count))
    seconds.sort(key=lambda operation: -operation[1])
    print(table([(name[:70], *rest) for name, *rest in seconds[:PROFILED]], ("operation", "own s", "calls")))
    return {"busy_seconds": sum(own for _, own, _ in seconds), "operations": seconds[:PROFILED]}


def ratio(measured: Mapping[str, Measured], over: str, under: str) -> float | None:
    """Median seconds of one contender over another's; None where one was not measured."""
    if over not in measured or under not in measured:
        return None
    return measured[over].median / measured[under].median


def ratios(measured: Mapping[str, Measured], others: Sequence[str], limits: Sequence[str]) -> dict[str, float | None]:
    """Seconds of each other contender over ours, and ours over each limit."""
    speedups = {f"speedup_over_{name}": ratio(measured, name, "ours") for name in others}
    return speedups | {f"time_over_{name}": ratio(measured, "ours", name) for name in limits}


def contenders_figures(measured: Mapping[str, Measured], flops: float, peak: float) -> dict[str, dict[str, Any]]:
    """Figures of every contender; `fraction_of_peak`: operations needed, per second, over the best rate measured."""
    return {
        name: contender.figures() | {"fraction_of_peak": flops / contender.median / peak}
        for name, contender in measured.items()
    }


def contenders_table(measured: Mapping[str, Measured]) -> str:
    head = ("contender", "median s", "all s", "cpu s", "peak MB", "over before MB")
    rows = []
    for name, contender in measured.items():
        rows.append([name, contender.median, contender.seconds, contender.cpu_seconds])
        rows[-1] += [max(contender.peak_mb), max(contender.extra_mb)]
    return table(rows, head)


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name, "processor": processor(), "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def processor() -> str:
    """The CPU's name as far as Linux tells it, and the instructions that PyTorch found."""
    lines = products.cpuinfo().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def report(figures: Mapping[str, Any]) -> None:
    print(json.dumps(figures))


def child_report(words: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark in a process of its own, so that its peak is its own; what it reports."""
    done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, cwd=ROOT)
    return json.loads(done.stdout.decode().splitlines()[-1])


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """Rows as a Markdown table; only here are figures rounded, to four digits."""
    return markdown([head, *(list(map(cell_text, row)) for row in rows)])


def cell_text(cell: object) -> str:
    if isinstance(cell, list):
        return ", ".join(map(cell_text, cell))
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return str(cell)
