"""Records and prompts of all tasks, letter for letter."""

from __future__ import annotations

import copy
import random

import pytest

from prime.errors import InputError
from prime.users.data import Query, User, first_words, load_users
from prime.users.prompts import Prompt, Record, history_records, query_records, task_records, test_prompts
from prime.users.tasks import TASKS, get_task
from prime.users.templates import load_templates

TAGS = (
    "sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, psychology, fantasy, "
    "romance, thought-provoking, social commentary, violence, true story"
)
CATEGORIES = (
    "food & drink, sports, education, parents, religion, travel, business, crime, science & technology, "
    "culture & arts, entertainment, politics, women, style & beauty, healthy living"
)
# One user per task: two history items, one query; {x} and {0} in texts must stay as they are.
ITEMS: dict[str, list[dict[str, str]]] = {
    "citation": [
        {"id": "1", "title": "Deep {x} nets", "abstract": "We dig.", "citation": "Wide nets"},
        {"id": "2", "title": "Old trees", "abstract": "We cut.", "citation": "Older trees"},
    ],
    "movie_tagging": [
        {"id": "1", "description": "A robot {x} paints.", "tag": "sci-fi"},
        {"id": "2", "description": "Two thieves.", "tag": "romance"},
    ],
    "news_categorize": [
        {"id": "1", "text": "The cup {x} final.", "title": "Cup", "category": "sports"},
        {"id": "2", "text": "A bank falls.", "title": "Bank", "category": "business"},
    ],
    "product_rating": [
        {"id": "1", "text": "Broke {x} soon.", "score": "2"},
        {"id": "2", "text": "Lasts long.", "score": "5"},
    ],
    "news_headline": [
        {"id": "1", "text": "The cup {x} final.", "title": "Cup goes north"},
        {"id": "2", "text": "A bank falls.", "title": "Bank down"},
    ],
    "scholarly_title": [
        {"id": "1", "title": "Nets", "abstract": "We {x} dig."},
        {"id": "2", "title": "Trees", "abstract": "We cut."},
    ],
    "tweet_paraphrase": [{"id": "1", "text": "rain {x} again"}, {"id": "2", "text": "sun at last"}],
}
INPUTS = {
    "citation": (
        'For an author who has written the paper with the title "New {0} nets", which reference is related? '
        'Just answer with [1] or [2] without explanation. [1]: "Nets" [2]: "Fish"'
    ),
    "movie_tagging": "Which tag? tags: [sci-fi, comedy] description: A {0} duel.",
    "news_categorize": "Which category? categories: [sports] article: A {0} duel.",
    "product_rating": "What score? just answer with 1 or 2 without further explanation. review: A {0} duel.",
    "news_headline": "Generate a headline for the following article: A {0} duel.",
    "scholarly_title": "Generate a title for the following abstract of a paper: A {0} duel.",
    "tweet_paraphrase": ("Paraphrase the following tweet without any explanation before or after it: A {0} duel."),
}
# task: (input and target of each item's record, history line of item 2, test prompt, gold)
EXPECTED: dict[str, tuple[list[tuple[str, str]], str, str, str]] = {
    "citation": (
        [
            ("Which reference does this paper cite?\nPaper: Deep {x} nets Reference:", " Wide nets"),
            ("Which reference does this paper cite?\nPaper: Old trees Reference:", " Older trees"),
        ],
        "Paper: Old trees Reference: Older trees\n",
        "Which reference does this paper cite, [1] or [2]?\nPaper: New {0} nets [1]: Nets [2]: Fish Reference:",
        "[2]",
    ),
    "movie_tagging": (
        [
            (f"Choose the tag that fits the movie: {TAGS}.\nMovie: A robot {{x}} paints. Tag:", " sci-fi"),
            (f"Choose the tag that fits the movie: {TAGS}.\nMovie: Two thieves. Tag:", " romance"),
        ],
        "Movie: Two thieves. Tag: romance\n",
        f"Choose the tag that fits the movie: {TAGS}.\nMovie: A {{0}} duel. Tag:",
        "comedy",
    ),
    "news_categorize": (
        [
            (
                f"Choose the category of the article: {CATEGORIES}.\nArticle: The cup {{x}} final. Category:",
                " sports",
            ),
            (f"Choose the category of the article: {CATEGORIES}.\nArticle: A bank falls. Category:", " business"),
        ],
        "Article: A bank falls. Category: business\n",
        f"Choose the category of the article: {CATEGORIES}.\nArticle: A {{0}} duel. Category:",
        "sports",
    ),
    "product_rating": (
        [
            ("Guess the score of the review, 1 to 5.\nReview: Broke {x} soon. Score:", " 2"),
            ("Guess the score of the review, 1 to 5.\nReview: Lasts long. Score:", " 5"),
        ],
        "Review: Lasts long. Score: 5\n",
        "Guess the score of the review, 1 to 5.\nReview: A {0} duel. Score:",
        "4",
    ),
    "news_headline": (
        [
            ("Write the headline of the article.\nArticle: The cup {x} final. Headline:", " Cup goes north"),
            ("Write the headline of the article.\nArticle: A bank falls. Headline:", " Bank down"),
        ],
        "Article: A bank falls. Headline: Bank down\n",
        "Write the headline of the article.\nArticle: A {0} duel. Headline:",
        "Duel at {1}",
    ),
    "scholarly_title": (
        [
            ("Write the title of the paper.\nAbstract: We {x} dig. Title:", " Nets"),
            ("Write the title of the paper.\nAbstract: We cut. Title:", " Trees"),
        ],
        "Abstract: We cut. Title: Trees\n",
        "Write the title of the paper.\nAbstract: A {0} duel. Title:",
        "Duels",
    ),
    "tweet_paraphrase": (
        [("Tweet:", " rain {x} again"), ("Tweet:", " sun at last")],
        "Tweet: sun at last\n",
        "Say this in a tweet of your own.\nText: A {0} duel. Tweet:",
        "duel it is",
    ),
}
PAIRED_HISTORY = {  # the first item, as the second one retrieves it
    "movie_tagging": "Movie: A robot {x} paints. Tag: sci-fi\n",
    "product_rating": "Review: Broke {x} soon. Score: 2\n",
    "news_headline": "Article: The cup {x} final. Headline: Cup goes north\n",
    "scholarly_title": "Abstract: We {x} dig. Title: Nets\n",
}
NAMES = list(TASKS)


