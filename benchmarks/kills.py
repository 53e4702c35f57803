"""How safe is a stage that is killed? Every stage is killed at random, started again, and compared with one left alone.

Reads   the embedded demo, cut to 3 test users and 4 anchors; each stage starts from what the ones before it wrote
Writes  nothing that stays; a line per stage, and as the last line a JSON object of what was counted
Takes   10 to 20 minutes with 20 kills of each of 8 stages (2 CPU cores)

A run is killed by SIGKILL up to --kills_per_run times, half of them at a random file operation (write, fsync, rename,
unlink), half at a random moment, and then left to finish. `differing` are files that are not, byte for byte, those of
an uninterrupted run (the seconds it took apart); `again` are users who were finished when a kill came and were computed
or written once more.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import forks
import kills

from prime import cli
from prime.settings import positive


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--kills", type=positive, default=20, help="of each stage")
    parser.add_argument("--kills_per_run", type=positive, default=4, help="of one run at most")
    parser.add_argument("--stages", default=",".join(kills.STAGES), help="which are killed, with commas")
    parser.add_argument("--seed", type=int, default=0, help="of where the kills fall")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    found = {}
    with forks.forks() as server, tempfile.TemporaryDirectory() as folder:
        for stage in kills.prepare(server, Path(folder)):
            if stage.name in args.stages.split(","):
                stream = random.Random(f"{args.seed} {stage.name}")
                own = kills.interrupt_often(
                    server, stage, Path(folder) / stage.name, stream, args.kills, args.kills_per_run
                )
                found[stage.name] = vars(own) | {"equal": not own.differing}
                print(found[stage.name], flush=True)
    print(json.dumps({"kills_of_each": args.kills, "seed": args.seed, "stages": found}))


if __name__ == "__main__":
    main()
