"""Official LaMP files to data/<task>: every promise of docs/real_data.md, on files made as the official ones are."""

import copy
import json
import math
import os
import random
import warnings
from itertools import combinations
from pathlib import Path

import lamp_world
import pytest
from lamp_world import Files, asked, item, time_split, user_split
from world import read

import prepare_data
from benchmarks import lamp_memory
from prime.errors import InputError
from prime.runs.locks import claim
from prime.sources import placing as placing_module
from prime.sources.gather import Similarity
from prime.sources.placing import FILES, REPORT
from prime.sources.prepare import Shares, share_out
from prime.sources.spool import Spool
from prime.sources.values import date_key, id_order, strictly_before
from prime.users.data import LABEL_FILE, load_labels, load_users
from prime.users.tasks import TASKS, extract

EVERY = pytest.mark.parametrize("task", list(TASKS))
SMALL = ["--test_users", "3"]


def convert(made: Files, folder: Path, *words: str, apart: bool = False) -> Path:
    """The files made of official ones; `folder` gets both."""
    made.write(folder / "lamp", apart)
    target = folder / "data"
    options = ["--lamp_dir", str(folder / "lamp"), "--output_dir", str(target), *SMALL, *words]
    prepare_data.main(["--task_name", made.task, *options])
    return target


def cited(made: Files, folder: Path) -> list[str]:
    """--citations with a made-up cited title for each paper of a history, in citation."""
    if made.task != "citation":
        return []
    titles = {own["title"] for part in made.questions.values() for q in part for own in q["profile"]}
    path = folder / "cited.json"
    path.write_text(json.dumps({title: f"cited by {title}" for title in titles}))
    return ["--citations", str(path)]


def users_of(target: Path) -> dict[str, dict]:
    """Every user of the four files by id; it fails where one is in two."""
    found: dict[str, dict] = {}
    for name in FILES.values():
        for user in read(target / name):
            assert user["user_id"] not in found, "a user is in two files"
            found[user["user_id"]] = user
    return found


def contents(target: Path) -> dict[str, bytes]:
    return {name: (target / name).read_bytes() for name in (*FILES.values(), LABEL_FILE)}