def make_user(name: str) -> User:
    return User("u/7", tuple(ITEMS[name]), (Query("q9", INPUTS[name], EXPECTED[name][3]),))


def movie_user(*texts: str, tags: tuple[str, ...] = ()) -> User:
    items = [{"id": str(i), "description": text, "tag": tags[i] if tags else "comedy"} for i, text in enumerate(texts)]
    return User("7", tuple(items), (Query("q", "tags: [] description: alpha beta", "action"),))


def movies(user: User, profile_text: str | None = "p", **options) -> list[Record]:
    return history_records(user, TASKS["movie_tagging"], TASKS["movie_tagging"].templates, profile_text, **options)


@pytest.mark.parametrize("name", NAMES)
def test_history_records(name: str) -> None:
    records = history_records(make_user(name), TASKS[name], load_templates(None, TASKS[name]), "likes {0} rain")
    (first, second) = EXPECTED[name][0]
    expected = [Record("uu/7-1", *first), Record("uu/7-2", *second)]
    if name in PAIRED_HISTORY:
        head = f"### User Profile:\nlikes {{0}} rain\n\n### User History:\n{PAIRED_HISTORY[name]}\n\n"
        expected.append(Record("uu/7-2-k1-p", head + second[0], second[1]))
    assert records == expected


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_the_test(name: str) -> None:
    task, templates = TASKS[name], load_templates(None, TASKS[name])
    user, (_, line, prompt, _) = make_user(name), EXPECTED[name]
    assert test_prompts(user, task, templates, 0, None) == [Prompt("q9", prompt)]
    assert test_prompts(user, task, templates, 0, "p") == [Prompt("q9", f"### User Profile:\np\n\n{prompt}")]
    # no word in common with both items: the tie goes to the later one
    two = User("7", user.profile, (Query("q9", user.queries[0].input.replace("nets", "x"), None),))
    prompt = prompt.replace("nets", "x")
    text = f"### User History:\n{line}\n\n{prompt}"
    assert test_prompts(two, task, templates, 1, None) == [Prompt("q9", text)]
    assert test_prompts(two, task, templates, 1, "p") == [Prompt("q9", f"### User Profile:\np\n\n{text}")]


