"""A table of one's own: what newcomers have becomes the data files, and their likely mistakes are a line each."""

import csv
import json
import random
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import pandas
import pytest
import world

import prepare_data
from prime.errors import InputError
from prime.sources.placing import FILES, REPORT, Tally
from prime.sources.rows import read_rows
from prime.sources.table import answers_of, doubtful_labels, field_name, time_of
from prime.users.data import LABEL_FILE, load_labels, load_users
from prime.users.tasks import TASKS, get_task

WORDS = "--user person --input text --target stars --time date"


def reviews(users: int = 40, rows: int = 14) -> list[dict[str, str]]:
    """In no order."""
    dice = random.Random(0)
    made = []
    for user in range(users):
        for row in range(rows + user % 5):
            good = dice.random() < 0.5
            stars = min(10, max(0, (9 if good else 2) + user % 3 - 1))
            text = f"{'superb' if good else 'awful'} lamp, \"number {dice.randrange(99)}\""
            date = f"2024-{1 + row // 28:02}-{1 + row % 28:02}"
            made.append({"person": f"p{user}", "date": date, "text": text, "stars": str(stars)})
    dice.shuffle(made)
    return made


def write_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def prepare(path: Path, words: str = WORDS, folder: str = "out") -> Path:
    target = path.parent / folder
    prepare_data.main(["--table", str(path), "--output_dir", str(target), *shlex.split(words)])
    return target


