"""Official LaMP files to the files that all stages read.

Reads   <lamp_dir>/{train,dev}_questions.json and {train,dev}_outputs.json, or each in a folder train/, dev/
Writes  <output_dir>/user_base_LLM.json, user_anchor_candidate.json, user_reserve_10_percent.json,
        <output_dir>/test_100/user_test_100.json, user_test_100_label.json; no user is in two files
        <output_dir>/prepare_report.json       what was read, dropped and written; last of all
Takes   about a minute per GB, within a few hundred MB of memory. A second run makes the same files again.

    python prepare_data.py --task_name movie_tagging --lamp_dir ./lamp/LaMP_2 --output_dir ./data/movie_tagging

docs/real_data.md: where the files are, what is done to them, and what differs from those of the Per-Pcs authors.
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
from dataclasses import dataclass
from pathlib import Path

from prime import settings as opt
from prime.errors import InputError
from prime.report.tables import aligned
from prime.runs.progress import bar
from prime.sources.gather import OVERLAP
from prime.sources.placing import report_notes, report_rows
from prime.sources.prepare import BASE_SHARE, RESERVE_SHARE, TEST_USERS, Options, Shares, prepare
from prime.users.data import load_profiles
from prime.users.tasks import get_task


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Who goes where."""

    test_users: int = opt.setting(TEST_USERS, "those with the longest histories", parse=opt.positive)
    base_share: float = opt.setting(BASE_SHARE, "of the others: train the task", parse=opt.below_one)
    reserve_share: float = opt.setting(
        RESERVE_SHARE,
        "of the others: set aside, no stage reads them; the rest are candidates for anchors",
        parse=opt.below_one,
    )
    min_items: int = opt.setting(1, "history items of a user at least", parse=opt.positive)
    overlap: float = opt.setting(
        OVERLAP,
        "where questions have no user_id: two profiles are of one user if |both| / |either| is at least this and "
        "chance does not explain it",
        parse=opt.fraction,
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group(without=("data_dir", "refresh"))
    lamp_dir: str = opt.setting(help="folder of the official files of this task")
    output_dir: str = opt.task_path("./data/<task_name>", "where the files go")
    split: str = opt.setting(
        "auto",
        "time: histories end strictly before the user's first query; auto: time where most items have a date",
        choices=("auto", "user", "time"),
    )
    citations: str | None = opt.setting(
        None, "citation only: JSON file {title: cited title} for papers of histories"
    )
    seed: int = opt.seed()
    who_goes_where: SplitSettings = opt.group()


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    task, who = get_task(settings.data.task_name), settings.who_goes_where
    if settings.citations and task.query_parts == 1:
        raise InputError(f"--citations: {task.name} has no citations")
    cited = load_profiles(settings.citations) if settings.citations else {}
    shares = Shares(who.test_users, who.base_share, who.reserve_share)
    options = Options(settings.split, shares, who.min_items, who.overlap, settings.seed)
    target = Path(settings.output_dir)
    report = prepare(task, Path(settings.lamp_dir), target, options, cited, bar)
    print(f"{aligned(report_rows(report))}\n\n{report_notes(report)}\n\nwritten: {target}")


if __name__ == "__main__":
    cli.run(main)
