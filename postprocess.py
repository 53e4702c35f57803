"""Stage 6: from per-user results to predictions, scores, and the one table of the run.

Reads   <output_dir>/users/*/result.json of a stage that predicts (1, 4, 4b, 4c), the stages beside it, mia_summary.json
        where stage 5 has run, <data_dir>/test_100/user_test_100.json and user_test_100_label.json
Writes  <output_dir>/output-k{k}.json, output-k{k}-profile.json   predictions in LaMP's format
        <output_dir>/eval-k{k}.json, eval-k{k}-profile.json       their scores
        <output_dir>/../summary.json, summary.md                  rows per method, of all stages found there
        <output_dir>/../scores.csv, weights.csv                   each user's scores, and weights of the sharers
        <output_dir>/../report.html, figures/                     the same as a page to read, its figures as PNG and SVG
        <output_dir>/../../report.html, figures/                  across tasks, where folders are <output>/<task>/
        <output_dir>/frontier.json, .png, .svg                    in place of tables and page, where it holds runs of
                                                                  several penalties (penalty-<p>/)
Takes   seconds. Runs on what is there: a partial stage gives partial scores, and the table says so.

    python postprocess.py --task_name movie_tagging --output_dir ./output/movie_tagging/LoRA-Composition-evo
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
from dataclasses import dataclass, replace
from pathlib import Path

from prime import settings as opt


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group(without=("refresh",))
    output_dir: str = opt.setting(help="output of a stage that predicts")


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

from prime.report.frontier import frontier_table, write_frontier
from prime.report.page import write_pages
from prime.report.predictions import check_answers, check_golds, check_stage, check_users, gather
from prime.report.records import write_records
from prime.report.scores import write_stage_files
from prime.report.sections.content import Content
from prime.report.summary import about_methods, build_summary
from prime.report.summary_table import printed, write_summary
from prime.runs.penalties import penalty_runs
from prime.users.data import LABEL_FILE, TEST_FILE, load_labels, load_users
from prime.users.metrics import with_unicode
from prime.users.tasks import get_task


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    task, stage_dir = get_task(settings.data.task), Path(settings.output_dir)
    penalties = penalty_runs(stage_dir)
    runs = penalties or [stage_dir]
    for run in runs:
        check_stage(run, task)
    users_path, labels_path = settings.data.folder / TEST_FILE, settings.data.folder / LABEL_FILE
    users, golds = load_users(users_path, task), load_labels(labels_path)
    task = replace(task, metrics=with_unicode(task.metrics, golds.values()))
    user_ids = [user.user_id for user in users]
    for run in runs:
        predictions, sources = gather(run, task)
        check_users(predictions, user_ids, users_path)
        check_golds(predictions, golds, labels_path)
        check_answers(predictions, users, sources)
        write_stage_files(run, task, golds)
    if penalties:
        print(frontier_table(write_frontier(stage_dir, task, golds)))
        return
    summary = build_summary(task, predictions, golds, about_methods(sources), user_ids)
    root = stage_dir.resolve().parent
    write_summary(root, summary)
    write_records(root, task, predictions, golds, sources)
    inputs: dict[str, str] = {}
    for user in users:
        inputs |= {query.id: query.input for query in user.queries}
    pages = write_pages(Content(root, task, summary, predictions, golds, sources, inputs))
    rows = f"all {len(summary['rows'])} rows: {root / 'summary.md'}"
    print(f"{printed(summary)}\n\n{rows}\nuser by user: {root / 'scores.csv'}, weights.csv")
    print("\n".join(f"to read: {path}" for path in pages))


if __name__ == "__main__":
    cli.run(main)
