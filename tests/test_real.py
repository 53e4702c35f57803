"""reproduce.sh --real: from a clone to the report in one command, with any model; a second call skips all."""

import subprocess
from pathlib import Path

import git_world
import pytest
import world

from prime.users.data import load_users
from prime.users.tasks import get_task


def real(folder: Path, *words: str) -> subprocess.CompletedProcess:
    call = ["bash", str(world.ROOT / "reproduce.sh"), "--real", "--output_dir", str(folder), *words]
    return subprocess.run(call, cwd=folder.parent, capture_output=True, text=True)


@pytest.mark.slow
def test_a_clone_becomes_a_report(tmp_path: Path) -> None:
    git_world.build(tmp_path / "clone", git_world.commits(authors=9, each=14))
    out = tmp_path / "out"
    small = {"prepare_data.test_users": 1, "prepare_data.queries": 2, "prepare_data.items": 13, "history_anchor.k": 4,
             "model.dtype": "float32", "lora_composition_evo.opt_budget": 2, "lora_composition_evo.train_sample": 2,
             "train_anchor_peft.epochs": 1, "mia.max_records": 3}  # fmt: skip
    sets = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    words = ["--git", "clone", "--llama_model_path", str(world.DEMO / "model"), *sets]
    done = real(out, *words)
    assert done.returncode == 0, done.stderr
    data = out / "data" / "news_headline"
    tests = load_users(data / "test_100/user_test_100.json", get_task("news_headline"), need_queries=True)
    assert [len(user.profile) for user in tests] == [11] and "Author" not in (data / "user_base_LLM.json").read_text()
    rows = {row["method"] for row in world.read(out / "news_headline" / "summary.json")["rows"]}
    assert rows >= {"base", "task_lora", "best_sharer", "uniform", "prime"}
    assert (out / "news_headline" / "report.html").is_file()
    assert "settings of presets/small_real.toml" in done.stdout and "--lr 2e-3" in done.stdout
    again = real(out, *words)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 6
    assert "written:" in done.stdout and "written:" not in again.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--real needs --git DIR (a clone, whose authors become users) or --data_dir"),
        (["--git", "nowhere"], "/nowhere: no such directory"),
        (["--git", ".", "--llama_model_path", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_downloaded(tmp_path: Path, words: list[str], told: str) -> None:
    done = real(tmp_path / "out", *words)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("reproduce.sh: ") and told in line
    assert list(tmp_path.iterdir()) == []
