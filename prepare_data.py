"""Official LaMP files, a table of your own, or people's public texts, to the files that all stages read.

Reads   --lamp_dir: {train,dev}_questions.json and {train,dev}_outputs.json, or each in a folder train/, dev/
        --table: CSV, JSON Lines or Parquet, where a row is what a person answered to a text, and when
        --git: a clone, whose authors' commit messages are read; --acl: a clone of acl-org/acl-anthology
Writes  <output_dir>/user_base_LLM.json, user_anchor_candidate.json,
        <output_dir>/test_100/user_test_100.json, user_test_100_label.json; no user is in two files
        <output_dir>/user_reserve_10_percent.json   LaMP's: set aside
        <output_dir>/task.json                      a table's: its task, to read and to edit
        <output_dir>/prepare_report.json            what was read, dropped and written; last of all
Takes   about a minute per GB; LaMP's within a few hundred MB of memory. A second run makes the same files again.

    python prepare_data.py --table support.csv --user user --input ticket --target reply --time date
    python prepare_data.py --git ./linux --people 40
    python prepare_data.py --task_name movie_tagging --lamp_dir ./lamp/LaMP_2 --output_dir ./data/movie_tagging

docs/data.md: what a table may hold. docs/real_data.md: where LaMP's files are, what is done to them, and what differs
from those of the Per-Pcs authors.
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime import settings as opt
from prime.errors import InputError
from prime.report.tables import aligned
from prime.runs.progress import bar
from prime.sources.anthology import ENOUGH, anthology_records
from prime.sources.gather import OVERLAP
from prime.sources.git_log import git_records
from prime.sources.people import WORDS, Limits
from prime.sources.placing import TASK_FILE, Tally, report_notes, report_rows
from prime.sources.prepare import BASE_SHARE, RESERVE_SHARE, TEST_USERS, Options, Shares, prepare
from prime.sources.rows import columns_of
from prime.sources.table import Columns, answers_of, doubtful_labels, field_name, given_answers, make_task, read_records
from prime.sources.timed import Origin, Sizes, convert
from prime.users.data import load_profiles
from prime.users.tasks import get_task, task_of


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """A table of your own: its columns by name, and what its answers are."""

    table: str | None = opt.setting(None, "CSV, JSON Lines (.jsonl) or Parquet file")
    user: str | None = opt.setting(None, "column: who", metavar="COLUMN")
    input: str | None = opt.setting(None, "column: the text that was answered", metavar="COLUMN")
    target: str | None = opt.setting(None, "column: the answer, which is learned", metavar="COLUMN")
    time: str | None = opt.setting(None, "column: when; default: rows are in the order of time", metavar="COLUMN")
    id: str | None = opt.setting(None, "column: a name of the row; default its line", metavar="COLUMN")
    time_format: str | None = opt.setting(None, "of dates unlike 2024-01-31, as Python's strptime has it: %%d/%%m/%%Y")
    answers: str = opt.setting(
        "auto",
        "what they are; auto: numbers where all are, labels where few differ, else texts",
        choices=("auto", "labels", "numbers", "texts"),
    )
    labels: str | None = opt.setting(None, "the possible answers, with commas; other rows are dropped")
    scale: str | None = opt.setting(None, "LOWEST,HIGHEST or LOWEST,HIGHEST,STEP of numbers; other rows are dropped")


@dataclass(frozen=True, kw_only=True)
class PeopleSettings:
    """People's public texts: whose, and how many. Users are numbers."""

    git: str | None = opt.setting(None, "clone of a repository: of authors' commit messages, body to subject line")
    acl: str | None = opt.setting(None, "clone of the ACL Anthology: of authors' papers, abstract to title")
    people: int = opt.setting(0, "those with the most records; 0 = all", parse=opt.natural)
    items: int = opt.setting(0, "records of a person, the latest; 0 = all", parse=opt.natural)
    words: int = opt.setting(WORDS, "of a text that is answered, at most", parse=opt.positive)


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Who goes where."""

    test_users: int | None = opt.setting(
        None, f"of LaMP those with the longest histories ({TEST_USERS}); of a table drawn (a fifth)", parse=opt.positive
    )
    base_share: float = opt.setting(BASE_SHARE, "of the others: train the task", parse=opt.below_one)
    reserve_share: float = opt.setting(
        RESERVE_SHARE,
        "LaMP: of the others, set aside, no stage reads them; the rest are candidates for anchors",
        parse=opt.below_one,
    )
    queries: int | None = opt.setting(
        None, "table: rows that a test user is asked, the last (a quarter, at most 20)", parse=opt.positive
    )
    min_items: int | None = opt.setting(
        None, "history items of LaMP (1), rows of a table (3), that a user has at least", parse=opt.positive
    )
    overlap: float = opt.setting(
        OVERLAP,
        "LaMP: where questions have no user_id, two profiles are of one user if |both| / |either| is at least this "
        "and chance does not explain it",
        parse=opt.fraction,
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    task_name: str | None = opt.setting(None, "a built-in task")
    task_file: str | None = opt.setting(None, "table: a task of your own, if it has one (docs/extending.md)")
    name: str | None = opt.setting(None, "table: name of the task that is made for it; default the file's")
    lamp_dir: str | None = opt.setting(None, "folder of the official files of this task")
    output_dir: str | None = opt.setting(None, "where the files go; default ./data/<task_name>")
    split: str = opt.setting(
        "auto",
        "LaMP; time: histories end strictly before the user's first query; auto: time where most items have a date",
        choices=("auto", "user", "time"),
    )
    citations: str | None = opt.setting(
        None, "citation only: JSON file {title: cited title} for papers of histories"
    )
    seed: int = opt.seed()
    own_table: TableSettings = opt.group()
    public_texts: PeopleSettings = opt.group()
    who_goes_where: SplitSettings = opt.group()


def from_lamp(settings: Settings, lamp_dir: str) -> dict[str, Any]:
    if settings.task_name is None:
        raise InputError("--lamp_dir needs --task_name")
    task, who = get_task(settings.task_name), settings.who_goes_where
    if settings.citations and task.query_parts == 1:
        raise InputError(f"--citations: {task.name} has no citations")
    cited = load_profiles(settings.citations) if settings.citations else {}
    shares = Shares(who.test_users or TEST_USERS, who.base_share, who.reserve_share)
    options = Options(settings.split, shares, who.min_items or 1, who.overlap, settings.seed)
    return prepare(task, Path(lamp_dir), folder_of(settings, task.name), options, cited, bar)


def from_table(settings: Settings, path: Path) -> dict[str, Any]:
    own, who, tally = settings.own_table, settings.who_goes_where, Tally()
    if not (own.user and own.input and own.target):
        raise InputError(f"--table needs --user, --input and --target; {path} has the columns {columns_of(path)}")
    columns = Columns(own.user, own.input, own.target, own.time, own.id)
    records = read_records(path, columns, own.time_format, tally)
    content: dict[str, Any] | None = None
    if known := settings.task_file or settings.task_name:
        task = get_task(known)
    else:
        targets = [record.target for record in records]
        answers = given_answers(own.labels, own.scale) or answers_of(own.answers, targets)
        content = make_task(settings.name or field_name(path.stem, "task"), columns, answers)
        task = task_of(content, f"{path}: the task made for it")
        print(f"answers: {told(answers)}")
        for doubt in doubtful_labels(answers.get("labels", ()), targets):
            print(f"misspelt? {doubt}; --labels names those that are kept")
    sizes = Sizes(who.test_users, who.base_share, who.queries, who.min_items or Sizes.min_items)
    origin = Origin({str(path): path.stat().st_size}, tally, content)
    return convert(records, task, folder_of(settings, task.name), sizes, settings.seed, origin)


def from_people(settings: Settings) -> dict[str, Any]:
    own, who, tally = settings.public_texts, settings.who_goes_where, Tally()
    limits, least = Limits(own.people, own.items, own.words), who.min_items or Sizes.min_items
    if own.git:
        task, records = "news_headline", git_records(Path(own.git), limits, tally)
    else:
        task, records = "scholarly_title", anthology_records(Path(own.acl or ""), limits, tally, max(least, ENOUGH))
    known = get_task(settings.task_file or settings.task_name or task)
    sizes = Sizes(who.test_users, who.base_share, who.queries, least)
    return convert(records, known, folder_of(settings, known.name), sizes, settings.seed, Origin({}, tally))


def told(answers: dict[str, Any]) -> str:
    """What the answers of a table were taken for."""
    if "scale" in answers:
        low, high, *step = answers["scale"]
        return f"numbers from {low:g} to {high:g}, steps of {(step or [1])[0]:g} (else: --scale, --answers)"
    labels = answers.get("labels", ())
    case = ", in any case" if answers.get("ignore_case") else ""
    return f"{len(labels)} labels{case}: {', '.join(labels)} (else: --labels, --answers)" if labels else "any text"


def folder_of(settings: Settings, name: str) -> Path:
    return Path(settings.output_dir or f"./data/{name}")


def next_command(settings: Settings, folder: Path, report: dict[str, Any]) -> str:
    """What runs the pipeline on a table's files; with the demo's model, which needs no GPU."""
    task_file = settings.task_file or folder / TASK_FILE
    built_in = not settings.task_file and (settings.task_name or not settings.own_table.table)
    which = ["--tasks", report["task"]] if built_in else ["--task_file", str(task_file)]
    data = folder.parent if built_in else folder
    short = ["--set", f"history_anchor.min_items={report['min_items']}"] if report["min_items"] < opt.MIN_ITEMS else []
    return shlex.join(["bash", "reproduce.sh", *which, "--data_dir", str(data), "--k", str(report["k"]), *short])


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    lamp_dir, path, public = settings.lamp_dir, settings.own_table.table, settings.public_texts
    if sum(source is not None for source in (lamp_dir, path, public.git, public.acl)) != 1:
        raise InputError(
            "give one of --lamp_dir (official LaMP files), --table (CSV, JSON Lines or Parquet), --git (a clone) and "
            "--acl (the ACL Anthology)"
        )
    if lamp_dir:
        report = from_lamp(settings, lamp_dir)
    else:
        report = from_table(settings, Path(path)) if path else from_people(settings)
    folder = folder_of(settings, report["task"])
    print(f"{aligned(report_rows(report))}\n\n{report_notes(report)}\n\nwritten: {folder}")
    if not lamp_dir:
        command = next_command(settings, folder, report)
        print(f"next, with the demo's small model (with yours: --llama_model_path DIR):\n  {command}")


if __name__ == "__main__":
    cli.run(main)
