"""How safe is a stage that is killed? Every stage is killed at random, started again, and compared with one left alone.

Reads   the embedded demo, cut to 3 test users and 4 anchors; each stage starts from what the ones before it wrote
Writes  nothing that stays; a line per run, and as the last line a JSON object of what was counted by stage
Takes   10 to 20 minutes with 20 kills of each of 8 stages (2 CPU cores)

A run is killed by SIGKILL up to --kills_per_run times, half of them at a random file operation (write, fsync, rename,
unlink), half at a random moment, and then left to finish. `equal` are the runs whose files are those of an
uninterrupted run, byte for byte, but for the seconds they took; `again` counts users who were finished when a kill
came and were computed or written once more.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import forks  # noqa: E402
import kills  # noqa: E402

from prime import cli  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--kills", type=cli.positive, default=20, help="of each stage")
    parser.add_argument("--kills_per_run", type=cli.positive, default=4, help="of one run at most")
    parser.add_argument("--stages", default=",".join(kills.STAGES), help="which are killed, with commas")
    parser.add_argument("--seed", type=int, default=0, help="of where the kills fall")
    return parser


def kill_stage(
    args: argparse.Namespace, server: forks.Forks, stage: kills.Stage, folder: Path, stream: random.Random
) -> dict[str, int]:
    """Runs of a stage until it was killed `--kills` times; what is counted."""
    counted = {"kills": 0, "runs": 0, "equal": 0, "again": 0}
    while counted["kills"] < args.kills:
        left = min(args.kills_per_run, args.kills - counted["kills"])
        outcome = kills.interrupt(server, stage, folder / f"{stage.name}-{counted['runs']}", stream, left)
        counted["kills"] += outcome.kills
        counted["runs"] += 1
        counted["equal"] += not outcome.differing
        counted["again"] += len(outcome.again)
        print(f"{stage.name}: {outcome.kills} kills, differing {outcome.differing}, again {outcome.again}", flush=True)
    return counted


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    found = {}
    with forks.forks() as server, tempfile.TemporaryDirectory() as folder:
        for stage in kills.prepare(server, Path(folder)):
            if stage.name in args.stages.split(","):
                stream = random.Random(f"{args.seed} {stage.name}")
                found[stage.name] = kill_stage(args, server, stage, Path(folder), stream)
    print(json.dumps({"kills_of_each": args.kills, "seed": args.seed, "stages": found}))


if __name__ == "__main__":
    main()
