"""What the first process of a stage tells while it works: bars on a terminal; elsewhere (a file, SLURM) a line a minute
with the estimated end.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from prime.errors import tell
from prime.runs.workers import U, world

EVERY: float = 60  # seconds from line to line
HOUR = 3600

Group = TypeVar("Group", bound=Sequence)


class Lines:
    """In place of a bar; `tick` counts smaller steps on the way to the next unit.

    The minute between two lines runs on from one object to the next, so that many short ones are not silent. Where one
    is within another both tell.
    """

    told: float | None = None  # when the last line was
    open: list["Lines"] = []  # from the outermost one

    def __init__(self, total: int, what: str, unit: str):
        self.total, self.what, self.unit = total, what, unit
        self.done, self.steps = 0, 0
        self.told_at = (0, 0)  # done and steps of the last line
        self.started = time.time()
        Lines.told = Lines.told or self.started

    def __enter__(self) -> "Lines":
        Lines.open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Where there has been a line the last one is of the end."""
        Lines.open.remove(self)
        if self.told_at not in ((0, 0), (self.done, self.steps)):
            self._tell()

    def update(self, n: int = 1) -> None:
        self.done += n
        self._tell_each_minute()

    def tick(self, n: int = 1) -> None:
        self.steps += n
        self._tell_each_minute()

    def _tell_each_minute(self) -> None:
        if time.time() - (Lines.told or self.started) >= EVERY:
            for lines in Lines.open:
                lines._tell()

    def _tell(self) -> None:
        if self.done or self.steps:
            Lines.told, self.told_at = time.time(), (self.done, self.steps)
            tell(self.line(Lines.told))

    def line(self, now: float) -> str:
        """`test users: 3 of 24 (310 answers), 2 min; about 14 min to go, until 18:20`."""
        spent, of = now - self.started, f" of {self.total:,}" if self.total else ""
        share = f"{self.done / max(1, self.total):.0%}" if self.unit == "B" else f"{self.done:,}{of}"
        steps = f" ({self.steps:,} answers)" if self.steps else ""
        left = spent * (self.total - self.done) / self.done if 0 < self.done < self.total else 0
        end = time.strftime("%H:%M" if left < 12 * HOUR else "%a %d %b %H:%M", time.localtime(now + left))
        estimate = f"; about {duration(left)} to go, until {end}" if left else ""
        return f"{self.what}: {share}{steps}, {duration(spent)}{estimate}"


def duration(seconds: float) -> str:
    """`40 s`, `14 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def bar(total: int, what: str, unit: str = "row") -> tqdm | Lines:
    """Progress over `total` units of `what`; 0 where the total is not known."""
    if world().rank == 0 and not sys.stderr.isatty():
        return Lines(total, what, unit)
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=world().rank > 0, leave=False)


def counted(units: Iterable[Group], total: int, what: str) -> Iterator[Group]:
    """The groups, under a bar of their members; of several processes each counts its share of the `total`."""
    size = world().size
    with bar(-(-total // size), what if size == 1 else f"{what} by the first of {size} processes", "user") as progress:
        for unit in units:
            yield unit
            progress.update(len(unit))


def for_each(
    users: Iterable[tuple[int, U]], total: int, work: Callable[[int, U, Callable[[int], object]], None]
) -> None:
    """Call `work(index, user, progress)` for each user, under a bar of users and one of answers.

    `work` calls `progress` with the number of answers that were added. Of several processes each counts its share.
    """
    size = world().size
    what = "test users" if size == 1 else f"test users by the first of {size} processes"
    with bar(-(-total // size), what, "user") as users_bar, bar(0, "answers") as rows_bar:
        progress = users_bar.tick if isinstance(users_bar, Lines) else rows_bar.update
        for index, user in users:
            work(index, user, progress)
            users_bar.update()