def test_a_csv_of_reviews_is_a_task_and_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against pandas, which reads, sorts and groups the same file."""
    path = write_csv(tmp_path / "Reviews of lamps.csv", reviews())
    target = prepare(path)
    task = get_task(str(target / "task.json"))
    assert (task.name, task.source, task.target) == ("reviews_of_lamps", "text", "stars")
    assert task.scale == (1, 10) and task.metrics == ("MAE", "RMSE")
    frame = pandas.read_csv(path, dtype=str).sort_values("date", kind="stable")
    expected = {user: list(zip(own.text, own.stars, strict=True)) for user, own in frame.groupby("person")}
    found, golds = {}, {}
    for kind in ("base", "candidates", "test"):
        for user in load_users(target / FILES[kind], task, need_queries=True, need_golds=True):
            asked = [(query.input, query.gold) for query in user.queries]
            found[user.user_id] = [(item["text"], item["stars"]) for item in user.profile] + asked
            golds |= {query.id: query.gold for query in user.queries if kind == "test"}
    assert found == expected and load_labels(target / LABEL_FILE) == golds
    told = capsys.readouterr().out
    assert "answers: numbers from 1 to 10, steps of 1" in told and "40 people" in told
    words = shlex.split(told.splitlines()[-1])
    assert words[:2] == ["bash", "reproduce.sh"] and words[-2:] == ["--k", str(world.read(target / REPORT)["k"])]
    assert words[2:6] == ["--task_file", str(target / "task.json"), "--data_dir", str(target)]
    before = {file: file.read_bytes() for file in target.rglob("*.json")}
    prepare(path)
    assert {file: file.read_bytes() for file in target.rglob("*.json")} == before


FORMS = ["semicolons", "tabs", "byte order mark", "blank lines first", "json lines", "json list", "parquet"]


@pytest.mark.parametrize("kind", FORMS)
def test_the_same_rows_in_another_form_are_the_same_data(kind: str, tmp_path: Path) -> None:
    rows = reviews(12)
    plain = prepare(write_csv(tmp_path / "reviews.csv", rows), folder="plain")
    path = tmp_path / "other" / "reviews.jsonl"
    path.parent.mkdir()
    if kind in ("semicolons", "tabs"):
        path = write_csv(path.with_suffix(".csv"), rows, ";" if kind == "semicolons" else "\t")
    elif kind == "byte order mark":
        path = write_csv(path.with_suffix(".csv"), rows, encoding="utf-8-sig")
    elif kind == "blank lines first":
        path = path.with_suffix(".csv")
        path.write_text("\n\n" + (tmp_path / "reviews.csv").read_text())
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        path = path.with_suffix(".parquet")
        pandas.DataFrame(rows).to_parquet(path)
    else:
        typed = [row | {"stars": int(row["stars"])} for row in rows]
        whole = "\n".join(map(json.dumps, typed)) if kind == "json lines" else json.dumps(typed)
        path.write_text(whole, encoding="utf-8")
    other = prepare(path)
    for name in ("base", "candidates", "test"):
        one, two = (world.read(folder / FILES[name]) for folder in (plain, other))
        assert without_ids(one) == without_ids(two)
    assert (plain / "task.json").read_bytes() == (other / "task.json").read_bytes()


def without_ids(users: list[dict]) -> list[dict]:
    for user in users:
        for item in user["profile"] + user["query"]:
            del item["id"]
    return users


def test_multi_line_texts_stay_as_they_are(tmp_path: Path) -> None:
    rows = []
    for user in range(8):
        for row in range(12):
            code = f"def f{row}():\n    return \"{user}\u2028\"\n"
            reply = f"Please:\n\n- rename `f{row}`\n"
            rows.append({"who": f"p{user}", "at": 1.7e9 + 60 * row, "diff": code, "reply": reply})
    path = tmp_path / "replies.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    from_json = prepare(path, "--user who --input diff --target reply --time at", "a")
    table = write_csv(tmp_path / "replies.csv", rows)
    from_csv = prepare(table, "--user who --input diff --target reply --time at", "b")
    task = get_task(str(from_json / "task.json"))
    assert task.labels is None and task.metrics == ("rouge-1", "rouge-L")
    (first, *_) = load_users(from_json / FILES["candidates"], task)
    assert first.profile[3]["reply"] == "Please:\n\n- rename `f3`\n" and "\u2028" in first.profile[3]["diff"]
    (other, *_) = load_users(from_csv / FILES["candidates"], task)
    assert [dict(item, id="") for item in other.profile] == [dict(item, id="") for item in first.profile]


# -- what answers are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["0", "10", "7"], {"scale": [0, 10]}),
        (["1", "2.5", "5"], {"scale": [1, 5, 0.5]}),
        (["-1.25", "1"], {"scale": [-1.25, 1, 0.05]}),
        (["rock", "folk"] * 10, {"labels": ["folk", "rock"]}),
        (["Rock", "rock", "folk"] * 10 + ["rock"], {"labels": ["rock", "folk"], "ignore_case": True}),
        (["rock", "folk"] * 9, {}),
        ([f"a long answer {i}" for i in range(99)], {}),
        (["3"] * 30, {}),
    ],
)
def test_answers_are_numbers_labels_or_texts(targets: list[str], found: dict) -> None:
    assert answers_of("auto", targets) == found


def test_labels_that_look_misspelt_are_told() -> None:
    targets = ["Rock"] * 40 + ["folk"] * 40 + ["rokc", "jazz"]
    assert doubtful_labels(["Rock", "folk", "rokc", "jazz"], targets) == ["rokc (1 times) like rock (40)"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2024-01-05", 1704412800), ("2024/1/5", 1704412800), ("20240105", 1704412800), ("2024", 1704067200),
        ("2024-01-05T01:00:00+01:00", 1704412800), ("2024-01-05 01:00:00 +0100", 1704412800), (2024, 1704067200),
        ("2024-01-05 00:00:00 UTC", 1704412800), ("Fri, 05 Jan 2024 00:00:00 +0000", 1704412800), ("7", 7),
        (1704412800, 1704412800), (1704412800000, 1704412800), ("05.01.2024", None), ("1/5/24", None), ("", None),
        (None, None), ("soon", None), ("2024-13-05", None), (True, None),
    ],
)  # fmt: skip
def test_times(value: object, seconds: float | None) -> None:
    assert time_of(value) == seconds


def test_names_of_columns_become_names_of_fields() -> None:
    names = ["Review Text", "id", "9 lives", "текст", "a.b{c}"]
    assert [field_name(name, "text") for name in names] == ["review_text", "text_id", "text_9_lives", "text", "a_b_c"]


# -- likely mistakes ------------------------------------------------------------------------------------------------


def change(rows: list[dict[str, str]], **changes: str) -> list[dict[str, str]]:
    return [row | changes for row in rows]


MISTAKES: dict[str, tuple[object, str, str]] = {  # what is in the file, the options, the line
    "no such file": (None, WORDS, "reviews.csv: No such file or directory"),
    "empty": ("", WORDS, "reviews.csv: empty; a header with the names of the columns and rows"),
    "a header alone": ("person,date,text,stars\n", WORDS, "0 users with at least 3 usable records"),
    "a column misspelt": (reviews(8), WORDS.replace("text", "txt"), "no column 'txt' (is it 'text'?); columns are: "),
    "columns not named": (reviews(8), "--user person", "--table needs --user, --input and --target; "),
    "another encoding": (b"person,date,text,stars\na,b,caf\xe9,1", WORDS, "not UTF-8 text (byte 30); save it"),
    "UTF-16": ("person,date".encode("utf-16"), WORDS, "not UTF-8 text (byte 0); save it as UTF-8, e.g. iconv"),
    "a quotation mark that is not closed": ('person,date,text,stars\na,1,"b,2\n', WORDS, "quotation mark not closed"),
    "a column twice": ("person,text,text,date,stars\n", WORDS, "2 columns are called 'text'; rename one"),
    "one user": (reviews(1, 99), WORDS, "1 users with at least 3 usable records: too few for"),
    "too few rows each": (reviews(40, 1)[:10], WORDS, "or less --min_items"),
    "too many test users": (reviews(8), f"{WORDS} --test_users 7", "less --min_items, --test_users or --base_share"),
    "dates as people write them": (change(reviews(8), date="31/12/2024"), WORDS, "give --time_format, e.g. %d/%m/%Y"),
    "no dates": (change(reviews(8), date=""), WORDS, "times cannot be read, 'nothing' in line 2 for one"),
    "empty answers": (change(reviews(8), stars=""), WORDS, "records without target: "),
    "words among numbers": ([*reviews(8), change(reviews(1), stars="good")[0]], f"{WORDS} --answers numbers",
                            "--answers numbers: found 'good'; give --scale"),
    "a scale that is none": (reviews(8), f"{WORDS} --scale ten", "--scale ten: expected LOWEST,HIGHEST such"),
    "a scale the wrong way": (reviews(8), f"{WORDS} --scale 10,0", "key 'scale': expected [lowest, highest], or"),
    "labels that no row has": (reviews(8), f"{WORDS} --labels good,bad", "records whose answer is none of the"),
    "labels and a scale": (reviews(8), f"{WORDS} --labels 1,2 --scale 1,2", "answers are one or"),
    "a name that is none": (reviews(8), f"{WORDS} --name ../x", "the task made for it: key 'name': '../x' is no name"),
    "a task of another form": (reviews(8), f"{WORDS} --task_name citation", "citation: its items are more than a"),
    "two sources": (reviews(8), f"{WORDS} --lamp_dir x", "give one of --lamp_dir"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_likely_mistake_is_one_line_that_says_what_to_do(name: str, tmp_path: Path) -> None:
    content, words, told = MISTAKES[name]
    path = tmp_path / "reviews.csv"
    if isinstance(content, list):
        write_csv(path, content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(InputError) as caught:
        prepare(path, words)
    (line,) = str(caught.value).splitlines()
    assert told in line and not (tmp_path / "out").exists()


def test_odd_rows_are_dropped_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = reviews(12)
    path = write_csv(tmp_path / "reviews.csv", rows)
    day = "p1,2024-05-01"
    odd = [f"{day},a text, with a comma,3", f"{day},,3", "p1,soon,x,3", f"{day},x,bad", day, ""]
    path.write_text(path.read_text() + "\n".join(odd) + "\n\n")
    prepare(path, f"{WORDS} --scale 0,10")
    told, first = capsys.readouterr().out, len(rows) + 2
    for line in (
        f"rows with more cells than the header (is a text with the delimiter unquoted?): 1 (line {first})",
        f"records without input: 2 (line{first + 1}, line{first + 4})",
        f"rows whose time cannot be read: 1 ('soon' in line {first + 2})",
        "records whose answer is none of the task's: 1 ('bad')",
    ):  # fmt: skip
        assert line in told


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '{"person": 1}\n{"person": ', "line 2: not JSON: "),
        ("a.jsonl", "[1]", "row 0: not an object; one object a line is expected"),
        ("a.jsonl", '"x"', "line 1: not an object"),
        ("a.jsonl", '{"persn": 1}', "no column 'person' (is it 'persn'?); columns are: persn"),
        ("a.xlsx", "x", "a spreadsheet; save it as CSV in UTF-8, and give that to --table"),
    ],
)
def test_a_file_of_another_kind_is_one_line(name: str, content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        list(read_rows(path, ["person"], Tally()))
    assert told in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.touch()
    missing = patch.dict(sys.modules, {"pyarrow": None})
    with missing, pytest.raises(InputError, match="Parquet needs pyarrow: .*pip install"):
        list(read_rows(path, ["person"], Tally()))


def test_a_built_in_task_takes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "reviews.csv", reviews(12))
    target = prepare(path, f"{WORDS} --task_name product_rating", "product_rating")
    task = TASKS["product_rating"]
    users = load_users(target / FILES["test"], task, need_queries=True)
    assert all(query.input.startswith(task.marker) for user in users for query in user.queries)
    assert all(item["score"] in "12345" for user in users for item in user.profile)
    told = capsys.readouterr().out
    assert "none of the task's" in told and f"--tasks product_rating --data_dir {tmp_path}" in told
    assert not (target / "task.json").exists()
