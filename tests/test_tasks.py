"""The task table, and how the text of a query is found."""

from __future__ import annotations

import pytest

from prime.errors import InputError
from prime.users.tasks import TASKS, extract, get_task

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
