"""What a task's prompts are made of, read from its data folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import world

from prime.users.data import CANDIDATE_FILE, load_users
from prime.users.tasks import TASKS
from prime.users.texts import Texts, asked_as_queries, load_candidates, load_test_users, load_texts


def test_a_folder_without_profiles_has_no_prompts_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = load_texts(tmp_path, "movie_tagging", None)
    assert texts.profiles is None and texts.profile_of("1") is None
    assert capsys.readouterr().err.startswith(f"{tmp_path}/profile-id2text.json: not there")


def test_profiles_are_known_by_user() -> None:
    folder = world.DEMO / "movie_tagging"
    texts = load_texts(folder, "movie_tagging", None)
    users = load_test_users(folder, texts.task)
    assert all(texts.profile_of(user.user_id) for user in users) and texts.profile_of("nobody") is None
    assert all(user.queries for user in users)
    assert load_candidates(folder, texts.task) == load_users(folder / CANDIDATE_FILE, texts.task)


@pytest.mark.parametrize("name", ["movie_tagging", "citation"])
def test_histories_asked_as_queries_are_judged_like_the_test(name: str) -> None:
    task = TASKS[name]
    asked = asked_as_queries(world.DEMO / name, Texts(task, {}, None))
    assert (asked.task.history_metrics, asked.task.history_labels) == (task.metrics, task.labels)
    assert bool(asked.others) == (name == "citation")


def test_who_the_users_are_needs_no_model_library() -> None:
    names = sorted(path.stem for path in (world.ROOT / "prime" / "users").glob("*.py"))
    imports = "\n".join(f"import prime.users.{name}" for name in names)
    code = f"import sys\n{imports}\nsys.exit(not {{'torch', 'transformers', 'peft'}}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=world.ROOT).returncode == 0
