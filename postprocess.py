"""Stage 6: from per-user results to predictions, scores, and the one table of the run.

Reads   <output_dir>/users/*/result.json of a stage that predicts (1, 4, 4b, 4c), the stages beside it, mia_summary.json
        where stage 5 has run, <data_dir>/test_100/user_test_100.json and user_test_100_label.json
Writes  <output_dir>/output-k{k}.json, output-k{k}-profile.json   predictions in LaMP's format
        <output_dir>/eval-k{k}.json, eval-k{k}-profile.json       their scores
        <output_dir>/../summary.json, summary.md                  rows per method, of all stages found there
        <output_dir>/../report.html, figures/                     the same as a page to read, its figures as PNG and SVG
        <output_dir>/../../report.html, figures/                  across tasks, where folders are <output>/<task>/
        <output_dir>/frontier.json, .png, .svg                    in place of tables and page, where it holds runs of
                                                                  several penalties (penalty-<p>/)
Takes   seconds. Runs on what is there: a partial stage gives partial scores, and the table says so.

    python postprocess.py --task_name movie_tagging --output_dir ./output/movie_tagging/LoRA-Composition-evo
"""

import argparse
from pathlib import Path

from prime import cli
from prime.report import page
from prime.report import table as report
from prime.report.frontier import frontier_table, write_frontier
from prime.report.tables import aligned
from prime.runs.penalties import penalty_runs
from prime.users.data import load_labels, load_users
from prime.users.tasks import get_task


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="output of a stage that predicts")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    task, stage_dir = get_task(args.task_name), Path(args.output_dir)
    runs = penalty_runs(stage_dir)
    for run in runs or [stage_dir]:
        report.check_stage(run, task)
    test = cli.data_dir(args) / "test_100"
    tested = load_users(test / "user_test_100.json", task)
    users = [user.user_id for user in tested]
    golds = load_labels(test / "user_test_100_label.json")
    for folder in runs or [stage_dir]:
        predictions, sources = report.gather(folder, task)
        report.check_users(predictions, users, test / "user_test_100.json")
        report.check_golds(predictions, golds, test / "user_test_100_label.json")
        report.write_stage_files(folder, task, golds)
    if runs:
        print(frontier_table(write_frontier(stage_dir, task, golds)))
        return
    summary = report.summarise(task, predictions, golds, report.about_methods(sources), users)
    root = stage_dir.resolve().parent
    report.write_summary(root, summary)
    inputs = {query.id: query.input for user in tested for query in user.queries}
    written = page.write_pages(page.Content(root, task, summary, predictions, golds, sources, inputs))
    print(aligned(report.table_rows(summary)))
    print(f"\n{aligned(report.method_rows(summary))}\n\n{report.notes(summary)}\n")
    print("\n".join(f"to read: {path}" for path in written))


if __name__ == "__main__":
    cli.run(main)
