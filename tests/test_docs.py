"""The docs as promises: the README is short, quoted messages exist, and what is said to be addable can be added."""

import ast
import re
from pathlib import Path

import nevergrad as ng
import numpy as np
import pytest
import world

import postprocess
from prime.attack import scoring, sets
from prime.merging import optimizer as search
from prime.report.sections.leakage import leakage_table
from prime.runs.files import read_json
from prime.runs.run import Run
from prime.users import prompts, tasks
from prime.users.data import load_users

DOCS = world.ROOT / "docs"
README = world.ROOT / "README.md"
FOLDERS = ("", "anchor_selection", "benchmarks", "data", "data/demo", "docs", "experiments")
PAGES = sorted(page for folder in FOLDERS for page in (world.ROOT / folder).glob("*.md"))


def blocks(name: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


# --- README.md: a front door


def test_the_readme_is_short() -> None:
    """At most 150 lines, no paragraph over 90 words, and the first command within 60."""
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split("bash reproduce.sh")[0].split()) <= 60
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    paragraphs = [part.split() for part in prose.split("\n\n") if not part.lstrip().startswith(("|", "#", "- ", "!"))]
    assert [words[:8] for words in paragraphs if len(words) > 90] == []


def test_all_pages_together_are_short() -> None:
    assert sum(len(page.read_text(encoding="utf-8").splitlines()) for page in PAGES) <= 1400


def test_the_map_names_every_wing_and_files_that_exist() -> None:
    """A line of the map that starts with a folder is about the folder, an indented one about files in it."""
    (block,) = re.findall(r"## Where things are\n\n```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    folder, folders = "", set()
    for line in block.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0]
        if not line.startswith(" "):
            folder = names if names.endswith("/") else ""
            folders.add(folder)
        for name in re.findall(r"[\w./]+\.(?:py|sh)", names):
            assert (world.ROOT / folder / name if line.startswith(" ") else world.ROOT / name).is_file(), line
    wings = {f"prime/{path.parent.name}/" for path in world.ROOT.glob("prime/*/*.py")}
    assert wings <= folders and all((world.ROOT / name).is_dir() for name in folders)


# --- troubleshooting.md