@pytest.mark.parametrize("name", NAMES)
def test_task_records(name: str) -> None:
    task, user, (_, _, prompt, gold) = TASKS[name], make_user(name), EXPECTED[name]
    (record,) = task_records(user, task, TASKS[name].templates, "likes {0} rain")
    assert record.id == "uu/7-qq9" and record.target == f" {gold}"
    (asked,) = test_prompts(user, task, TASKS[name].templates, 1, "likes {0} rain")
    assert record.input == asked.text and record.input.endswith(prompt)
    (bare,) = task_records(user, task, TASKS[name].templates, None)
    assert bare.input.startswith("### User Profile:\n\n\n### User History:\n")


def asked(name: str, others=(), seed: int = 0, **options) -> list[Record]:
    return query_records(make_user(name), TASKS[name], TASKS[name].templates, others, random.Random(seed), **options)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("citation", "tweet_paraphrase")])
def test_history_asked_as_a_test_query_is_the_plain_record_where_both_ask_the_same(name: str) -> None:
    expected = [Record(f"uu/7-{i + 1}-q", *record) for i, record in enumerate(EXPECTED[name][0])]
    assert asked(name) == expected
    assert asked(name, recent_k=1) == expected[1:]


def test_citation_asked_as_a_choice_against_what_the_nearest_other_paper_cites() -> None:
    others = [
        {"id": "8", "title": "Fish", "abstract": "", "citation": "Whales"},
        {"id": "9", "title": "Old trees again", "abstract": "", "citation": "Older trees"},  # the right answer itself
        {"id": "10", "title": "Deep old nets", "abstract": "", "citation": "Nets {y}"},
    ]
    for seed in range(8):
        first, second = asked("citation", others, seed)
        for record, title, right in ((first, "Deep {x} nets", "Wide nets"), (second, "Old trees", "Older trees")):
            options = ("Nets {y}", right) if record.target == " [2]" else (right, "Nets {y}")
            told = f"Paper: {title} [1]: {options[0]} [2]: {options[1]} Reference:"
            assert record.input == f"Which reference does this paper cite, [1] or [2]?\n{told}"
    assert len({asked("citation", others, seed)[0].target for seed in range(8)}) == 2
    assert asked("citation", others, 3) == asked("citation", others, 3)


def test_what_cannot_be_asked_as_a_test_query() -> None:
    with pytest.raises(InputError, match="tweet_paraphrase: a history holds answers without questions"):
        asked("tweet_paraphrase")
    with pytest.raises(InputError, match="citation: no items of other users"):
        asked("citation", [{"id": "9", "title": "Old trees", "abstract": "", "citation": "Wide nets"}])


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_changed(name: str) -> None:
    user, templates = make_user(name), load_templates(None, TASKS[name])
    long = User("8", tuple(item | {"id": "w " * 900} for item in user.profile), user.queries)
    before = copy.deepcopy((user, long, templates))
    for one in (user, long):
        history_records(one, TASKS[name], templates, None)
        task_records(one, TASKS[name], templates, "p")
        test_prompts(one, TASKS[name], templates, 4, "p")
    assert (user, long, templates) == before
    templates["prompt"] = "changed"
    assert load_templates(None, TASKS[name]) == before[2]