# -- the files, for every task and split --------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("split", ["user", "time"])
def test_files_keep_the_contract_and_load_without_a_warning(task: str, split: str, tmp_path: Path) -> None:
    made = user_split(task) if split == "user" else time_split(task)
    target = convert(made, tmp_path, *cited(made, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = {
            which: load_users(target / name, TASKS[task], need_queries=True, need_golds=True)
            for which, name in FILES.items()
        }
    assert all(loaded.values()) and len(loaded["test"]) == 3
    golds = load_labels(target / LABEL_FILE)
    assert golds == {query.id: query.gold for user in loaded["test"] for query in user.queries}
    assert read(target / LABEL_FILE)["task"] == TASKS[task].lamp
    everybody = [user for users in loaded.values() for user in users]
    assert len(everybody) == len(users_of(target)) == 12
    official = {str(q["id"]): q["input"] for part in made.questions.values() for q in part}
    assert {query.id: query.input for user in everybody for query in user.queries} == official
    assert all(len({own["id"] for own in user.profile}) == len(user.profile) for user in everybody)
    report = read(target / REPORT)
    assert report["split"] == split
    for name in FILES.values():
        told, users = report["files"][name], read(target / name)
        assert told["users"] == len(users) and told["items"] == sum(len(user["profile"]) for user in users)
        assert told["queries"] == sum(len(user["query"]) for user in users)
        lengths = sorted(len(user["profile"]) for user in users)
        assert told["items_per_user"] | {"median": 0} == {"min": lengths[0], "median": 0, "max": lengths[-1]}


@EVERY
def test_test_users_have_the_longest_histories(task: str, tmp_path: Path) -> None:
    made = user_split(task)
    target = convert(made, tmp_path, *cited(made, tmp_path))
    lengths = {which: [len(user["profile"]) for user in read(target / name)] for which, name in FILES.items()}
    others = [n for which in ("base", "candidates", "reserve") for n in lengths[which]]
    assert min(lengths["test"]) >= max(others) and lengths["test"] == sorted(lengths["test"], reverse=True)


def test_files_in_folders_of_their_parts_are_found(tmp_path: Path) -> None:
    made = user_split("movie_tagging")
    together, apart = convert(made, tmp_path / "a"), convert(made, tmp_path / "b", apart=True)
    assert contents(together) == contents(apart)


# -- who is who ---------------------------------------------------------------------------------------------------


def grouped(target: Path) -> set[frozenset[str]]:
    """Which questions belong together, by the files."""
    return {frozenset(query["id"] for query in user["query"]) for user in users_of(target).values()}


def people_of(made: Files) -> set[frozenset[str]]:
    """Which questions were made for one person: by user_id."""
    found: dict[str, set[str]] = {}
    for part in made.questions.values():
        for question in part:
            found.setdefault(str(question["user_id"]), set()).add(str(question["id"]))
    return {frozenset(ids) for ids in found.values()}


def without_ids(made: Files) -> Files:
    made = copy.deepcopy(made)
    for part in made.questions.values():
        for question in part:
            del question["user_id"]
    return made


@pytest.mark.parametrize("alike", [True, False], ids=["equal profiles", "each leaves out its own item"])
@pytest.mark.parametrize("task", ["movie_tagging", "tweet_paraphrase"])
def test_questions_are_gathered_by_user_id_or_by_profile(task: str, alike: bool, tmp_path: Path) -> None:
    made = user_split(task, people=16, shown_alike=alike, ids=True)
    expected = people_of(made)
    assert grouped(convert(made, tmp_path / "ids")) == expected
    assert grouped(convert(without_ids(made), tmp_path / "profiles")) == expected


def test_time_split_without_user_ids_is_gathered_by_profiles_that_grow(tmp_path: Path) -> None:
    made = time_split("product_rating")
    assert grouped(convert(without_ids(made), tmp_path)) == people_of(made)


def test_some_questions_without_user_id_join_their_user(tmp_path: Path) -> None:
    made = user_split("movie_tagging", people=16, ids=True)
    expected = people_of(made)
    for question in [q for part in made.questions.values() for q in part][::2]:
        del question["user_id"]
    target = convert(made, tmp_path)
    assert grouped(target) == expected
    assert sum(user_id.startswith("q") for user_id in users_of(target)) > 0


def test_two_known_users_with_the_same_profile_stay_two(tmp_path: Path) -> None:
    made, dice = user_split("movie_tagging", ids=True), random.Random(1)
    twin = made.questions["dev"][0]
    own = [{k: v for k, v in one.items() if k != "id"} for one in twin["profile"]]
    for name, more in (("900", {"user_id": 77}), ("901", {})):
        made.ask("dev", name, *asked("movie_tagging", item("movie_tagging", dice), dice), own, **more)
    found = grouped(convert(made, tmp_path))
    of = {name: next(group for group in found if name in group) for name in ("900", "901", str(twin["id"]))}
    assert of["900"] == {"900"} and "901" not in of[str(twin["id"])]
    assert of["901"] == {"901"}, "a question that could be of either is of neither"


def test_questions_near_two_known_users_are_of_neither_and_similar_known_users_stay_two(tmp_path: Path) -> None:
    task, dice = "news_headline", random.Random(7)
    made = user_split(task)
    shared = [item(task, dice) for _ in range(8)]
    for name, own, more in (
        ("700", shared, {"user_id": "a"}), ("701", shared, {"user_id": "b"}), ("702", shared[:7], {}),
        ("710", [*shared[::-1], item(task, dice)], {"user_id": "c"}), ("711", shared[1:], {"user_id": "d"}),
    ):  # fmt: skip
        made.ask("dev", name, *asked(task, item(task, dice), dice), own, **more)
    of = {name: group for group in grouped(convert(made, tmp_path)) for name in group}
    assert of["700"] == {"700"} and of["701"] == {"701"}
    assert len(of["702"]) <= 2 and {"a", "b", "c", "d"} <= users_of(tmp_path / "data").keys()


def test_a_short_history_within_a_long_one_is_another_persons(tmp_path: Path) -> None:
    """A student all of whose papers are the professor's, too."""
    task, dice = "scholarly_title", random.Random(8)
    made = user_split(task)
    papers = [item(task, dice) for _ in range(20)]
    for name, own in (("700", papers[:5]), ("701", papers)):
        made.ask("train", name, *asked(task, item(task, dice), dice), own)
    assert {frozenset({"700"}), frozenset({"701"})} <= grouped(convert(made, tmp_path))


def test_profiles_alike_in_what_everybody_shows_are_of_different_people(tmp_path: Path) -> None:
    """Four well-known films and one of one's own: 4 of 6 are the same, by chance."""
    task, dice = "movie_tagging", random.Random(9)
    made, films = Files(task), [item("movie_tagging", dice) for _ in range(4)]
    for name in range(20):
        made.ask("train", str(name), *asked(task, item(task, dice), dice), [*films, item(task, dice)])
    assert grouped(convert(made, tmp_path)) == {frozenset({str(name)}) for name in range(20)}


def test_people_who_share_popular_items_are_not_one(tmp_path: Path) -> None:
    """Everybody has seen the same six films and tagged them alike; four to fifteen others tell them apart."""
    made, dice = user_split("movie_tagging", people=12, ids=True), random.Random(3)
    popular = [item("movie_tagging", dice) for _ in range(6)]
    for part in made.questions.values():
        for question in part:
            question["profile"] += [{**own, "id": f"{question['id']}9{n}"} for n, own in enumerate(popular)]
    assert grouped(convert(without_ids(made), tmp_path)) == people_of(made)


def test_a_profile_that_many_people_may_have_proves_nothing(tmp_path: Path) -> None:
    """Two questions that show nothing but one well-known film are not of one person for that."""
    made, dice = user_split("movie_tagging"), random.Random(4)
    film = item("movie_tagging", dice)
    for part in made.questions.values():
        for question in part:
            question["profile"].append({**film, "id": f"{question['id']}99"})
    for name in ("800", "801"):
        made.ask("train", name, *asked("movie_tagging", item("movie_tagging", dice), dice), [film])
    found = grouped(convert(made, tmp_path))
    assert {"800"} in found and {"801"} in found


def test_item_ids_prove_nothing(tmp_path: Path) -> None:
    """Official ids are made of the question's: equal ones are no shared item, different ones no different item."""
    made = user_split("news_headline", ids=True)
    for part in made.questions.values():
        for question in part:
            for place, own in enumerate(question["profile"]):
                own["id"] = str(place)
    assert grouped(convert(without_ids(made), tmp_path)) == people_of(made)


@pytest.mark.parametrize("seed", range(6))
def test_similar_profiles_against_a_naive_loop(seed: int, tmp_path: Path) -> None:
    dice, spool = random.Random(seed), Spool(tmp_path)
    profiles = {}
    for _ in range(30):  # few items, so that many pairs are near both limits; some profiles empty
        keys = dice.sample(range(dice.choice([6, 20, 60])), dice.randint(0, 6))
        profiles[spool.add_profile([(key, {"text": str(key)}) for key in keys])] = set(keys)
    shown = {key: sum(key in keys for keys in profiles.values()) for key in range(60)}
    needed = math.log2(len(profiles) * (len(profiles) - 1) / 2)

    def beyond_chance(keys: set[int]) -> bool:
        return bool(keys) and sum(math.log2(len(profiles) / shown[key]) for key in keys) >= needed - 1e-9

    similarity = Similarity(spool, 0.5)
    for one, keys in profiles.items():
        assert similarity.distinctive(one) == beyond_chance(keys)
        share = {other: len(keys & own) / len(keys | own) for other, own in profiles.items() if keys | own}
        expected = {
            other for other, own in profiles.items()
            if other != one and share.get(other, 0) >= 0.5 and beyond_chance(keys & own)
        }  # fmt: skip
        found = similarity.matches(one)
        assert set(found) == expected and [share[o] for o in found] == sorted((share[o] for o in found), reverse=True)
    spool.close()


# -- histories ----------------------------------------------------------------------------------------------------


@EVERY
def test_history_ends_strictly_before_the_first_query(task: str, tmp_path: Path) -> None:
    made = time_split(task)
    target = convert(made, tmp_path, *cited(made, tmp_path))
    for user in users_of(target).values():
        first = next(q for q in made.questions["train"] if q["user_id"] == user["user_id"])
        shown = sorted(own["date"] for own in first["profile"])
        assert [own["date"] for own in user["profile"]] == shown, "all before the first query, in the order of time"
        asked_texts = {text for query in user["query"] for text in extract(TASKS[task], query["input"]) or ()}
        source = TASKS[task].source
        assert not source or not any(own[source] in asked_texts for own in user["profile"])


def test_a_dated_query_cuts_at_its_date(tmp_path: Path) -> None:
    made, dice = Files("product_rating"), random.Random(0)
    for person in range(8):
        own = [{**item("product_rating", dice), "date": f"2012-05-{day:02d}"} for day in range(1, 10)]
        own[0]["date"], own[1]["date"] = "2011", "2012"  # the second may be later than the fourth of May
        more = {"date": "2012-05-04"} if person % 2 else {}
        text, gold = asked("product_rating", item("product_rating", dice), dice)
        made.ask("dev", person, text if more else f"{text} date: 2012-05-04", gold, own, user_id=person, **more)
    for user in users_of(convert(made, tmp_path)).values():
        assert [own["date"] for own in user["profile"]] == ["2011", "2012-05-03"]


def test_undated_items_of_the_time_split_need_to_be_shown_by_every_query(tmp_path: Path) -> None:
    made = time_split("tweet_paraphrase")
    for part in made.questions.values():
        for question in part:
            dated = sorted(question["profile"], key=lambda own: own["date"])
            del dated[0]["date"]
            if part is made.questions["dev"]:
                del dated[-1]["date"]  # what the train question does not show, and nobody knows when it was
    for user in users_of(convert(made, tmp_path)).values():
        train = next(q for q in made.questions["train"] if q["user_id"] == user["user_id"])
        assert {own["text"] for own in user["profile"]} <= {own["text"] for own in train["profile"]}
        assert user["profile"][0]["date"] == "" and all(own["date"] for own in user["profile"][1:])


@EVERY
def test_what_a_users_own_query_asks_is_not_in_the_history(task: str, tmp_path: Path) -> None:
    made = user_split(task, shown_alike=False, ids=True)
    target = convert(made, tmp_path, *cited(made, tmp_path))
    info, report = TASKS[task], read(target / REPORT)
    lengths = {user_id: len(user["profile"]) for user_id, user in users_of(target).items()}
    assert lengths == {str(1000 + person): 4 + person for person in range(12)}
    assert report["counts"]["items that a query of the user asks"] == sum(n for n in (1, 2, 3, 4) * 3 if n > 1)
    for user in users_of(target).values():
        answers = {query["gold"] for query in user["query"]}
        shown = {text for query in user["query"] for text in extract(info, query["input"]) or ()}
        assert not any(own.get(info.source) in shown and own[info.target] in answers for own in user["profile"])


def test_order_of_a_users_items_is_the_files(tmp_path: Path) -> None:
    made = user_split("scholarly_title", ids=True)
    for user in users_of(convert(made, tmp_path)).values():
        question = next(q for p in made.questions.values() for q in p if str(q["user_id"]) == user["user_id"])
        assert [own["title"] for own in user["profile"]] == [own["title"] for own in question["profile"]]
        assert [own["id"] for own in user["profile"]] == [own["id"] for own in question["profile"]]


# -- odd input ----------------------------------------------------------------------------------------------------


def test_ids_may_be_integers(tmp_path: Path) -> None:
    made = user_split("movie_tagging")
    texts = convert(made, tmp_path / "str")
    for part in ("train", "dev"):
        for row in [*made.questions[part], *made.golds[part]]:
            row["id"] = int(row["id"])
        for question in made.questions[part]:
            for own in question["profile"]:
                own["id"] = int(own["id"])
    assert contents(convert(made, tmp_path / "int")) == contents(texts)


def test_items_without_usable_text_are_dropped_and_counted(tmp_path: Path) -> None:
    made = user_split("product_rating", ids=True)
    clean = convert(made, tmp_path / "clean")
    bad = [{"text": "", "score": "3"}, {"text": "good", "score": None}, {"score": "2"}, {"text": ["a"], "score": "1"},
           {"text": " \n", "score": "5"}, {"text": "fine", "score": True}, None, "text"]  # fmt: skip
    questions = [q for part in made.questions.values() for q in part]
    for question in questions:
        question["profile"] = [*bad, *question["profile"]]
    target = convert(made, tmp_path / "bad")
    assert contents(target) == contents(clean)
    assert read(target / REPORT)["counts"]["items without usable text"] == len(bad) * len(questions)


def test_numbers_become_texts_and_repeated_items_count_once(tmp_path: Path) -> None:
    made = user_split("product_rating", ids=True)
    for part in made.questions.values():
        for question in part:
            for place, own in enumerate(question["profile"]):
                own["score"] = float(own["score"]) if place % 2 else int(own["score"])
            question["profile"].append(dict(question["profile"][0], id="again"))
    target = convert(made, tmp_path)
    everybody = users_of(target)
    assert {own["score"] for user in everybody.values() for own in user["profile"]} <= set("12345")
    assert {len(user["profile"]) for user in everybody.values()} == set(range(4, 16))
    assert read(target / REPORT)["counts"]["items repeated in a profile"] == sum(map(len, made.questions.values()))


def test_a_question_without_its_marker_is_kept_whole_and_named(tmp_path: Path) -> None:
    made = user_split("movie_tagging", ids=True)
    lost = made.questions["dev"][0]
    lost["input"] = lost["input"].partition("description: ")[2]
    target = convert(made, tmp_path)
    report = read(target / REPORT)
    assert report["counts"]["questions without their marker"] == 1
    assert report["named"]["questions without their marker"] == [f"dev {lost['id']}"]
    queries = {query["id"]: query for user in users_of(target).values() for query in user["query"]}
    assert extract(TASKS["movie_tagging"], queries[lost["id"]]["input"]) == (lost["input"],)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in FILES.values():
            load_users(target / name, TASKS["movie_tagging"], need_queries=True)


def test_questions_without_text_options_or_answer_are_dropped_and_named(tmp_path: Path) -> None:
    made = user_split("citation", ids=True)
    first, second = made.questions["train"][:2]
    first["input"] = "which reference is related?"
    del made.golds["train"][1]
    target = convert(made, tmp_path, *cited(made, tmp_path))
    report = read(target / REPORT)
    assert report["named"]["questions without their marker"] == [f"train {first['id']}"]
    assert report["named"]["questions without an answer"] == [f"train {second['id']}"]
    kept = {query["id"] for user in users_of(target).values() for query in user["query"]}
    assert len(kept) == report["counts"]["questions read"] - 2


def test_repeated_questions_count_once_and_ids_of_two_parts_are_told_apart(tmp_path: Path) -> None:
    made = user_split("news_headline", ids=True)
    made.questions["dev"].append(made.questions["dev"][0])
    shared = made.questions["train"][0]["id"] = made.golds["train"][0]["id"] = made.questions["dev"][0]["id"]
    target = convert(made, tmp_path)
    assert read(target / REPORT)["named"]["questions repeated word for word"] == [f"dev {shared}"]
    kept = {query["id"]: query["input"] for user in users_of(target).values() for query in user["query"]}
    assert kept[f"dev-{shared}"] == made.questions["dev"][0]["input"]
    assert kept[f"train-{shared}"] == made.questions["train"][0]["input"] and shared not in kept


def test_users_without_a_usable_item_are_left_out_and_named(tmp_path: Path) -> None:
    made = user_split("tweet_paraphrase", ids=True)
    made.ask("dev", "70", *asked("tweet_paraphrase", {"text": "a b"}, random.Random(0)), [], user_id=5)
    target = convert(made, tmp_path, "--min_items", "5")
    assert read(target / REPORT)["named"]["users with fewer than --min_items items"] == ["1000", "5"]
    assert {"5", "1000"}.isdisjoint(users_of(target))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "dev_questions.json").write_text("<html>not found</html>"), "dev_questions.json: holds HTML"),
        (lambda f: (f / "dev_questions.json").write_text('[{"id": 1,'), "dev_questions.json: not JSON"),
        (lambda f: (f / "dev_questions.json").write_text('{"a": 1}'), "no question there"),
        (lambda f: (f / "dev_outputs.json").write_text("[]"), "no answers there"),
        (lambda f: (f / "dev_outputs.json").unlink(), "dev_outputs.json: no such file"),
        (lambda f: [(f / f"{p}_questions.json").unlink() for p in ("dev", "train")], "no train_questions.json or"),
        (lambda f: rewrite(f, "outputs", lambda d: d | {"task": "LaMP_6"}), "Avocado"),
        (lambda f: rewrite(f, "outputs", lambda d: d | {"task": "LaMP_3"}), "answers of LaMP_3, but movie_tagging"),
        (lambda f: rewrite(f, "questions", lambda d: [dict(q, id=None) for q in d]), r"position 0: no 'id'"),
        (lambda f: rewrite(f, "questions", lambda d: [dict(q, profile={}) for q in d]), "'profile' is no list"),
        (lambda f: rewrite(f, "questions", lambda d: [dict(q, input=3) for q in d]), "'input' is no text"),
        (lambda f: rewrite(f, "questions", lambda d: [dict(q, id=1) for q in d]), "id 1 is taken"),
        (lambda f: rewrite(f, "questions", lambda d: [dict(q, input="Which?") for q in d]), r"do not hold '\] descr"),
    ],
)  # fmt: skip
def test_wrong_files_are_one_message_and_nothing_is_written(spoil, message: str, tmp_path: Path) -> None:
    folder = user_split("movie_tagging").write(tmp_path / "lamp")
    spoil(folder)
    words = ["--task_name", "movie_tagging", "--lamp_dir", str(folder), "--output_dir", str(tmp_path / "data"), *SMALL]
    with pytest.raises(InputError, match=message):
        prepare_data.main(words)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


