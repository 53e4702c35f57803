"""What is held out is drawn by item, seed and user, and nothing that trains sees it."""
import random
from pathlib import Path

import pytest
import world

from prime.errors import InputError
from prime.users.data import User, load_users
from prime.users.holdout import Split, check_split, records_of, trained_records, trained_split
from prime.users.prompts import history_records
from prime.users.tasks import TASKS
from prime.users.texts import Texts

TASK = TASKS["movie_tagging"]
TEXTS = Texts(TASK, TASK.templates, None)
USERS = load_users(world.DEMO / TASK.name / "user_anchor_candidate.json", TASK)


def user_of(words: str, user_id: str = "7") -> User:
    """One item for each word; its description and tag are the word's, its id its place."""
    items = tuple({"id": str(i), "description": f"about {w}", "tag": w} for i, w in enumerate(words.split()))
    return User(user_id, items)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("n", [2, 5, 40])
def test_the_share_is_held_out_and_one_item_stays_on_either_side(share: float, n: int) -> None:
    held_out = Split(share, seed=1).positions(user_of(" ".join(f"w{i}" for i in range(n))))
    assert len(held_out) == min(max(1, round(share * n)), n - 1)
    assert held_out <= set(range(n))


def test_nothing_is_held_out_of_fewer_than_two_items_or_by_default() -> None:
    assert not Split(0.5).positions(user_of("one")) and not Split(0.5).positions(User("7", ()))
    assert not Split(0.0).positions(user_of("one two three"))
    assert Split(0.0).told(user_of("one two")) == {}


def test_the_draw_is_a_function_of_seed_and_user() -> None:
    words = " ".join(f"w{i}" for i in range(30))
    first, again = (Split(0.2, seed=3).positions(user_of(words)) for _ in range(2))
    assert first == again
    assert first != Split(0.2, seed=4).positions(user_of(words))
    assert first != Split(0.2, seed=3).positions(user_of(words, "8"))


def test_only_the_window_that_is_trained_on_is_drawn_from() -> None:
    user = user_of(" ".join(f"w{i}" for i in range(30)))
    assert min(Split(0.5, seed=0, recent_k=10).positions(user)) >= 20


def test_equal_items_stay_together() -> None:
    user = user_of("a b a c d a b e")
    for seed in range(20):
        places = Split(0.4, seed).positions(user)
        out = {user.profile[place]["tag"] for place in places}
        kept = {item["tag"] for place, item in enumerate(user.profile) if place not in places}
        assert not out & kept and len(out) == 2


def test_all_records_are_the_same_records_without_a_holdout() -> None:
    for user in USERS[:3]:
        for recent_k in (0, 10):
            plain = history_records(user, TASK, TEXTS.templates, None, recent_k)
            assert trained_records(TEXTS, user, recent_k, Split()) == plain


def test_what_is_trained_on_shows_nothing_that_is_held_out() -> None:
    """Not as a target, and not as a retrieved item."""
    for user in USERS[:5]:
        holdout = Split(0.3, seed=2, recent_k=40)
        hidden = {user.profile[place]["description"] for place in holdout.positions(user)}
        trained = trained_records(TEXTS, user, 40, holdout)
        assert hidden and not any(text in record.input for record in trained for text in hidden)
        records = records_of(TEXTS, user, 40, holdout)
        assert len(records) > len(trained) and [record for record in records if not record.held_out] == trained


def test_trained_records_are_those_of_a_user_without_the_held_out_items() -> None:
    for user in USERS[:5]:
        holdout = Split(0.3, seed=2)
        out = holdout.positions(user)
        without = User(user.user_id, tuple(item for place, item in enumerate(user.profile) if place not in out))
        assert trained_records(TEXTS, user, 0, holdout) == history_records(without, TASK, TEXTS.templates, None, 0)


def test_a_held_out_items_records_are_those_that_it_would_have_been_trained_on() -> None:
    """Made from the item and the trained items before it, as a trained item's are."""
    user, holdout = USERS[0], Split(0.3, seed=2)
    out = holdout.positions(user)
    place = random.Random(0).choice(sorted(out))
    kept = [item for other, item in enumerate(user.profile) if other == place or other not in out]
    expected = history_records(User(user.user_id, tuple(kept)), TASK, TEXTS.templates, None, 0)
    own = [record for record in records_of(TEXTS, user, 0, holdout) if record.held_out]
    name = f"u{user.user_id}-{user.profile[place]['id']}"
    texts = [(r.id, r.input, r.target) for r in expected if r.id.startswith(name)]
    assert len(texts) == 2 and [(r.id, r.input, r.target) for r in own if r.id.startswith(name)] == texts


def test_other_records_than_the_trained_ones_are_refused(tmp_path: Path) -> None:
    records = records_of(TEXTS, USERS[0], 5, Split(0.4, seed=1, recent_k=5))
    result = {"user_id": "9", "record_ids": [record.id for record in records if not record.held_out]}
    check_split(tmp_path, result, records)
    with pytest.raises(InputError, match="9 was trained on"):
        check_split(tmp_path, result, records_of(TEXTS, USERS[0], 5, Split()))


def test_adapters_from_elsewhere_held_nothing_out(tmp_path: Path) -> None:
    assert trained_split(tmp_path) == Split()
    settings = {"holdout": 0.2, "seed": 3, "recent_k": 50}
    world.write(tmp_path / "settings.json", {"stage": "s", "method": "m", "settings": settings})
    assert trained_split(tmp_path) == Split(0.2, 3, 50)
