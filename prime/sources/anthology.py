"""The ACL Anthology's XML as people's records: an abstract is answered by its paper's title.

Users are authors, their names replaced by numbers. A paper belongs to one of its authors only, so no text is in two
histories. Volumes of 2016 on are taken, which are CC BY 4.0 (https://aclanthology.org/faq/copyright).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from prime.errors import InputError
from prime.runs.files import read_bytes
from prime.sources.people import Limits, cut, taken
from prime.sources.placing import Tally
from prime.sources.timed import Timed

FIRST_YEAR = 2016
ENOUGH = 11  # papers that an author needs, unless more are asked for
FILE_BYTES = 64 << 20
ABSTRACT, TITLE = (40, 400), (3, 20)  # words at least and at most
NAME = re.compile(r"(\d{4})\.[\w-]+|[A-Z](\d\d)")  # of a file: 2020.acl, P19


class Paper(NamedTuple):
    time: float  # a year, and its place among the papers of that year
    authors: list[str]
    abstract: str
    title: str


def anthology_records(folder: Path, limits: Limits, tally: Tally, enough: int) -> list[Timed]:
    """The records of the authors in a clone of acl-org/acl-anthology, or in a folder of its XML files.

    Args:
        enough: papers that an author needs; a paper goes to the one who has the fewest so far, of those who need more.

    Raises:
        InputError: no such files, or one that cannot be read.
    """
    papers = sorted(usable(folder, tally))
    total = Counter(author for paper in papers for author in paper.authors)
    count: Counter[str] = Counter()
    found: list[Timed] = []
    for paper in papers:
        able = [author for author in paper.authors if total[author] >= enough]
        if not able:
            tally.counts["papers of nobody with enough"] += 1
            continue
        owner = min(able, key=lambda author: (count[author] >= enough, -count[author], total[author], author))
        count[owner] += 1
        found.append(Timed(owner, paper.time, cut(paper.abstract, limits.words), paper.title))
    return taken(found, limits, tally)


def usable(folder: Path, tally: Tally) -> Iterator[Paper]:
    """Papers with an abstract and a title of some words, each title once."""
    inner = folder / "data" / "xml"
    files = sorted((inner if inner.is_dir() else folder).glob("*.xml"))
    if not files:
        raise InputError(f"{folder}: no XML files of the ACL Anthology there, nor in {inner} (--acl)")
    seen: set[str] = set()
    for path in files:
        year = year_of(path.stem)
        for place, paper in enumerate(papers_of(path) if year >= FIRST_YEAR else ()):
            tally.counts["papers read"] += 1
            abstract, title = text_of(paper, "abstract"), text_of(paper, "title")
            authors = [name_of(author) for author in paper.findall("author")]
            sizes = (len(abstract.split()), ABSTRACT), (len(title.split()), TITLE)
            if not all(least <= words <= most for words, (least, most) in sizes):
                tally.counts["papers whose abstract or title is too short or too long"] += 1
            elif title.lower() in seen:
                tally.counts["papers published twice"] += 1
            else:
                seen.add(title.lower())
                yield Paper(year + place / 1e6, [author for author in authors if author], abstract, title)


def year_of(stem: str) -> int:
    """Of a volume, by its file's name; 0 where it has none."""
    match = NAME.fullmatch(stem)
    if not match:
        return 0
    return int(match[1]) if match[1] else int(match[2]) + (2000 if int(match[2]) < 60 else 1900)


def papers_of(path: Path) -> Iterator[ElementTree.Element]:
    content = read_bytes(path, FILE_BYTES)
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:  # the Anthology's have none; entities can grow without bound
        raise InputError(f"{path}: declares entities, which no file of the Anthology does")
    try:
        yield from ElementTree.fromstring(content).iter("paper")
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: not XML: {error}") from None


def text_of(paper: ElementTree.Element, name: str) -> str:
    """The text of a part without its marks, with single spaces; "" where there is none."""
    part = paper.find(name)
    return "" if part is None else " ".join("".join(part.itertext()).split())


def name_of(author: ElementTree.Element) -> str:
    first, last = author.findtext("first") or "", author.findtext("last") or ""
    return author.get("id") or f"{first} {last}".strip().lower()