def test_asked_at_test_as_learned_from_history() -> None:
    user = movie_user("alpha beta")
    (record,) = movies(user)
    (prompt,) = test_prompts(user, TASKS["movie_tagging"], TASKS["movie_tagging"].templates, 0, None)
    assert record.input == prompt.text


@pytest.mark.parametrize("name", NAMES)
def test_no_space_before_the_answer(name: str) -> None:
    rows = TASKS[name].templates
    assert all(rows[key] == rows[key].rstrip() for key in ("prompt", "OPPU_input"))
    assert rows["full_prompt"] == rows["prompt"] + " {}"
    assert rows["OPPU_full"] == rows["OPPU_input"] + f" {{{TASKS[name].target}}}"


def test_recent_k_takes_the_last() -> None:
    user = movie_user(*(f"film {i}" for i in range(60)))
    ids = [record.id for record in movies(user) if not record.id.endswith("-p")]
    assert ids == [f"u7-{i}" for i in range(10, 60)]  # 50 by default
    assert [record.id for record in movies(user, recent_k=2)] == ["u7-58", "u7-59", "u7-59-k1-p"]
    assert len(movies(user, recent_k=0)) == 60 + 59
    assert movies(user, recent_k=60) == movies(user, recent_k=100) == movies(user, recent_k=0)
    with pytest.raises(ValueError, match="recent_k is -1"):
        movies(user, recent_k=-1)


def test_second_record_sees_only_earlier_items_of_the_window() -> None:
    texts = ("robot war", "deep sea", "love song", "old king", "robot war", "robot war")
    user = movie_user(*texts, tags=("t0", "t1", "t2", "t3", "t4", "t5"))

    def retrieved(recent_k: int) -> dict[str, str]:
        paired = [record for record in movies(user, recent_k=recent_k) if record.id.endswith("-k1-p")]
        return {r.id: r.input.split("### User History:\n")[1].split("\n\n\n")[0][-2:] for r in paired}

    found = retrieved(0)
    assert found["u7-4-k1-p"] == "t0"  # not itself, not item 5
    assert found["u7-1-k1-p"] == "t0"  # the only earlier one
    assert retrieved(5)["u7-4-k1-p"] == "t3"  # item 0 is outside: no match, the latest
    assert "u7-1-k1-p" not in retrieved(5)  # the first of the window has nothing earlier


LONG = " ".join(f"w{i}" for i in range(1000))
CODE = "def f(x):\n    if x:\n\treturn  x\n"


def test_texts_are_kept_as_they_are() -> None:
    records = movies(movie_user(CODE, LONG, tags=("a\n b ", "x")))
    assert records[0].input.endswith(f"\nMovie: {CODE} Tag:") and records[0].target == " a\n b "
    assert f"Movie: {LONG} Tag:" in records[1].input
    assert f"### User History:\nMovie: {CODE} Tag: a\n b \n" in records[2].input
    user = User("7", movie_user(CODE).profile, (Query("q", f"] description: {CODE}", "x"),))
    for text in (
        test_prompts(user, TASKS["movie_tagging"], TASKS["movie_tagging"].templates, 1, None)[0].text,
        task_records(user, TASKS["movie_tagging"], TASKS["movie_tagging"].templates, None)[0].input,
    ):
        assert text.count(CODE) == 2


def test_what_is_retrieved_is_cut_to_368_words_between_which_all_stays() -> None:
    text = CODE + LONG  # six words and more
    (prompt,) = test_prompts(movie_user(text), TASKS["movie_tagging"], TASKS["movie_tagging"].templates, 1, None)
    kept = first_words(text, 368)
    assert f"Movie: {kept} Tag: comedy\n" in prompt.text and kept == text[: text.index(" w362 ")]
    assert first_words(CODE, 6) == CODE == first_words(CODE, 99)
    assert first_words(CODE, 5) == CODE[: CODE.rindex('x')].rstrip()


