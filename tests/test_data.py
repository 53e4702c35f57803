"""Loading: what is accepted, and that every problem of a file is told at once."""

from __future__ import annotations

import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime.errors import InputError
from prime.users.data import Query, User, load_labels, load_profiles, load_users, select, select_indices
from prime.users.tasks import TASKS

MOVIES = TASKS["movie_tagging"]
MARKED = "tags: [a, b] description: Two thieves."


def user(user_id: object = 17, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "user_id": user_id,
        "profile": [{"id": "1", "description": "A robot.", "tag": "sci-fi"}],
        "query": [{"id": "q1", "input": MARKED, "gold": "romance"}],
    }
    return row | changes


def problems(path, task=MOVIES, **options) -> list[str]:
    """The lines of the error, without the path each of them must begin with."""
    with pytest.raises(InputError) as caught:
        load_users(path, task, **options)
    lines = str(caught.value).splitlines()
    assert all(line.startswith((f"{path}: ", "... and ")) for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_loads_users(write) -> None:
    path = write("u.json", [user(), user("x", profile=[], query=[])])
    item = {"id": "1", "description": "A robot.", "tag": "sci-fi"}
    assert load_users(path, MOVIES, need_queries=True) == [
        User("17", (item,), (Query("q1", MARKED, "romance"),)),
        User("x", (), ()),
    ]


def test_values_become_text_and_other_fields_go(write) -> None:
    item = {"id": 5, "text": "", "score": 4.5, "asin": ["ignored"]}
    path = write("u.json", [user(profile=[item], query=[{"id": 7, "input": 8, "gold": 3}])])
    assert load_users(path, TASKS["product_rating"]) == [
        User("17", ({"id": "5", "text": "", "score": "4.5"},), (Query("7", "8", "3"),))
    ]


def test_odd_but_allowed(write) -> None:
    item = {"id": "1", "description": "", "tag": "a tag of my own"}
    (loaded,) = load_users(write("u.json", [{"user_id": 0, "profile": [item]}]), MOVIES)
    assert loaded == User("0", (item,), ())
    path = write("v.json", [user(query=[{"id": 1, "input": MARKED}])])
    assert load_users(path, MOVIES)[0].queries[0].gold is None


def test_all_problems_at_once(write) -> None:
    rows = [
        user(1, profile=[{"id": "1", "description": "x"}, {"id": None, "description": [], "tag": True}, 3]),
        user("1"),
        user(True),
        user(None),
        user(" "),
        user(1.5),
        {"profile": {}, "query": "no"},
        "user",
        user(2, query=[{"id": "a", "input": {}}, None, {"id": "b", "input": "x", "gold": None}]),
    ]
    assert problems(write("u.json", rows)) == [
        "user 1: item 0: field 'tag' is missing",
        "user 1: item 1: field 'id' is null, expected a text or a number",
        "user 1: item 1: field 'description' is a list, expected a text or a number",
        "user 1: item 1: field 'tag' is true or false, expected a text or a number",
        "user 1: item 2: expected an object, found a number",
        "user at position 1: user_id 1 is taken by the user at position 0",
        "user at position 2: field 'user_id' is true or false, expected an integer or a text",
        "user at position 3: field 'user_id' is null, expected an integer or a text",
        "user at position 4: field 'user_id' is empty, expected an integer or a text",
        "user at position 5: field 'user_id' is a decimal number, expected an integer or a text",
        "user at position 6: field 'user_id' is missing, expected an integer or a text",
        "user at position 6: field 'profile' is an object, expected a list",
        "user at position 6: field 'query' is a text, expected a list",
        "user at position 7: expected an object, found a text",
        "user 2: query 0: field 'input' is an object, expected a text or a number",
        "user 2: query 1: expected an object, found null",
        "user 2: query 2: field 'gold' is null, expected a text or a number",
    ]


def test_a_long_list_is_cut(write) -> None:
    path = write("u.json", [user(i, profile=[{}]) for i in range(10)])
    lines = problems(path)
    assert len(lines) == 21 and lines[-1] == "... and 10 more"
    assert lines[19] == "user 6: item 0: field 'description' is missing"


def test_queries_are_needed_only_where_asked_for(write) -> None:
    path = write("u.json", [{"user_id": 1, "profile": []}])
    assert load_users(path, MOVIES) == [User("1", (), ())]
    assert problems(path, need_queries=True) == ["user 1: field 'query' is missing"]


def test_repeated_query_id(write) -> None:
    path = write("u.json", [user(query=[{"id": i, "input": MARKED} for i in (1, "1", 2)]), user(18)])
    assert problems(path) == ["user 17: query id 1 is used more than once"]


def test_broken_surrogate(write) -> None:
    path = write("u.json", [user(profile=[{"id": 1, "description": "bad \ud800", "tag": "é 😀"}])])
    assert problems(path) == ["user 17: item 0: field 'description' is not valid Unicode (half of a surrogate pair)"]


def test_missing_marker_warns_once_per_file(write) -> None:
    queries = [{"id": i, "input": "no marker"} for i in range(7)] + [{"id": "fine", "input": MARKED}]
    path = write("u.json", [user(query=queries)])
    with pytest.warns(UserWarning) as caught:
        (loaded,) = load_users(path, MOVIES, need_queries=True)
    assert len(loaded.queries) == 8 and len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(f"{path}: 7 queries do not hold '] description:'")
    assert text.endswith("user 17 query 0, user 17 query 1, user 17 query 2, user 17 query 3, user 17 query 4, ...")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_users(path, MOVIES)


def test_citation_without_options_is_a_problem(write) -> None:
    item = {"id": 1, "title": "a", "abstract": "b", "citation": "c"}
    path = write("u.json", [user(profile=[item], query=[{"id": 1, "input": "which?"}])])
    assert problems(path, TASKS["citation"], need_queries=True) == [
        "user 17: query 0: field 'input' does not hold a title and the options [1] and [2]"
    ]
    assert load_users(path, TASKS["citation"])[0].queries[0].input == "which?"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[\n {"user_id": 1,,}]', "line 2, column 16: not JSON: "),
        ("", "line 1, column 1: not JSON: "),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "a number of 5,000 digits"),
        ('{"user_id": 1}', "expected a list of users, found an object"),
    ],
)
def test_not_a_file_of_users(write, text: str, told: str) -> None:
    (line,) = problems(write("u.json", text))
    assert line.startswith(told)