ODD = [None, True, 0, -1, 3.5, 5.0, 10**30, 1e300, "", "  \n", "x", "\x00", "\ud800", "{}", "[1]", [], {}, [None],
       {"id": 1}, "2012-05-03", "9" * 400]  # fmt: skip


def places(value, path: tuple = ()) -> list[tuple]:
    """Paths of everything within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, child in inner for deeper in places(child, (*path, key)))]


@pytest.mark.parametrize("seed", range(25))
def test_spoiled_files_are_an_error_or_become_files_that_load(seed: int, tmp_path: Path) -> None:
    """Up to thirty values of one official file are replaced or taken out."""
    dice = random.Random(seed)
    task = dice.choice([name for name in TASKS if name != "citation"])
    made = dice.choice([user_split, time_split])(task, people=8, ids=dice.random() < 0.5)
    rows = dice.choice([made.questions, made.questions, made.golds])[dice.choice(["train", "dev"])]
    for _ in range(dice.choice([1, 3, 30])):
        *way, last = dice.choice(places(rows)[1:])
        inner = rows
        for key in way:
            inner = inner[key]
        if dice.random() < 0.3:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(dice.choice(ODD))
    try:
        target = convert(made, tmp_path, "--test_users", "2")
    except InputError as error:
        assert str(error)
        return
    users_of(target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in FILES.values():
            load_users(target / name, TASKS[task], need_queries=True, need_golds=True)


def rewrite(folder: Path, kind: str, change) -> None:
    path = folder / f"dev_{kind}.json"
    path.write_text(json.dumps(change(read(path))))


def test_files_of_another_task_are_told_by_their_fields(tmp_path: Path) -> None:
    """LaMP_2 is news in one folder of the server and movies in another; the questions alone are told apart, too."""
    made = user_split("news_categorize")
    made.task = "movie_tagging"
    for part in made.questions.values():
        for question in part:
            question["input"] = question["input"].replace("] article: ", "] description: ")
    with pytest.raises(InputError, match="no history item has .*; the first has text, title, category, id"):
        convert(made, tmp_path)


def test_too_few_users_and_no_dates_are_told(tmp_path: Path) -> None:
    made = user_split("movie_tagging")
    with pytest.raises(InputError, match="12 users with history and query cannot be parted into 20 for the test"):
        convert(made, tmp_path, "--test_users", "20")
    with pytest.raises(InputError, match="no history item has a date"):
        convert(made, tmp_path, "--split", "time")


# -- what papers cite ---------------------------------------------------------------------------------------------


def test_official_citation_files_alone_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no history item tells what its paper cites.*--citations"):
        convert(user_split("citation"), tmp_path)


def test_what_a_paper_cites_comes_from_item_table_or_a_question_to_others_never_the_test(tmp_path: Path) -> None:
    made, dice = user_split("citation", ids=True), random.Random(5)
    everybody = {q["user_id"]: q for part in made.questions.values() for q in part}
    short, other, longest = everybody[1000], everybody[1001], everybody[1011]
    short["profile"][0]["citation"] = "told by the item"
    told = cited(made, tmp_path)
    papers = {name: dict(item("citation", dice), id=name) for name in ("a", "b", "c")}
    short["profile"] += papers.values()
    for asker, name, part in ((other, "a", "train"), (longest, "b", "train"), (short, "c", "dev")):
        title = papers[name]["title"]
        text = lamp_world.ASK["citation"].format(title=title, first="wrong", second=f"right of {name}")
        made.ask(part, f"5{name}", text, "[2]", asker["profile"], user_id=asker["user_id"])
    target = convert(made, tmp_path, *told)
    assert "1011" in {user["user_id"] for user in read(target / FILES["test"])}
    found = {own["title"]: own["citation"] for own in users_of(target)["1000"]["profile"]}
    assert found[short["profile"][0]["title"]] == "told by the item"
    assert found[short["profile"][1]["title"]] == f"cited by {short['profile'][1]['title']}"
    assert found[papers["a"]["title"]] == "right of a"
    assert papers["b"]["title"] not in found, "only a question to a test user tells it"
    assert papers["c"]["title"] not in found, "the user's own question asks it"


# -- the same files, always ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [user_split, time_split])
@pytest.mark.parametrize("ids", [True, False])
def test_the_order_of_the_official_files_plays_no_part(make, ids: bool, tmp_path: Path) -> None:
    made = make("movie_tagging", ids=ids)
    before = contents(convert(made, tmp_path / "a"))
    for part in ("train", "dev"):
        random.Random(1).shuffle(made.questions[part])
        random.Random(2).shuffle(made.golds[part])
    assert contents(convert(made, tmp_path / "b")) == before


def test_seed_deals_out_anew_but_the_test_users(tmp_path: Path) -> None:
    made = user_split("movie_tagging", people=30)
    same, other = convert(made, tmp_path / "a"), convert(made, tmp_path / "b", "--seed", "1")
    assert read(same / FILES["test"]) == read(other / FILES["test"])
    assert read(same / FILES["base"]) != read(other / FILES["base"])


def test_shares_are_what_was_asked_for() -> None:
    lengths = {str(n): n % 50 for n in range(1100)}
    dealt = share_out(lengths, Shares(), seed=0)
    assert {which: len(ids) for which, ids in dealt.items()} == {
        "test": 100, "base": 400, "candidates": 500, "reserve": 100
    }  # fmt: skip
    assert all(set(a).isdisjoint(b) for a, b in combinations(dealt.values(), 2))
    assert dealt == share_out(dict(reversed(lengths.items())), Shares(), seed=0)
    assert dealt["base"] != share_out(lengths, Shares(), seed=1)["base"]


def test_a_second_run_replaces_the_first_and_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    made = user_split("movie_tagging")
    target = convert(made, tmp_path)
    before = contents(target)
    (target / ".prepare").mkdir()
    (target / ".prepare" / "index.sqlite").write_text("left by a run that was killed")
    assert contents(convert(made, tmp_path)) == before and not (target / ".prepare").exists()
    (target / REPORT).unlink()
    with pytest.raises(InputError, match="not made by prepare_data.py"):
        convert(made, tmp_path, "--seed", "1")
    assert contents(target) == before


def test_a_run_that_fails_leaves_the_earlier_files(tmp_path: Path) -> None:
    made = user_split("movie_tagging")
    target = convert(made, tmp_path)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    made.questions["dev"][-1]["profile"] = None
    with pytest.raises(InputError):
        convert(made, tmp_path)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", range(6))
def test_a_crash_while_files_are_put_in_place_is_mended_by_the_next_run(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six files, `place` are new: labels come after users, the report last. No stage reads a mixture, and the next
    run places the others, even if it fails for another reason.
    """
    made, replace, moved = user_split("movie_tagging"), os.replace, []
    expected = contents(convert(made, tmp_path / "whole"))
    target = convert(made, tmp_path / "part", "--seed", "1")
    assert contents(target) != expected

    def crash(source: Path, target: Path) -> None:
        if ".prepare" not in target.parts:
            if len(moved) == place:
                raise KeyboardInterrupt
            moved.append(target.name)
        replace(source, target)

    monkeypatch.setattr(placing_module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        convert(made, tmp_path / "part")
    assert REPORT not in moved and moved == [Path(name).name for name in (*FILES.values(), LABEL_FILE)][:place]
    monkeypatch.undo()
    for name in FILES.values():
        with pytest.raises(InputError, match=f"{name}: prepare_data.py was stopped while it placed"):
            load_users(target / name, TASKS["movie_tagging"])
    with pytest.raises(InputError, match="nowhere"):
        prepare_data.main(["--task_name", made.task, "--lamp_dir", "nowhere", "--output_dir", str(target)])
    assert contents(target) == expected and load_users(target / FILES["test"], TASKS["movie_tagging"])
    assert contents(convert(made, tmp_path / "part")) == expected


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Spool.add_profile

    def small(spool: Spool, items: list) -> int:
        spool.db.execute("PRAGMA max_page_count = 20")
        return add(spool, items)

    monkeypatch.setattr(Spool, "add_profile", small)
    with pytest.raises(InputError, match="database or disk is full; it needs as much room"):
        convert(user_split("movie_tagging", people=60), tmp_path)
    assert not list((tmp_path / "data").rglob("*"))


def test_two_conversions_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    with claim(tmp_path / "data" / ".prepare.lock") as mine, pytest.raises(InputError, match="another prepare_data.py"):
        assert mine
        convert(user_split("movie_tagging"), tmp_path)


# -- small parts --------------------------------------------------------------------------------------------------


def test_dates_compare_only_as_far_as_both_are_known() -> None:
    day, year = date_key("2012-05-03"), date_key(2012)
    assert day == date_key("2012-5-3") and year == date_key("2012")
    assert strictly_before(date_key("2011"), day) and strictly_before(day, date_key("2013/01"))
    assert not strictly_before(year, day) and not strictly_before(day, year)
    assert not strictly_before(day, date_key("2012-05-03 10:30:00"))
    assert date_key(1332460800) < date_key("1332460801")
    assert [date_key(odd) for odd in (None, "", "May 3, 2012", [], True)] == [""] * 5


def test_ids_sort_as_people_count() -> None:
    assert sorted(["10", "9", "a", "100", "-"], key=id_order) == ["9", "10", "100", "-", "a"]


def test_memory_benchmark_at_a_tiny_shape(capfd: pytest.CaptureFixture) -> None:
    lamp_memory.main(["--megabytes", "1", "--items", "10", "--longest", "100", "--test_users", "5"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["people_right"] and found["items_right"] and found["within_2_gb"]
    assert found["megabytes"] >= 1 and found["peak_mb"] > 10 and found["items"] > found["distinct_items"] > 100
