"""What a stage tells while it works, and what a finished search tells."""

import io
import json
import sys

import pytest
from tqdm import tqdm

from prime.report.found import found_table, weights_text
from prime.runs import progress
from prime.runs.run import Run
from prime.settings import FitnessSettings
from prime.users.tasks import TASKS


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """No terminal, one process, and nothing told so far."""
    clock = Clock()
    monkeypatch.setattr(progress.time, "time", clock.time)
    monkeypatch.setattr(progress.time, "localtime", progress.time.gmtime)
    monkeypatch.setattr(progress, "EVERY", 60)
    monkeypatch.setattr(progress.Lines, "told", None)
    monkeypatch.setattr(progress.Lines, "open", [])
    monkeypatch.delenv("RANK", raising=False)
    return clock


def test_without_a_terminal_there_is_a_line_a_minute_with_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 users of 50 seconds and 10 answers each: a line where a minute is over, and one of the end."""

    def work(index: int, user: str, told) -> None:
        for _ in range(10):
            clock.now += 5
            told(1)

    progress.for_each(((index, str(index)) for index in range(24)), 24, work)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[0] == "test users: 1 of 24 (12 answers), 60 s; about 23 min to go, until 14:10"
    assert lines[-1] == "test users: 24 of 24 (240 answers), 20 min"


def test_the_minute_runs_on_from_one_bar_to_the_next(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(4):
        with progress.bar(2, "records") as bar:
            for _ in range(2):
                clock.now += 10
                bar.update(1)
    assert capsys.readouterr().err.splitlines() == ["records: 2 of 2, 20 s"]


def test_a_group_of_many_short_passes_tells_of_both(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Three groups of two, each of 90 records, a second a record."""
    for _ in progress.counted([["a", "b"]] * 3, 6, "adapters attacked"):
        with progress.bar(90, "records") as bar:
            for _ in range(90):
                clock.now += 1
                bar.update(1)
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["records: 60 of 90, 60 s; about 30 s to go, until 13:48", "records: 90 of 90, 2 min"]
    assert told[2:4] == ["adapters attacked: 2 of 6, 2 min; about 5 min to go, until 13:54", "records: 60 of 90, 60 s;"
                         " about 30 s to go, until 13:49"]  # fmt: skip
    assert told[-1] == "adapters attacked: 6 of 6, 4 min"


def test_a_day_is_told_where_the_end_is_far_and_bytes_as_a_share(clock: Clock) -> None:
    lines = progress.Lines(100, "users", "user")
    lines.done = 1
    assert lines.line(clock.now + 1800) == "users: 1 of 100, 30 min; about 49 h 30 min to go, until Wed 14 Jan 15:46"
    reading = progress.Lines(3_000_000_000, "reading", "B")
    reading.done = 750_000_000
    assert reading.line(clock.now + 90) == "reading: 25%, 2 min; about 4 min to go, until 13:52"
    assert progress.Lines(0, "answers", "row").line(clock.now + 5) == "answers: 0, 5 s"


def test_others_than_the_first_process_are_silent_and_each_counts_its_share(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        clock.now += 61
        progress.for_each([(0, "a")], 10, lambda *_: setattr(clock, "now", clock.now + 61))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("test users by the first of 4 processes: 1 of 3, 61 s; about 2 min to go")


def test_a_terminal_shows_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.bar(3, "users") as bar:
        assert isinstance(bar, tqdm) and not bar.disable


def test_a_finished_search_tells_its_result_by_user(tmp_path) -> None:
    run = Run(tmp_path / "evo", "lora_composition_evo", "prime", {"task_name": "product_rating"})
    found = {"1": ("merge", [0.75, -0.25], 0.5), "B/2": ("base", [0.0, 0.0], 2.0), "3": ("merge", [[1.0, 0.5]], 1.0)}
    for index, (user, (deployed, weights, utility)) in enumerate(found.items()):
        folder = run.user_dir(user)
        folder.mkdir(parents=True)
        lines = [{"utility": 2.0, "origin": "base"}, {"utility": utility, "origin": "search"}]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if deployed == "merge":
            (folder / "adapter").mkdir()
            (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
        sharers = ["s1", "s2"][: len(weights)]
        result = {"deployed": deployed, "sharers": sharers, "weights": weights, "utility": utility}
        run.finish(user, {"user_id": user, "index": index, **result})
    title, header, _, first, second = found_table(
        run.root, {"1", "B/2"}, TASKS["product_rating"], FitnessSettings()
    ).splitlines()
    assert title == f"{run.root}: sum of MAE and RMSE on the user's history (lower is better)"
    assert header.split() == ["user", "base", "found", "deployed", "sharers", "and", "weights", "adapter"]
    assert first.split() == ["1", "2.000", "0.500", "merge", "s1:", "+0.75,", "s2:", "-0.25", "users/user_1/adapter"]
    assert second.split() == ["B/2", "2.000", "2.000", "base", "s1:", "+0.00,", "s2:", "+0.00", "-"]
    assert weights_text({"sharers": ["a"], "weights": [[1.0, 0.5]]}) == "a: +0.75"
    nll = found_table(run.root, (), TASKS["product_rating"], FitnessSettings(objective="nll"))
    assert "log-likelihood" in nll