def test_unreadable_files(tmp_path) -> None:
    made = f"python prepare_data.py --task_name movie_tagging --lamp_dir DIR --output_dir {tmp_path}"
    for name in ("none.json", "test_100/none.json"):
        assert problems(tmp_path / name) == [f"no such file; from the official LaMP files this makes it: {made}"]
    with pytest.raises(InputError, match="labels.json: no such file; prepare_data.py makes it"):
        load_labels(tmp_path / "labels.json")
    assert problems(tmp_path) == ["not a regular file"]
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    assert problems(tmp_path / "latin.json") == ["not UTF-8 text (byte 2)"]


@pytest.mark.parametrize("name", ["user_base_LLM.json", "test_100/user_test_100.json"])
def test_the_folder_above_the_task_is_told(tmp_path, name: str) -> None:
    """--data_dir ./data, as reproduce.sh takes it, in place of ./data/movie_tagging."""
    path = tmp_path / "movie_tagging" / name
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    assert problems(tmp_path / name) == [
        f"no such file; give --data_dir {tmp_path / 'movie_tagging'}, where there is one"
    ]


def test_byte_order_mark(tmp_path) -> None:
    path = tmp_path / "bom.json"
    path.write_text(json.dumps([user()]), encoding="utf-8-sig")
    assert load_users(path, MOVIES)[0].user_id == "17"


