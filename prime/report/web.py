"""What the pages have in common: templates, which escape every text, and figures that lie in the page itself."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from prime.report import plots
from prime.report.figures.parts import Drawn


class Shown(NamedTuple):
    """A figure of the page: its files' stem, and the drawing as the text of a data address."""

    stem: str
    title: str
    sentence: str
    data: str


def show(folder: Path, stem: str, title: str, drawn: Drawn) -> Shown:
    """Write a figure's two files, and hold it for the page."""
    drawing, sentence = drawn
    _, svg = plots.save(drawing, folder / stem)
    return Shown(stem, title, sentence, base64.b64encode(svg.read_bytes()).decode("ascii"))


def render(template: str, **values: Any) -> str:
    """A page from a template; every value is escaped, and one that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
