"""How much faster are several processes than one, each with one thread? Stage 4 of the demo, from start to end.

Reads   stages 1 to 3 of the demo, run unless finished (or those of --demo_dir)
Writes  nothing that stays; as the last line a JSON object
Takes   2 to 3 minutes with one process, and less with more (24 users, 2 CPU cores)

`seconds` are of the whole command, imports and launcher included; `work_seconds` begin when the first user is begun.
`cpu_seconds` are of each command's processes together; where others use the machine, seconds tell little and these
tell what the processes cost beside each other. `files_equal`: every file is that of one process, byte for byte, but
for the seconds noted. More processes than cores only show that nothing is lost.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kills

from experiments import demo_runs
from prime import cli
from prime.settings import int_list, positive

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--processes", type=int_list, default=(1, 2, 4), help="how many at once, with commas")
    parser.add_argument("--task", default="movie_tagging", help="task of the demo")
    parser.add_argument("--users", type=positive, default=24, help="test users, the first ones")
    parser.add_argument("--opt_budget", type=positive, default=10, help="candidates of a search: how long it is")
    parser.add_argument("--demo_dir", help="folder of a task's finished stages 1 to 3; default: made by reproduce.sh")
    parser.add_argument("--output_dir", default=demo_runs.DEFAULT_DIR, help="where stages 1 to 3 are made")
    return parser


def command(args: argparse.Namespace, demo: Path, processes: int, output: Path) -> list[str]:
    """Stage 4; one process is started without a launcher."""
    words = [str(ROOT / "lora_composition_evo.py"), *demo_runs.search_options(args.task, 0, demo)]
    words += ["--user_idxs", f"0-{args.users}", "--opt_budget", str(args.opt_budget), "--output_dir", str(output)]
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, *words]


def measure(words: list[str], output: Path) -> dict[str, float]:
    """Seconds of a command: in all, from the first user on, and of the CPU."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, started, first = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), None
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if first is None and any(output.glob("working/user*")):
            first = time.perf_counter()
        time.sleep(0.02)
    ended, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"seconds": ended - started, "work_seconds": ended - (first or started), "cpu_seconds": cpu}
    return {name: round(value, 2) for name, value in found.items()}


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    demo = Path(args.demo_dir or demo_runs.trained(args.task, 0, args.output_dir))
    runs: dict[int, dict] = {}
    files: dict[int, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for processes in sorted({1, *args.processes}):
            output = Path(folder) / str(processes)
            runs[processes] = measure(command(args, demo, processes, output), output)
            files[processes] = kills.files(output)
            print(f"{processes} processes: {runs[processes]}", file=sys.stderr, flush=True)
    for own in runs.values():
        own["speedup"] = round(runs[1]["seconds"] / own["seconds"], 3)
        own["work_speedup"] = round(runs[1]["work_seconds"] / own["work_seconds"], 3)
        own["cpu_over_one"] = round(own["cpu_seconds"] / runs[1]["cpu_seconds"], 3)
    equal = all(not kills.differing(own, files[1]) for own in files.values())
    about = {"task": args.task, "users": args.users, "cores": os.cpu_count(), "threads_each": 1}
    about["peak_mb_of_a_process"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)  # KB on Linux
    print(json.dumps(about | {"files_equal": equal, "processes": runs}))


if __name__ == "__main__":
    main()
