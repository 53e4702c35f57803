"""Official LaMP files to the files that all stages read.

Reads   <lamp_dir>/{train,dev}_questions.json and {train,dev}_outputs.json, or each in a folder train/, dev/
Writes  <output_dir>/user_base_LLM.json, user_anchor_candidate.json, user_reserve_10_percent.json,
        <output_dir>/test_100/user_test_100.json, user_test_100_label.json; no user is in two files
        <output_dir>/prepare_report.json       what was read, dropped and written; last of all
Takes   about a minute per GB, within a few hundred MB of memory. A second run makes the same files again.

    python prepare_data.py --task_name movie_tagging --lamp_dir ./lamp/LaMP_2 --output_dir ./data/movie_tagging

docs/real_data.md: where the files are, what is done to them, and what differs from those of the Per-Pcs authors.
"""

import argparse
from pathlib import Path

from prime import cli
from prime.errors import InputError
from prime.report.tables import aligned
from prime.sources.gather import OVERLAP
from prime.sources.prepare import (
    BASE_SHARE,
    RESERVE_SHARE,
    TEST_USERS,
    Options,
    Shares,
    prepare,
    report_notes,
    report_rows,
)
from prime.users.data import load_profiles
from prime.users.tasks import get_task


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, reads_data=False)
    parser.add_argument("--lamp_dir", required=True, help="folder of the official files of this task")
    parser.add_argument("--output_dir", help="default ./data/<task_name>")
    parser.add_argument(
        "--split",
        default="auto",
        choices=("auto", "user", "time"),
        help="time: histories end strictly before the user's first query; auto: time where most items have a date",
    )
    parser.add_argument("--citations", help="citation only: JSON file {title: cited title} for papers of histories")
    cli.add_seed(parser)
    group = parser.add_argument_group("who goes where")
    group.add_argument("--test_users", type=cli.positive, default=TEST_USERS, help="those with the longest histories")
    group.add_argument("--base_share", type=cli.below_one, default=BASE_SHARE, help="of the others: train the task")
    group.add_argument(
        "--reserve_share",
        type=cli.below_one,
        default=RESERVE_SHARE,
        help="of the others: set aside, no stage reads them; the rest are candidates for anchors",
    )
    group.add_argument("--min_items", type=cli.positive, default=1, help="history items of a user at least")
    group.add_argument(
        "--overlap",
        type=cli.fraction,
        default=OVERLAP,
        help="where questions have no user_id: two profiles are of one user if |both| / |either| is at least this and "
        "chance does not explain it",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    task = get_task(args.task_name)
    if args.citations and task.query_parts == 1:
        raise InputError(f"--citations: {task.name} has no citations")
    cited = load_profiles(args.citations) if args.citations else {}
    shares = Shares(args.test_users, args.base_share, args.reserve_share)
    options = Options(args.split, shares, args.min_items, args.overlap, args.seed)
    target = Path(args.output_dir or f"./data/{args.task_name}")
    report = prepare(task, Path(args.lamp_dir), target, options, cited, cli.bar)
    print(f"{aligned(report_rows(report))}\n\n{report_notes(report)}\n\nwritten: {target}")


if __name__ == "__main__":
    cli.run(main)
