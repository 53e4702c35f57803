"""What newcomers bring, from nothing to a table of results: prepare_data.py, then every stage, no file edited."""

import csv
import json
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
import world
from rouge_score.rouge_scorer import RougeScorer

from prime.runs.files import read_json
from prime.users.data import LABEL_FILE, load_labels

pytestmark = pytest.mark.slow
MODEL = str(world.DEMO / "model")


def reviews(path: Path) -> None:
    """Product reviews of 40 people, with scores from 0 to 10."""
    dice = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["customer", "day", "review", "score"])
        for row in range(480):
            person, good = row % 40, dice.random() < 0.5
            score = (9 if good else 1) + person % 3 - 1
            text = f"{'superb' if good else 'awful'} build, number {dice.randrange(999)}"
            writer.writerow([f"c{person}", f"2024-{1 + row // 40:02}-15", text, score])


def replies(path: Path) -> None:
    """Replies of 16 reviewers to changes of code, over several lines."""
    lines = []
    for row in range(16 * 12):
        person = row % 16
        code = f"def f{row}(x):\n    return x + {row}\n"
        habit = ("Nit:", "Please", "LGTM,")[person % 3]
        reply = f"{habit}\n- rename `f{row}`\n- add a test"
        lines.append(json.dumps({"reviewer": f"r{person}", "at": 1.7e9 + row, "diff": code, "reply": reply}))
    path.write_text("\n".join(lines), encoding="utf-8")


def stages(task: str, k: int, epochs: str = "1") -> None:
    """The commands of reproduce.sh, with less training."""
    of_task = ["--task_file", task]
    model = [*of_task, "--llama_model_path", MODEL]
    name = read_json(Path(task))["name"]
    adapted = [*model, "--lora_ckpt", f"output/{name}/task-base_LLM"]
    anchors = ["--anchor_dir", f"output/{name}/Anchor_PEFT/LoRA", "--n_sim", "3"]
    short = ["--k_list", "", "--max_gen_len", "24"]
    world.run(["history_anchor.py", *of_task, "--encoder", MODEL, "--embed", "target", "--k", str(k)])
    world.run(["task_lora.py", *model, "--lr", "5e-3", "--epochs", epochs, *short])
    world.run(["train_anchor_peft.py", *adapted, "--lr", "1e-2", "--epochs", epochs, "--train_gen_len", "24"])
    evo = f"output/{name}/LoRA-Composition-evo"
    world.run(["lora_composition_evo.py", *adapted, *anchors, "--opt_budget", "5", "--train_gen_len", "24", *short])
    world.run(["mia.py", *adapted, *anchors, "--exp_dir", evo, "--max_records", "5"])
    world.run(["postprocess.py", *of_task, "--output_dir", evo])


def answers(folder: Path) -> tuple[list[str], list[str], dict]:
    """PriME's answers and the right ones, and its row of the table."""
    golds = load_labels(folder.parents[1] / "data" / folder.name / LABEL_FILE)
    given = read_json(folder / "LoRA-Composition-evo" / "output-k0.json")["golds"]
    rows = read_json(folder / "summary.json")["rows"]
    (row,) = [row for row in rows if (row["method"], row["k"], row["profile"]) == ("prime", 0, False)]
    assert len(given) == len(golds) and {other["method"] for other in rows} >= {"base", "task_lora", "uniform"}
    return [answer["output"] for answer in given], [golds[answer["id"]] for answer in given], row


def test_reviews_of_40_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the scale: an unreadable answer to an 8 costs 8, where 1 to 5 would have had 7."""
    monkeypatch.chdir(tmp_path)
    reviews(tmp_path / "reviews.csv")
    columns = "--user customer --input review --target score --time day --scale 0,10"
    world.run(["prepare_data.py", "--table", "reviews.csv", *shlex.split(columns)])
    stages("data/reviews/task.json", read_json(Path("data/reviews/prepare_report.json"))["k"])
    outputs, golds, row = answers(tmp_path / "output" / "reviews")
    errors, unreadable = [], 0
    for output, gold in zip(outputs, map(float, golds), strict=True):
        if output.strip() in {str(score) for score in range(11)}:
            errors.append(abs(float(output) - gold))
        else:
            unreadable += 1
            errors.append(max(gold, 10 - gold))
    assert row["MAE"]["mean"] == pytest.approx(np.mean(errors)) and len(golds) == 8 * 3
    assert row.get("outside", {"mean": 0})["mean"] == unreadable / len(golds)
    assert row["auroc"] and (tmp_path / "output/reviews/report.html").is_file()


def test_replies_over_several_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach the answers' score as they are; the score is that of the metric's own library."""
    monkeypatch.chdir(tmp_path)
    replies(tmp_path / "replies.jsonl")
    columns = "--user reviewer --input diff --target reply --time at"
    world.run(["prepare_data.py", "--table", "replies.jsonl", *shlex.split(columns)])
    stages("data/replies/task.json", read_json(Path("data/replies/prepare_report.json"))["k"], epochs="8")
    outputs, golds, row = answers(tmp_path / "output" / "replies")
    assert all(gold.count("\n") == 2 for gold in golds) and len(golds) == 3 * 3
    scorer = RougeScorer(["rouge1"])
    scores = [scorer.score(gold, output)["rouge1"].fmeasure for output, gold in zip(outputs, golds, strict=True)]
    assert row["rouge-1"]["mean"] == pytest.approx(np.mean(scores)) and "outside" not in row and row["auroc"]
