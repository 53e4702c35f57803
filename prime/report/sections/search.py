"""The section "Search and weights"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prime.report.figures.search import draw_traces, draw_weights
from prime.report.methods import METHODS
from prime.report.sections.content import Content
from prime.report.web import Shown, show
from prime.runs.forms import EVALUATED_LOSS, read_form_lines
from prime.runs.run import read_results, read_settings


def trace_figures(content: Content, folder: Path) -> list[Shown]:
    """A figure for each method that searched: the best loss by evaluation."""
    shown = []
    for method, source, record in _own_runs(content):
        if searches := searches_of(source):
            search_only = bool(record["settings"].get("search_only"))  # then no single sharer was deployed
            drawn = draw_traces(searches, search_only)
            shown.append(show(folder, f"search-{method}", f"Search of {method}", drawn))
    return shown


def weight_figures(content: Content, folder: Path) -> list[Shown]:
    """A figure for each method that merges: its users' weights."""
    shown = []
    for method, source, _ in _own_runs(content):
        merged = [result for result in read_results(source) if result.get("sharers") and result.get("weights")]
        if merged:
            shown.append(show(folder, f"weights-{method}", f"Weights of {method}", draw_weights(merged)))
    return shown


def _own_runs(content: Content) -> Iterator[tuple[str, Path, Mapping[str, Any]]]:
    """Method, folder and settings of the runs of methods that may search: not of baselines, whose weights are known."""
    for method, source in content.sources.items():
        record = read_settings(source)
        is_baseline = method in METHODS and METHODS[method].comes_with_search
        if record["method"] == method and not is_baseline:
            yield method, source, record


def searches_of(folder: Path) -> list[list[dict[str, Any]]]:
    """evaluations.jsonl of all finished users of a search, in the order of their folders."""
    searches = []
    for path in sorted(folder.glob("users/*/evaluations.jsonl")):
        if (path.parent / "result.json").is_file() and (lines := read_form_lines(path, EVALUATED_LOSS)):
            searches.append(lines)
    return searches
