"""People with timed items to the data files: no record is lost or used twice, and nobody is asked about the past."""

from itertools import product
from pathlib import Path

import pytest
import world
from hypothesis import given
from hypothesis import strategies as st

from prime.errors import InputError
from prime.settings import MIN_ITEMS
from prime.sources.placing import FILES, REPORT, Tally
from prime.sources.timed import Origin, Sizes, Timed, convert, in_order, part, sharing
from prime.users.answers import ANY_TEXT, Choices
from prime.users.data import LABEL_FILE, load_labels, load_users
from prime.users.tasks import TASKS

TASK = TASKS["scholarly_title"]


def people(number: int = 12, records: int = 16) -> list[Timed]:
    """In an order that is nobody's time."""
    pairs = product(range(records), range(number))
    return [Timed(f"p{user}", 7 * i % records, f"text {user} {i}", f"title {user} {i}") for i, user in pairs]


def made(folder: Path, records: list[Timed], seed: int = 0) -> dict:
    return convert(records, TASK, folder, Sizes(), seed, Origin({}))


def test_the_files_load_and_hold_every_record_once_by_time(tmp_path: Path) -> None:
    records = people()
    report = made(tmp_path, records)
    loaded = {kind: load_users(tmp_path / FILES[kind], TASK, need_queries=True, need_golds=True)
              for kind in ("base", "candidates", "test")}  # fmt: skip
    texts: list[tuple[str, str, str]] = []
    for kind, users in loaded.items():
        for user in users:
            own = [(item["abstract"], item["title"]) for item in user.profile]
            asked = [(query.input.removeprefix(TASK.marker), query.gold) for query in user.queries]
            times = {r.input: r.time for r in records}
            assert [times[text] for text, _ in own + asked] == sorted(times[text] for text, _ in own + asked)
            assert len(asked) == {"base": 8, "candidates": 0, "test": 4}[kind]
            texts += [(user.user_id, *pair) for pair in own + asked]
    assert sorted(texts) == sorted((r.user, r.input, r.target) for r in records)
    assert [len(loaded[kind]) for kind in loaded] == [4, 6, 2] and report["k"] == 6
    golds = {query.id: query.gold for user in loaded["test"] for query in user.queries}
    assert load_labels(tmp_path / LABEL_FILE) == golds and len(golds) == 8
    assert world.read(tmp_path / REPORT)["people"] == 12


def test_the_order_of_records_of_different_times_plays_no_part(tmp_path: Path) -> None:
    records = [r._replace(id=f"{r.user}-{r.time}") for r in people()]
    for name, order in (("a", records), ("b", records[::-1])):
        made(tmp_path / name, order)
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
               for name in (FILES["base"], FILES["candidates"], FILES["test"]))  # fmt: skip


@given(st.lists(st.integers(3, 40), min_size=8, max_size=60), st.integers(0, 3))
def test_everybody_is_in_one_file_and_those_with_long_histories_may_share(lengths: list[int], seed: int) -> None:
    histories = {f"u{i}": [Timed("", 0, "", "")] * n for i, n in enumerate(lengths)}
    parts = part(histories, Sizes(), seed, Tally())
    assert sorted(sum(parts.values(), [])) == sorted(histories) and all(parts.values())
    assert len(parts["test"]) == len(lengths) // 5
    base, candidates = ([len(histories[user]) >= MIN_ITEMS for user in parts[kind]] for kind in ("base", "candidates"))
    assert not any(base) or all(candidates)


def test_what_cannot_be_used_is_dropped_counted_and_named() -> None:
    tally = Tally()
    records = [
        Timed("a", 2, "x", "y", "1"), Timed("a", 1, "x", "y", "1"), Timed("a", 2, "x", "y"), Timed(" ", 1, "x", "y"),
        Timed("a", 1, " ", "y"), Timed("a", 1, "x", "\n", "no"), Timed("a", float("nan"), "x", "y"),
    ]  # fmt: skip
    (own,) = in_order(records, tally, ANY_TEXT).values()
    assert [(r.time, r.id) for r in own] == [(1, "1.2"), (2, "1")]
    assert dict(tally.counts) == {"records read": 7, "records given twice": 1, "records without user": 1,
        "records without input": 1, "records without target": 1, "records without time": 1}  # fmt: skip
    assert tally.named["records without target"] == ["no"]


@pytest.mark.parametrize(
    ("choices", "kept"),
    [
        (Choices(("rock", "8"), ignore_case=True), ["rock", "8"]),
        (Choices(("7", "8"), (0, 10)), ["8", "8", "7.5"]),
        (ANY_TEXT, [" Rock ", "8.0", "8", "7.5", "11", "x"]),
    ],
)
def test_answers_are_written_as_the_tasks_and_others_are_dropped(choices: Choices, kept: list[str]) -> None:
    tally = Tally()
    records = [Timed("u", place, "x", text) for place, text in enumerate((" Rock ", "8.0", "8", "7.5", "11", "x"))]
    (own,) = in_order(records, tally, choices).values()
    assert [record.target for record in own] == kept
    assert tally.counts["records whose answer is none of the task's"] == 6 - len(kept)


def test_too_few_people_and_tasks_of_another_form_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 users with at least 3 usable records: too few for 1 of the test"):
        made(tmp_path, [*people(3), Timed("few", 1, "x", "y")])
    for name in ("citation", "tweet_paraphrase"):
        with pytest.raises(InputError, match=f"{name}: its items are more than a text and its answer"):
            convert(people(), TASKS[name], tmp_path, Sizes(), 0, Origin({}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lengths", "min_items", "k"),
    [([30] * 200, 11, 50), ([30] * 40, 11, 20), ([30] * 9, 11, 8), ([30] * 4, 11, 4), ([30] * 4 + [6] * 9, 6, 8),
     ([5] * 20, 5, 10), ([30, 30, 9, 4], 4, 4)],
)  # fmt: skip
def test_what_stage_2_is_asked_for_is_what_the_candidates_allow(lengths: list[int], min_items: int, k: int) -> None:
    histories = {f"u{i}": [Timed("", 0, "", "")] * n for i, n in enumerate(lengths)}
    assert sharing(list(histories), histories) == {"min_items": min_items, "k": k}