def test_what_is_retrieved_does_not_depend_on_spacing() -> None:
    plain = movie_user("robot war at sea", "a love song", "old king of war", "robot war\nat sea")
    odd = movie_user("robot\n  war\tat sea", "a\nlove song", "old  king\nof war ", " robot war\nat sea")
    for one, other in zip(movies(plain), movies(odd), strict=True):
        assert " ".join(one.input.split()) == " ".join(other.input.split())


def test_published_texts_have_single_spaces_and_768_words(write) -> None:
    item = {"id": "1", "description": f"{CODE}{LONG}", "tag": f"a\n b {LONG}"}
    query = {"id": "q", "input": f"] description: {CODE}{LONG}", "gold": "x"}
    path = write("users.json", [{"user_id": "7", "profile": [item, item | {"id": "2"}], "query": [query]}])
    task = get_task("movie_tagging", "published")
    (user,) = load_users(path, task, need_queries=True)
    spaced = " ".join(f"{CODE}{LONG}".split())
    whole, cut, short = spaced, " ".join(spaced.split()[:768]), " ".join(spaced.split()[:368])
    records = history_records(user, task, TASKS["movie_tagging"].templates, None)
    assert records[0].input.endswith(f"\nMovie: {cut} Tag:") and records[0].target.endswith(" w764 w765")
    assert f"Movie: {short} Tag: a b w0 " in records[2].input and whole not in records[2].input
    (record,) = task_records(user, task, TASKS["movie_tagging"].templates, None)
    assert record.input.endswith(f"\nMovie: {cut} Tag:")
    (prompt,) = test_prompts(user, task, TASKS["movie_tagging"].templates, 0, None)
    assert prompt.text.endswith(f"\nMovie: {CODE}{LONG} Tag:")  # as published, test articles are whole


def test_k_items_best_first() -> None:
    user = movie_user("gamma", "alpha beta", "beta", "delta", "eps", "zeta", "eta")
    (prompt,) = test_prompts(user, TASKS["movie_tagging"], TASKS["movie_tagging"].templates, 3, None)
    head = "### User History:\nMovie: alpha beta Tag: comedy\nMovie: beta Tag: comedy\nMovie: eta Tag: comedy\n\n\n"
    assert prompt.text.startswith(head)
    (everything,) = test_prompts(user, TASKS["movie_tagging"], TASKS["movie_tagging"].templates, 99, None)
    assert everything.text.count("Tag: comedy\n") == 7


def test_nothing_to_retrieve_leaves_no_header() -> None:
    user, task = movie_user(), TASKS["movie_tagging"]
    (plain,) = test_prompts(user, task, TASKS["movie_tagging"].templates, 0, None)
    assert test_prompts(user, task, TASKS["movie_tagging"].templates, 4, None) == [plain]
    (record,) = task_records(user, task, TASKS["movie_tagging"].templates, "p")
    assert record.input == "### User Profile:\np\n\n" + plain.text
    assert movies(user) == []


def test_without_profile_text_the_second_record_has_an_empty_one() -> None:
    records = movies(movie_user("a", "b"), None)
    assert records[2].input.startswith("### User Profile:\n\n\n### User History:\nMovie: a Tag: comedy\n\n\n")


def test_query_without_its_words() -> None:
    user = User("7", (), (Query("q", "just this text", "x"),))
    (prompt,) = test_prompts(user, TASKS["news_headline"], TASKS["news_headline"].templates, 0, None)
    assert prompt.text.endswith("\nArticle: just this text Headline:")
    with pytest.raises(InputError, match="user 7: query q: no title and two options"):
        test_prompts(user, TASKS["citation"], TASKS["citation"].templates, 0, None)


def test_training_needs_gold() -> None:
    user = User("7", (), (Query("q", INPUTS["movie_tagging"], None),))
    with pytest.raises(InputError, match="user 7: query q: no field 'gold'"):
        task_records(user, TASKS["movie_tagging"], TASKS["movie_tagging"].templates, "p")