def printed_texts() -> str:
    """All texts of the sources, with an ellipsis for what is filled in; a line each."""
    texts = []
    for path in [*world.ROOT.glob("*.py"), *world.ROOT.glob("prime/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_every_quoted_message_is_one_that_is_printed() -> None:
    page_text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.*?)` \|", page_text, re.MULTILINE)
    texts = printed_texts()
    foreign = {"CUDA out of memory"}  # torch's
    missing = [message for message in quoted if message.strip(" …") not in texts and message not in foreign]
    assert len(quoted) == page_text.count("\n|") - 2 > 10 and missing == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(world.ROOT)))
def test_links_and_named_files_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+?)\)", text):
        assert "://" in link or (path.parent / link).exists(), link
    named = r"((?:prime|tests|data|docs|benchmarks|experiments)/[\w./-]+\.(?:py|md|sh|svg))"
    for name in re.findall(named, text):
        assert (world.ROOT / name).exists() or "song_genre" in name, name


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS.glob("*.md") if path.name != "README.md" and f"({path.name})" not in index] == []


# --- extending.md: its own blocks, run


@pytest.fixture
def song_genre(tmp_path: Path) -> str:
    """The file of the page."""
    path = tmp_path / "song_genre.json"
    path.write_text(blocks("extending.md", "json")[0], encoding="utf-8")
    return str(path)


def test_every_key_of_a_task_is_told() -> None:
    (table,) = re.findall(r"\n\| key \|.*?\n\n", (DOCS / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    told = set(re.findall(r"`(\w+)`", table))
    assert {*tasks.TASK_KEYS} - told == {"name"} and {"items", "guess", "habit"} <= told


def songs(n: int = 4) -> list[dict]:
    """Users with a history and two questions each."""
    genres = ("rock", "folk", "jazz")
    return [
        {"user_id": user, "profile": [{"id": f"{user}{i}", "lyrics": f"la {i}", "genre": genres[i]} for i in range(3)],
         "query": [{"id": f"q{user}{i}", "input": f"la {i}", "gold": genres[i]} for i in range(2)]}
        for user in range(n)
    ]  # fmt: skip


def test_a_task_is_a_file(song_genre: str, tmp_path: Path) -> None:
    """Its data loads, its records have its wording, and its table is made, with what is no genre in a column."""
    world.write(tmp_path / "data/test_100/user_test_100.json", songs())
    task = tasks.get_task(song_genre)
    users = load_users(tmp_path / "data/test_100/user_test_100.json", task, need_queries=True, need_golds=True)
    record = prompts.history_records(users[0], task, task.templates, None)[0]
    assert record.input.startswith("Choose the genre") and record.target.strip() == "rock"
    golds = [{"id": query["id"], "output": query["gold"]} for user in songs() for query in user["query"]]
    world.write(tmp_path / "data/test_100/user_test_100_label.json", {"task": "song_genre", "golds": golds})
    run = Run(tmp_path / "out/song_genre/evo", "lora_composition_evo", "prime", {"task_name": task.name})
    for user in users:
        answers = [{"id": query.id, "output": "rock"} for query in user.queries]
        answers[1]["output"] = "Rock" if user.user_id == "0" else "rock"
        result = {"user_id": user.user_id, "index": int(user.user_id), "predictions": {"prime": {"k0": answers}}}
        run.finish(user.user_id, result)
    postprocess.main(["--task_file", song_genre, "--data_dir", str(tmp_path / "data"), "--output_dir", str(run.root)])
    (row,) = read_json(run.root.parent / "summary.json")["rows"]
    assert row["accuracy"]["mean"] == 0.5 and "song_genre" in (run.root.parent / "report.html").read_text()
    assert row["outside"]["mean"] == 1 / 8 and "outside: the share" in (run.root.parent / "summary.md").read_text()
    assert "outside" not in read_json(run.root / "eval-k0.json")


@pytest.mark.slow
def test_a_new_task_runs_through_the_stages(
    song_genre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's movies, called songs, and asked without LaMP's words: no stage asks for the task's name."""
    source = world.build(tmp_path, "movie_tagging", test_users=2, anchors=4)
    target = source.with_name("song_genre")
    source.rename(target)
    for path in target.rglob("*.json"):
        text = path.read_text().replace('"description":', '"lyrics":').replace('"tag":', '"genre":')
        path.write_text(re.sub(r'"input": "[^"]*\] description: ', '"input": "', text))
    monkeypatch.chdir(tmp_path)
    quick = {"task_lora.py": ["--epochs", "1", "--k_list", "1"], "train_anchor_peft.py": ["--epochs", "1"],
             "history_anchor.py": ["--encoder", world.CHECKPOINT, "--k", "4"],
             "lora_composition_evo.py": ["--k_list", "1"]}  # fmt: skip
    for words in world.announcement():
        if words[0] in (*quick, "mia.py", "postprocess.py") and "LoRA-Composition" not in words[-1].split("/"):
            words = [word.replace("movie_tagging", "song_genre") for word in words]
            place = words.index("--task_name")
            words[place : place + 2] = ["--task_file", song_genre]
            world.run([*words, *quick.get(words[0], [])])
    summary = read_json(tmp_path / "output/song_genre/summary.json")
    assert {row["method"] for row in summary["rows"]} >= {"base", "task_lora", "prime"}


def shrunk(seed: int) -> list[tuple[np.ndarray, float]]:
    """A search by the optimizer of the page, for a minimum at 0.5."""
    shrinking = search.Search(np.zeros(3), "Shrinking", 60, seed)
    while shrinking.open:
        shrinking.tell([float(np.sum((point - 0.5) ** 2)) for point in shrinking.ask()])
    return shrinking.history


def test_an_optimizer_is_a_registered_class() -> None:
    """It finds its way to the least loss, and the same way each time."""
    exec(blocks("extending.md")[0], {})
    try:
        runs = [shrunk(seed) for seed in (1, 1, 2)]
    finally:
        ng.optimizers.registry.unregister("Shrinking")
    assert min(loss for _, loss in runs[0]) < 0.2 < 0.75  # 0.75 at the start
    weights = [np.stack([point for point, _ in run]) for run in runs]
    assert np.array_equal(weights[0], weights[1]) and not np.array_equal(weights[0], weights[2])
    assert np.abs(weights[0]).max() <= search.BOUND


def test_an_attack_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members have no surprising token here, others do; the attack finds them, and the report has its row."""
    function, row = blocks("extending.md")[1:3]
    space = dict(vars(scoring))
    exec(function, space)
    ((name, attack),) = eval("{" + row + "}", space).items()
    monkeypatch.setitem(scoring.ATTACKS, name, attack)
    dice = np.random.default_rng(0)

    def scores(usual: float) -> dict[str, list[float]]:
        drawn = [-dice.gamma(2, usual, size=8) for _ in range(20)]
        return scoring.record_scores([scoring.Evidence(own, own, own, np.ones(8)) for own in drawn])

    def user(usual: float) -> dict[str, dict[str, list[float]]]:
        sides = scores(usual), scores(1.0)
        return {attack: {"member": sides[0][attack], "non_member": sides[1][attack]} for attack in sides[0]}

    table = sets.attack_summaries([{"scores": user(0.2), "blind": user(1.0)} for _ in range(3)], n=50)
    assert table[name]["auroc"]["mean"] > 0.9 and abs(table[name]["blind_auroc"]["mean"] - 0.5) < 0.15
    assert ["prime", name] in [row[:2] for row in leakage_table({"prime": table})]
