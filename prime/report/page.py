"""The report as a web page: report.html of a run, one file that loads nothing (across tasks: `prime.report.across`).

What each section says is gathered in prime/report/sections/, how it looks is in prime/report/templates/. The templates
escape every text, and the page's own policy (Content-Security-Policy) forbids scripts and the network.
"""

from __future__ import annotations

from pathlib import Path

from prime.report.across import write_tasks_page
from prime.report.methods import METHODS
from prime.report.sections import leakage, search, stages, utility, words
from prime.report.sections.content import Content
from prime.report.summary import leading
from prime.report.summary_table import method_rows, notes, score_tables, setting_name
from prime.report.web import render
from prime.runs.files import write_text


def write_pages(content: Content) -> list[Path]:
    """The page of the run; where its folder is named after the task (<output>/<task>), the one across tasks, too."""
    written = [write_run_page(content)]
    if content.root.name == content.task.name:
        written.append(write_tasks_page(content.root.parent))
    return written


def write_run_page(content: Content) -> Path:
    """<output>/<task>/report.html and the files in figures/ beside it."""
    summary, folder = content.summary, content.root / "figures"
    first = leading(summary)[0]
    folders = stages.stage_folders(content.root, content.task)
    attacked = leakage.read_attacked(content.sources)
    methods = dict.fromkeys(row["method"] for row in summary["rows"])
    page = render(
        "run.html",
        task=content.task,
        setting=setting_name(first["k"], first["profile"]),
        findings=words.findings(content),
        failed=stages.failures(content, folders),
        absent=stages.absences(content, folders),
        tables=score_tables(summary),
        methods=method_rows(summary),
        descriptions={name: METHODS[name].description for name in methods if name in METHODS},
        notes=notes(summary).splitlines(),
        score_figures=utility.score_figures(content, folder),
        pair_figures=utility.pair_figures(content, folder),
        users=utility.user_table(content),
        trace_figures=search.trace_figures(content, folder),
        weight_figures=search.weight_figures(content, folder),
        trade_figures=[*leakage.trade_figures(content, folder), *leakage.frontier_figures(content, folder)],
        leakage=leakage.leakage_parts(content, attacked, folder),
        examples=words.examples(content),
        folders=folders,
        versions=stages.versions(folders),
        machines=stages.machines(folders),
    )
    path = content.root / "report.html"
    write_text(path, page)
    return path
