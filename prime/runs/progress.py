"""Progress bars of a stage: shown by the first process only, and only on a terminal."""

from collections.abc import Callable, Iterable

from tqdm import tqdm

from prime.runs.workers import U, world


def bar(total: int, what: str, unit: str = "row") -> tqdm:
    """A progress bar over `total` units of `what`; 0 where the total is not known."""
    silent = world().rank > 0 or None  # None: tqdm is silent where the output is no terminal
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=silent, leave=False)


def for_each(
    users: Iterable[tuple[int, U]], total: int, work: Callable[[int, U, Callable[[int], object]], None]
) -> None:
    """Call `work(index, user, progress)` for each user, under a bar of users and one of answers.

    `work` calls `progress` with the number of answers that were added.
    """
    with bar(total, "test users", "user") as users_bar, bar(0, "answers") as rows_bar:
        for index, user in users:
            work(index, user, rows_bar.update)
            users_bar.update()
