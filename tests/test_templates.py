"""What a template file may hold, and that it replaces the wording."""

from __future__ import annotations

import pytest

from prime.errors import InputError
from prime.users.data import Query, User
from prime.users.prompts import Record, history_records, task_records
from prime.users.tasks import TASKS
from prime.users.templates import KEYS, load_templates


def templates(name: str = "movie_tagging", **changes: object) -> dict[str, object]:
    return {name: TASKS[name].templates | changes}


@pytest.mark.parametrize("name", list(TASKS))
def test_own_templates_pass_the_check(write, name: str) -> None:
    assert load_templates(write("t.json", templates(name)), TASKS[name]) == TASKS[name].templates


def test_file_replaces_the_wording(write) -> None:
    changed = templates(
        prompt="Q {{literal}} {} A:",
        full_prompt="Q {{literal}} {} A:{}",
        OPPU_input="{id}: {description}\n",
        OPPU_full="{id}: {description}\n{tag}!",
        extra="ignored",
    )
    loaded = load_templates(write("t.json", changed), TASKS["movie_tagging"])
    assert set(loaded) == set(KEYS)
    user = User("7", ({"id": "0", "description": "a film", "tag": "comedy"},))
    assert history_records(user, TASKS["movie_tagging"], loaded, None) == [Record("u7-0", "0: a film\n", "comedy!")]
    asked = User("7", (), (Query("q", "tags: [] description: alpha beta", "action"),))
    (record,) = task_records(asked, TASKS["movie_tagging"], loaded, "p")
    assert (record.input, record.target) == ("### User Profile:\np\n\nQ {literal} alpha beta A:", "action")


NAMED = "not allowed, only {id}, {description}, {tag}"
BAD: list[tuple[dict[str, object], str]] = [
    ({"OPPU_input": "{description.__class__}"}, f"key 'OPPU_input': field '{{description.__class__}}': {NAMED}"),
    ({"OPPU_input": "{description[0]}"}, f"key 'OPPU_input': field '{{description[0]}}': {NAMED}"),
    ({"OPPU_input": "{title}"}, f"key 'OPPU_input': field '{{title}}': {NAMED}"),
    ({"OPPU_input": "{}"}, f"key 'OPPU_input': field '{{}}': {NAMED}"),
    ({"OPPU_full": "{0}"}, f"key 'OPPU_full': field '{{0}}': {NAMED}"),
    ({"retrieval_query": "{}"}, f"key 'retrieval_query': field '{{}}': {NAMED}"),
    (
        {"retrieval_history": "{description!r}"},
        "key 'retrieval_history': field '{description}': conversions and formats are not allowed",
    ),
    (
        {"retrieval_history": "{description:{tag}}"},
        "key 'retrieval_history': field '{description}': conversions and formats are not allowed",
    ),
    ({"prompt": "{:>9999999999}"}, "key 'prompt': field '{}': conversions and formats are not allowed"),
    ({"prompt": "{0.__class__}"}, "key 'prompt': field '{0.__class__}': not allowed, only {}"),
    ({"prompt": "{article}"}, "key 'prompt': field '{article}': not allowed, only {}"),
    ({"prompt": "no article"}, "key 'prompt': field '{}': found 0 times, expected 1"),
    ({"full_prompt": "{}"}, "key 'full_prompt': field '{}': found 1 times, expected 2"),
    ({"retrieval_query_wokey": "{} {}"}, "key 'retrieval_query_wokey': field '{}': found 2 times, expected 1"),
    ({"full_prompt": "other {} {}"}, "key 'full_prompt': must begin with 'prompt' and add the answer"),
    ({"OPPU_full": "other {tag}"}, "key 'OPPU_full': must begin with 'OPPU_input' and add the answer"),
    (
        {"OPPU_full": TASKS["movie_tagging"].templates["OPPU_input"]},
        "key 'OPPU_full': must begin with 'OPPU_input' and add the answer",
    ),
    ({"prompt": None}, "key 'prompt': not a text"),
    (
        {"prompt": "a } b"},
        "key 'prompt': Single '}' encountered in format string (a literal brace is written {{ or }})",
    ),
]


@pytest.mark.parametrize(("changes", "told"), BAD)
def test_bad_template(write, changes: dict[str, object], told: str) -> None:
    path = write("t.json", templates(**changes))
    with pytest.raises(InputError) as caught:
        load_templates(path, TASKS["movie_tagging"])
    assert str(caught.value) == f"{path}: task 'movie_tagging': {told}"


def test_all_problems_of_a_template_file(write) -> None:
    rows = templates(prompt="{x} {y}", OPPU_full="{z}")
    del rows["movie_tagging"]["retrieval_query"]  # type: ignore[attr-defined]
    with pytest.raises(InputError) as caught:
        load_templates(write("t.json", rows), TASKS["movie_tagging"])
    assert [line.split("movie_tagging': ")[1] for line in str(caught.value).splitlines()] == [
        "key 'prompt': field '{x}': not allowed, only {}",
        "key 'prompt': field '{y}': not allowed, only {}",
        "key 'retrieval_query': missing",
        f"key 'OPPU_full': field '{{z}}': {NAMED}",
    ]


@pytest.mark.parametrize("value", [{}, [], {"movie_tagging": []}, templates("citation")])
def test_file_without_the_task(write, value: object) -> None:
    path = write("t.json", value)
    with pytest.raises(InputError) as caught:
        load_templates(path, TASKS["movie_tagging"])
    assert str(caught.value) == f"{path}: no templates for task 'movie_tagging'"


def test_citation_template_counts(write) -> None:
    path = write("t.json", templates("citation", prompt="{}", full_prompt="{} {}"))
    with pytest.raises(InputError) as caught:
        load_templates(path, TASKS["citation"])
    assert "key 'prompt': field '{}': found 1 times, expected 3" in str(caught.value)
    assert "key 'full_prompt': field '{}': found 2 times, expected 4" in str(caught.value)
