"""A journal of calls: cut off anywhere, the same computation ends with the same answers and the same file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import world

from prime.runs.journal import Journal, users_of


def compute(journal: Journal, counted: list[int], calls: int = 5, shift: int = 0) -> list[list[float]]:
    """Each call asks about what the one before answered, as a search does."""
    found: list[list[float]] = [[0.1]]
    for number in range(calls):
        question = {"number": number, "about": found[-1], "shift": shift}

        def answer(question: dict = question) -> list[float]:
            counted.append(question["number"])
            return [value / 3 + question["number"] + question["shift"] for value in (*question["about"], 1e-17)]

        found.append(journal.call(question, answer))
    return found


def test_cut_off_at_any_byte_it_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    expected = compute(Journal(whole), [])
    content = whole.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for size in range(0, len(content) + 1, 23):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:size])
        counted: list[int] = []
        assert compute(Journal(path), counted) == expected  # exact floats
        assert counted == list(range(sum(end <= size for end in ends[1:]), 5))
        assert world.entries(path)[1:] == world.entries(whole)[1:]


def test_a_whole_journal_answers_everything_and_tells_the_seconds_it_spared(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    expected, counted = compute(Journal(path), []), []
    before, journal = path.read_bytes(), Journal(path)
    assert compute(journal, counted) == expected and counted == [] and path.read_bytes() == before
    assert journal.spared == pytest.approx(sum(json.loads(line)["seconds"] for line in before.splitlines()[1:]))


def test_other_questions_are_computed_and_replace_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    compute(Journal(path), [])
    counted: list[int] = []
    expected = compute(Journal(tmp_path / "other.jsonl"), [], shift=1)
    assert compute(Journal(path), counted, shift=1) == expected and counted == [0, 1, 2, 3, 4]
    assert world.entries(path)[1:] == world.entries(tmp_path / "other.jsonl")[1:]


@pytest.mark.parametrize("spoil", [lambda line: line[:-9] + b"\n", lambda line: b"[]\n", lambda line: b"\xff\xfe\n"])
def test_nothing_behind_a_spoilt_line_is_believed(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "j.jsonl"
    expected = compute(Journal(path), [])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], spoil(lines[3]), *lines[4:]]))
    counted: list[int] = []
    assert compute(Journal(path), counted) == expected and counted == [2, 3, 4]


def test_a_journal_names_its_users_and_answers_for_no_others(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    expected = compute(Journal(path, ["7", "\ud800"]), [])
    assert users_of(path) == ["7", "\ud800"]
    counted: list[int] = []
    assert compute(Journal(path, ["7"]), counted) == expected and counted == [0, 1, 2, 3, 4]
    assert users_of(path) == ["7"]


@pytest.mark.parametrize("head", [b"", b'{"users": ["7"', b"[]\n", b'{"users": [7]}\n', b"[" * 100_000])
def test_a_file_without_a_whole_first_line_names_nobody(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(head)
    assert users_of(path) == [] == users_of(tmp_path / "not there")
    compute(Journal(path, ["7"]), [])
    assert users_of(path) == ["7"]


def test_only_the_next_call_is_known_to_be_recorded(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = Journal(path)
    assert first.call("a", lambda: 1) == 1 and first.call("b", lambda: 2) == 2 and first.recorded("b") is None
    again = Journal(path)
    assert again.recorded("b") is None and again.recorded("a") == 1
    again.call("a", int)
    assert again.recorded("b") == 2 == again.call("b", int)


def test_a_dropped_journal_is_gone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "folder" / "j.jsonl")
    journal.drop()
    compute(journal, [])
    journal.drop()
    assert not (tmp_path / "folder" / "j.jsonl").exists()


@pytest.mark.parametrize("place", [0.2, 0.4, 0.6, 0.8, 0.99])
def test_a_damaged_line_is_not_believed_nor_what_comes_after_it(tmp_path: Path, place: float) -> None:
    """A digit that another one replaced: the line is JSON as before."""
    path = tmp_path / "j.jsonl"
    expected = compute(Journal(path), [])
    whole = path.read_bytes()
    spot = next(i for i in range(int(place * len(whole)), len(whole)) if whole[i : i + 1] in b"34567")
    path.write_bytes(whole[:spot] + b"2" + whole[spot + 1 :])
    damaged = whole[:spot].count(b"\n") - 1  # the first line names the users
    counted: list[int] = []
    assert compute(Journal(path), counted) == expected and counted == list(range(damaged, 5))


def test_a_line_nested_too_deeply_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    expected = compute(Journal(path), [], calls=1)
    path.write_bytes(path.read_bytes() + b"[" * 10**6 + b"\n")
    assert compute(Journal(path), [], calls=1) == expected
