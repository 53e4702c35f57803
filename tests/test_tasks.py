"""The built-in tasks, tasks of files, and how the text of a query is found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import world
from hypothesis import given
from hypothesis import strategies as st

from prime import cli
from prime.errors import InputError
from prime.runs.inputs import Inputs
from prime.users.data import Query, User
from prime.users.profiles import rule_profile
from prime.users.prompts import history_records, test_prompts
from prime.users.tasks import TASK_KEYS, TASKS, extract, get_task, read_task

INPUTS = {
    "movie_tagging": (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
        "further explanation. tags: [sci-fi, based on a book] description: A robot ] description: paints."
    ),
    "news_categorize": "Which category? categories: [sports, crime] article: The cup goes north.",
    "product_rating": (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
        "without further explanation. review: Broke in a week."
    ),
    "news_headline": "Generate a headline for the following article: The cup goes north.",
    "scholarly_title": "Generate a title for the following abstract of a paper: We study {nets}.",
    "tweet_paraphrase": ("Paraphrase the following tweet without any explanation before or after it: rain again"),
}
ARTICLES = {
    "movie_tagging": "A robot ] description: paints.",
    "news_categorize": "The cup goes north.",
    "product_rating": "Broke in a week.",
    "news_headline": "The cup goes north.",
    "scholarly_title": "We study {nets}.",
    "tweet_paraphrase": "rain again",
}


def citation(title: str, one: str, two: str) -> str:
    return (
        f'For an author who has written the paper with the title "{title}", which reference is related? '
        f'Just answer with [1] or [2] without explanation. [1]: "{one}" [2]: "{two}"'
    )


def test_table() -> None:
    assert [(task.name, task.lamp, task.target, task.paired) for task in TASKS.values()] == [
        ("citation", "LaMP_1", "citation", False),
        ("movie_tagging", "LaMP_2M", "tag", True),
        ("news_categorize", "LaMP_2N", "category", False),
        ("product_rating", "LaMP_3", "score", True),
        ("news_headline", "LaMP_4", "title", True),
        ("scholarly_title", "LaMP_5", "title", True),
        ("tweet_paraphrase", "LaMP_7", "text", False),
    ]


def test_metrics_and_labels() -> None:
    found = {n: (t.metrics, t.history_metrics, t.labels, t.history_labels) for n, t in TASKS.items()}
    text = ("rouge-1", "rouge-L")
    assert found["citation"] == (("accuracy", "f1"), text, ("[1]", "[2]"), None)
    assert found["product_rating"] == (("MAE", "RMSE"),) * 2 + (("1", "2", "3", "4", "5"),) * 2
    for name in ("news_headline", "scholarly_title", "tweet_paraphrase"):
        assert found[name] == (text, text, None, None)
    for name in ("movie_tagging", "news_categorize"):
        assert found[name][:2] == (("accuracy", "f1"),) * 2
        assert found[name][2] == found[name][3] and len(set(found[name][2] or ())) == 15


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_row_is_consistent(task) -> None:
    assert task.fields[0] == "id" and task.target in task.fields[1:]


def test_get_task() -> None:
    assert get_task("movie_tagging") is TASKS["movie_tagging"]
    with pytest.raises(InputError, match="'movies'.*citation, movie_tagging"):
        get_task("movies")


@pytest.mark.parametrize("name", INPUTS)
def test_article_begins_at_the_first_marker(name: str) -> None:
    assert extract(TASKS[name], INPUTS[name]) == (ARTICLES[name],)
    assert extract(TASKS[name], "no words of this kind") is None


def test_empty_article_is_found() -> None:
    assert extract(TASKS["news_headline"], "Generate a headline for the following article: ") == ("",)


def test_citation_parts() -> None:
    task = TASKS["citation"]
    assert extract(task, citation("Deep nets", "A b", "C d")) == ("Deep nets", "A b", "C d")
    assert extract(task, citation('On "deep" nets', 'The "A"', 'C: "d"')) == ('On "deep" nets', 'The "A"', 'C: "d"')
    assert extract(task, 'written the paper with the title "T" hm [1]: "x" [2]: "y"') == ("T", "x", "y")


@pytest.mark.parametrize(
    "text", ["", 'the title "T" [1]: "x" [2]: "y"', 'written the paper with the title "T", which reference [1]: "x"']
)
def test_citation_without_its_parts(text: str) -> None:
    assert extract(TASKS["citation"], text) is None


# -- tasks of files -------------------------------------------------------------------------------------------------

SONGS = {"name": "song_genre", "input": "lyrics", "target": "genre", "labels": ["rock", "folk"]}
WORDING = {  # of the built-in tasks, as it was when they were rows of a table: SHA-256 of templates and profiles
    "citation": "9e2292cee5933620",
    "movie_tagging": "e4f75032a96eb7a8",
    "news_categorize": "5c658f437c5e0bc9",
    "product_rating": "8d437ba2fdf0699d",
    "news_headline": "cf70a0776136d867",
    "scholarly_title": "f82ec4f300d5e92e",
    "tweet_paraphrase": "2afe5cea4a917c61",
}


def song(write, **changes: object):
    return read_task(write("songs.json", {k: v for k, v in (SONGS | changes).items() if v is not None}))


@pytest.mark.parametrize("name", WORDING)
def test_the_wording_of_built_in_tasks_is_what_runs_were_made_with(name: str) -> None:
    task = TASKS[name]
    texts = json.dumps([task.templates, task.profile_prompt, task.habit], sort_keys=True)
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == WORDING[name]


def test_four_keys_are_a_task(write) -> None:
    task = song(write)
    assert (task.fields, task.source, task.lamp) == (("id", "lyrics", "genre"), "lyrics", "song_genre")
    assert task.metrics == task.history_metrics == ("accuracy", "f1") and task.history_labels == ("rock", "folk")
    assert task.paired and not task.ignore_case and task.marker == ""
    items = [{"id": str(i), "lyrics": f"la {i}", "genre": "folk"} for i in range(2)]
    user = User("u", tuple(items), (Query("q", "ho {x}", None),))
    (prompt,) = test_prompts(user, task, task.templates, 1, None)
    asked = "Choose the genre of the lyrics: rock, folk.\nLyrics: "
    assert prompt.text == f"### User History:\nLyrics: la 1 Genre: folk\n\n\n{asked}ho {{x}} Genre:"
    first, _, second = history_records(user, task, task.templates, None)
    assert (first.input, first.target) == (f"{asked}la 0 Genre:", " folk") and second.id == "uu-1-k1-p"


def test_scales_texts_and_what_else_a_file_says(write) -> None:
    asked = {"instruction": "{{Stars}}, {low} to {high}:", "input_name": "Song {x}"}
    stars = song(write, labels=None, scale=[0, 10, 0.5], **asked)
    assert stars.scale == (0, 10) and stars.labels and stars.labels[:3] == ("0", "0.5", "1") and len(stars.labels) == 21
    assert stars.metrics == ("MAE", "RMSE")
    assert stars.templates["prompt"].format("la") == "{Stars}, 0 to 10:\nSong {x}: la Genre:"
    fields = ["year", "lyrics", "genre"]
    text = song(write, labels=None, paired=False, fields=fields, retrieve_by="year", marker="song: ")
    assert text.metrics == ("rouge-1", "rouge-L") and not text.paired and text.fields[1:] == ("year", "lyrics", "genre")
    assert text.templates["retrieval_query"] == "{year}" and extract(text, "My song: la") == ("la",)
    own = song(write, templates={"retrieval_history": "{genre}!"}, profile={"habit": "Likes {}.", "items": "{songs}"})
    assert own.templates["retrieval_history"] == "{genre}!" and own.habit == "Likes {}."
    assert "{songs}, oldest first.\n\nla\n" in own.profile_prompt.format("la")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lables": ["a"]}, "key 'lables': unknown, is it 'labels'?; keys are name, "),
        ({"name": None}, "key 'name': is missing"),
        ({"name": "../x"}, "key 'name': '../x' is no name of letters, digits and _"),
        ({"name": "demo"}, "key 'name': 'demo' is a folder of data/ already"),
        ({"target": 3}, "key 'target': is a number, expected a text"),
        ({"target": "gen re"}, "key 'target': 'gen re' is no name"),
        ({"fields": ["lyrics"]}, "key 'target': 'genre' is none of the fields, lyrics"),
        ({"fields": ["lyrics", "genre", "id"]}, "key 'fields': 'id': a name has letters"),
        ({"fields": "lyrics"}, "key 'fields': is a text, expected a list of 1 to 10,000 texts"),
        ({"labels": []}, "key 'labels': is a list, expected a list of 1 to"),
        ({"labels": ["a", " a"]}, "key 'labels': holds an empty text, or one text twice"),
        ({"labels": ["a", None]}, "key 'labels': holds something that is neither a text nor a number"),
        ({"labels": ["a", "A"], "ignore_case": True}, "key 'labels': two of them differ in case only"),
        ({"labels": None, "ignore_case": True}, "key 'ignore_case': there are no 'labels'"),
        ({"ignore_case": "yes"}, "key 'ignore_case': is a text, expected true or false"),
        ({"scale": [0, 10]}, "key 'scale': there are 'labels' too"),
        ({"labels": None, "scale": [10, 0]}, "key 'scale': expected [lowest, highest], or a step as third"),
        ({"labels": None, "scale": [0, 1, 1e-9]}, "key 'scale': expected"),
        ({"labels": None, "scale": ["0", "10"]}, "key 'scale': expected"),
        ({"labels": None, "scale": 10}, "key 'scale': expected"),
        ({"metrics": ["acuracy"]}, "key 'metrics': 'acuracy' is none of accuracy, f1, MAE"),
        ({"metrics": ["MAE"]}, "key 'metrics': MAE needs 'scale'"),
        ({"labels": None, "metrics": ["f1"]}, "key 'metrics': f1 needs 'labels'"),
        ({"labels": None, "scale": [1, 5], "metrics": ["accuracy", "MAE"]}, "of some higher is better"),
        ({"two_options": True, "labels": ["a", "b", "c"]}, "key 'two_options': needs 'input' and two 'labels'"),
        ({"input": None}, "key 'input': is missing; a task whose items hold nothing but answers"),
        ({"instruction": "Choose {genre}"}, "key 'instruction': '{genre}' is not allowed, only {labels}, {low} and"),
        ({"instruction": "Choose {labels.x}"}, "key 'instruction': '{labels.x}' is not allowed"),
        ({"instruction": "Choose {"}, "key 'instruction': "),
        ({"templates": {"promt": "{}"}}, "key 'templates': unknown key 'promt', expected prompt, "),
        ({"templates": {"prompt": 1}}, "key 'templates': key 'prompt' is a number, expected a text"),
        ({"templates": {"prompt": "{} {}"}}, "key 'templates': key 'prompt': field '{}'"),
        ({"templates": {"OPPU_input": "{lyrics.real}"}}, "key 'templates': key 'OPPU_input': field '{lyrics.real}'"),
        ({"retrieve_by": "year"}, "key 'templates': key 'retrieval_query': field '{year}': not allowed"),
        ({"profile": {"habit": "{} {}"}}, "key 'profile': habit: field '{}': found 2 times, expected 1"),
        ({"profile": ["x"]}, "key 'profile': is a list, expected an object of texts"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_key(write, changes: dict, told: str) -> None:
    with pytest.raises(InputError) as caught:
        song(write, **changes)
    (line,) = str(caught.value).splitlines()
    assert "songs.json: key '" in line and told in line


@given(st.dictionaries(st.sampled_from(TASK_KEYS), st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(), st.lists, max_leaves=4
)))  # fmt: skip
def test_no_content_is_anything_but_a_task_or_a_message(tmp_path_factory, changes: dict) -> None:
    path = tmp_path_factory.mktemp("any") / "task.json"
    path.write_text(json.dumps(SONGS | changes), encoding="utf-8")
    try:
        task = read_task(path)
    except InputError as error:
        assert str(error).startswith(str(path))
    else:
        assert task.target in task.fields and task.metrics


def test_a_file_is_a_task_for_every_stage_and_is_named_by_itself(write, capsys) -> None:
    path = str(write("songs.json", SONGS))
    for name in ("task_lora.py", "mia.py", "postprocess.py", "gen_profile.py", "withdraw.py"):
        needed = {"task_lora.py": ["--llama_model_path", "m"], "withdraw.py": ["--user", "u"],
                  "mia.py": ["--llama_model_path", "m", "--lora_ckpt", "l", "--exp_dir", "e", "--anchor_dir", "a"],
                  "postprocess.py": ["--output_dir", "o"]}.get(name, [])  # fmt: skip
        data = world.settings([name, "--task_file", path, *needed]).data
        assert (data.task_name, str(data.folder), data.task) == ("song_genre", "data/song_genre", path)
        both = ["--task_name", "citation", "--task_file", path]
        for words in ([], both):
            with pytest.raises(SystemExit):
                world.settings([name, *words, *needed])
            assert "one of --task_name (a built-in task) and --task_file (your own)" in capsys.readouterr().err


def test_profiles_in_words_go_by_what_answers_are(write) -> None:
    items = [{"id": "0", "lyrics": "la", "genre": genre} for genre in ("7", "7", "3")]
    labels, text = song(write, labels=["7", "3"]), song(write, labels=None)
    scale = song(write, labels=None, scale=[0, 10])
    assert rule_profile(labels, items) == "The most frequent genre is 7. Given in 3 items: 7 (2), 3 (1)."
    mean = "The mean score is 5.7 over 3 items, from 3 to 7."
    assert rule_profile(scale, items) == f"The most frequent genre is 7. {mean}"
    assert rule_profile(text, items).startswith("The genre mostly begins with 7. The usual length is 1 words")


def test_a_changed_task_is_noticed_and_its_wording_or_place_is_no_change(write, tmp_path: Path) -> None:
    def opened(path: Path, refresh: tuple[str, ...] = ()):
        words = ["task_lora.py", "--task_file", str(path), "--llama_model_path", "m", *refresh]
        inputs = Inputs(products=("made",))
        return cli.open_run(world.settings(words), tmp_path / "run", "task_lora", "task_lora", inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prime.checkpoints.identity.model_sources", lambda model: {})
        opened(write("a.json", SONGS))
        (tmp_path / "run" / "made").touch()
        opened(write("b.json", SONGS | {"instruction": "Which?", "lamp": "song_genre"}))
        with pytest.raises(InputError, match="made from other inputs:\\n  task: there sha256:.*songs.json"):
            opened(write("songs.json", SONGS | {"labels": ["rock", "jazz"]}))
        opened(write("songs.json", SONGS | {"labels": ["rock", "jazz"]}), ("--refresh",))
    assert not (tmp_path / "run" / "made").exists()


def test_a_task_that_later_versions_know_more_of_is_the_same() -> None:
    movies = TASKS["movie_tagging"]
    assert dataclasses.replace(movies, published_texts=True, templates={}).content() == movies.content()
    assert "two_options" not in movies.content() and "scale" not in movies.content()