def test_profiles(write) -> None:
    assert load_profiles(write("p.json", {"17": "likes love", "18": ""})) == {"17": "likes love", "18": ""}
    path = write("bad.json", {"17": None, "18": ["x"], "19": "ok"})
    with pytest.raises(InputError) as caught:
        load_profiles(path)
    assert str(caught.value).splitlines() == [
        f"{path}: user 17: the text is null, expected a text or a number",
        f"{path}: user 18: the text is a list, expected a text or a number",
    ]
    with pytest.raises(InputError, match="expected an object of user id to text, found a list"):
        load_profiles(write("list.json", []))


def test_labels(write) -> None:
    golds = [{"id": 1, "output": 4}, {"id": "b", "output": "x"}, {"id": "b", "output": "x"}]
    assert load_labels(write("l.json", {"task": "LaMP_3", "golds": golds})) == {"1": "4", "b": "x"}
    bad = [{"id": 1, "output": "a"}, {"id": "1", "output": "b"}, {"id": 2}, []]
    path = write("bad.json", {"golds": bad})
    with pytest.raises(InputError) as caught:
        load_labels(path)
    assert str(caught.value).splitlines() == [
        f"{path}: gold 1: id 1 was given before with another output",
        f"{path}: gold 2: field 'output' is missing",
        f"{path}: gold 3: expected an object, found a list",
    ]
    for value in ([], {"task": "LaMP_3"}, {"golds": {}}):
        with pytest.raises(InputError, match="a list under 'golds'"):
            load_labels(write("no.json", value))


@pytest.mark.parametrize(
    ("spec", "chosen"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("0-100", [0, 1, 2, 3, 4]),
        ("0-2", [0, 1]),
        ("3-5", [3, 4]),
        ("4", [4]),
        ("3, 0-2,1", [3, 0, 1]),
    ],
)
def test_select(spec: str | None, chosen: list[int]) -> None:
    users = [User(str(i), ()) for i in range(5)]
    assert select(users, spec) == [users[i] for i in chosen]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "'' is no index"),
        ("a", "'a' is no index"),
        ("1,,2", "'' is no index"),
        ("-1", "'-1' is no index"),
        ("1-", "'1-' is no index"),
        ("1-2-3", "'1-2-3' is no index"),
        ("1.5", "'1.5' is no index"),
        ("²", "'²' is no index"),
        ("9" * 5000, "is no index"),
        ("0,3-3", "the range '3-3' is empty"),
        ("4-2", "the range '4-2' is empty"),
        ("0,5", "'5' is out of range, the file holds 5 users"),
        ("5-9", "'5-9' is out of range, the file holds 5 users"),
    ],
)
def test_bad_select_names_option_and_part(spec: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        select_indices(spec, 5)
    assert str(caught.value).startswith(f"--user_idxs '{spec}': ") and told in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["user_id", "profile", "query", "id", "input", "tag"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_gives_users_or_an_input_error(tmp_path_factory, value) -> None:
    path = tmp_path_factory.mktemp("any") / "u.json"
    path.write_text(json.dumps(value))
    try:
        users = load_users(path, MOVIES)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(value, list) and len(users) == len(value)
        assert all(type(text) is str for one in users for item in one.profile for text in item.values())


def test_repeated_item_ids_are_told_and_all_used(write) -> None:
    item = {"id": 5, "description": "x", "tag": "y"}
    path = write("u.json", [user(profile=[item, dict(item, tag="z"), dict(item, id=6)])])
    with pytest.warns(UserWarning, match="1 item ids are used more than once in a history, .*: user 17 item id 5"):
        (loaded,) = load_users(path, MOVIES)
    assert [one["tag"] for one in loaded.profile] == ["y", "z", "y"]


def test_no_users_and_no_number(write) -> None:
    assert problems(write("u.json", [])) == ["holds no users"]
    path = write("v.json", '[{"user_id": 17, "profile": [{"id": 1e999, "description": "x", "tag": "y"}]}]')
    assert problems(path) == ["user 17: item 0: field 'id' is beyond the largest number"]
