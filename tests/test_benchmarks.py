"""Each benchmark at a tiny shape: its last line is JSON, outputs are equal, ratios follow from its own figures."""

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import median

import pytest

from benchmarks import (
    convert,
    draft_shares,
    families,
    gpu,
    measuring,
    membership,
    merge,
    plan,
    products,
    shapes,
    sharer_search,
    stages,
    time_to_quality,
    train_anchors,
)
from benchmarks.shapes import Shares
from prime.users.tasks import get_task

pytestmark = pytest.mark.slow

RATIOS = {  # name: (over, under)
    "speedup_over_peft_loop": ("peft_loop", "ours"),
    "speedup_over_published": ("published", "ours"),
    "time_over_forward_limit": ("ours", "forward_limit"),
}
MERGE = ["--shape", "tiny", "--prompts", "4", "--n_sim", "2", "--budget", "6", "--repeats", "1"]


@pytest.fixture(autouse=True)
def no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "product_peak", lambda *_: 1e12)


def last_line(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check(report: dict, published: str = "published") -> None:
    """The promises every benchmark makes. Nothing is rounded in the last line, so ratios are exactly those of it."""
    assert report["outputs_equal"] is True
    contenders = report["contenders"]
    for name, sides in RATIOS.items():
        over, under = (published if side == "published" else side for side in sides)
        assert report[name] == contenders[over]["median"] / contenders[under]["median"]
    for figures in contenders.values():
        assert figures["median"] == median(figures["seconds"])
        assert figures["peak_mb"] > 0 and figures["fraction_of_peak"] > 0
    assert report["environment"]["threads"] > 0 and report["environment"]["torch"]
    assert report["tokens"]["total"] > 0


def test_merge(capsys: pytest.CaptureFixture) -> None:
    merge.main([*MERGE, "--published_candidates", "1"])
    found = last_line(capsys)
    check(found)
    assert set(found["contenders"]) == {*merge.ANSWERING, *merge.LIMITS}
    assert found["published_scaled_from_candidates"] == 1
    assert found["tokens"]["total"] - found["tokens"]["distinct"] == (4 - 1) * 9 * shapes.SHARED_TOKENS
    assert set(found["largest_logit_difference"]) == set(merge.ANSWERING) - {"ours"}
    assert not any(math.isnan(value) for value in found["largest_logit_difference"].values())


def test_merge_long_answers(capsys: pytest.CaptureFixture) -> None:
    merge.main([*MERGE, "--workload", "title", "--contenders", "ours,peft_sorted,peft_mixed"])
    found = last_line(capsys)
    assert found["outputs_equal"] is True and found["speedup_over_published"] is None


def test_merge_sees_other_logits(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted answers are alike whatever is computed; a contender with other adapters is found out by its logits."""
    monkeypatch.setattr(merge, "merge", lambda sharers, weights, rule: sharers[0])
    merge.main([*MERGE, "--contenders", "ours,peft_loop"])
    assert last_line(capsys)["outputs_equal"] is False


def test_merge_scaling(capsys: pytest.CaptureFixture) -> None:
    merge.main([*MERGE, "--contenders", "ours", "--scaling"])
    found = last_line(capsys)
    assert found["speedup_over_peft_loop"] is None and found["time_over_forward_limit"] is None
    rows = {(one["what"], one["scale"]): one["rows"] for one in found["scaling"]}
    assert rows["users", 4] == 4 * rows["users", 1] == 4 * 4 * 9
    assert rows["budget", 4] == 4 * (3 + 4 * 6)


def test_train_anchors(capsys: pytest.CaptureFixture) -> None:
    train_anchors.main(["--shape", "tiny", "--anchors", "3", "--records", "8", "--repeats", "1"])
    found = last_line(capsys)
    check(found, published="peft_loop")
    assert found["largest_loss_difference"] <= 1e-4


def test_gpu_script_without_a_gpu(tmp_path: Path) -> None:
    """Its steps run to their ends and into one file; that of the tests is theirs alone."""
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--quick", "--out", str(out)]
    steps = ["--steps", "tag,title,membership,training,plan"]
    command = ["bash", str(shapes.ROOT / "benchmarks/gpu.sh"), *words, *steps]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    figures = json.loads(out.read_text())["steps"]
    assert done.returncode == 0, done.stdout[-2000:]
    assert {name: step["exit"] for name, step in figures.items()} == dict.fromkeys(steps[1].split(","), 0)
    for name in ("tag", "title", "membership", "training"):
        assert figures[name]["result"]["outputs_equal"] and figures[name]["result"]["profile"]["busy_seconds"] > 0
    assert all(sides["measured"] > 0 for sides in figures["plan"]["result"].values())


def test_gpu_script_tells_what_failed() -> None:
    """A step that fails, and one that has no time left, cost the others nothing."""
    gone = ["-c", "import sys; print('no such thing'); sys.exit(3)"]
    long = ["-c", "import time; print('begun', flush=True); time.sleep(600)"]
    assert gpu.run_step(gone, 60.0)["output"] == "no such thing\n"
    assert gpu.run_step(gone, 60.0)["exit"] == 3 and gpu.run_step(gone, 0.0)["error"] == "no time left"
    stopped = gpu.run_step(long, 3.0)
    assert stopped["exit"] is None and stopped["output"] == "begun\n"


def test_membership(capsys: pytest.CaptureFixture) -> None:
    membership.main(["--shape", "tiny", "--adapters", "3", "--records", "10", "--repeats", "1"])
    found = last_line(capsys)
    check(found, published="peft_loop")
    assert set(found["largest_loss_difference"]) == {"peft_loop", "peft_sorted", "peft_mixed", "peft_onednn"}


def test_families(capsys: pytest.CaptureFixture) -> None:
    """Positions of all sorts, windows by several names, experts, latent attention, shared keys; and refused ones."""
    kinds = {
        "equal": "bloom codegen deepseek_v3 doge gemma3n_text gpt_bigcode gpt_neo gpt_oss llama4_text mixtral phi3",
        "dense": "mpt",
        "refused": "bert bart roberta xlnet gpt2 mamba jamba qwen3_next falcon_h1 rwkv recurrent_gemma deepseek_v4",
    }
    wanted: dict[str, str] = {}
    for kind, names in kinds.items():
        wanted |= dict.fromkeys(names.split(), kind)
    families.main(list(wanted))
    found = last_line(capsys)
    assert {family: kind for family, (kind, _) in found["families"].items()} == wanted
    assert found["outputs_equal"] is True


def test_families_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the self-check, and with an unlimited view, the loop over one row finds other answers."""
    monkeypatch.setattr(families, "check_rows", lambda *_: None)
    assert families.verdict("mpt").kind == "wrong"
    monkeypatch.setattr("prime.bank.bank.lookback", lambda _: math.inf)
    assert families.verdict("gpt_neo").kind == "wrong"


def test_products(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WORK", 0)
    products.main(["--shape", "tiny", "--threads", "1"])
    found = last_line(capsys)
    measured = [(layer["layer"], layer["rows"]) for layer in found["layers"]]
    assert measured == list(product(products.sizes_of("tiny"), products.ROWS))
    for layer in found["layers"]:
        assert layer["apart"] < 1e-5
        assert min(*layer["forward"].values(), *layer["gradient"].values()) > 0


def test_scripts_repeat_as_often_as_the_shares_say() -> None:
    kind = shapes.WORKLOADS["tag"]._replace(points=Shares(0.3, 0.0, 0.0), search=Shares(0.6, 0.2, 0.0))
    work = shapes.make_work(kind, 4000, prompts=300, n_sim=3, budget=10, seed=0)
    known = [[gold] for gold in work.golds]
    seen: dict[bool, list] = {True: [], False: []}
    for phase in work.phases:
        ranked = [shapes.by_frequency(answers) for answers in known]
        for candidate, prompt in product(phase, range(300)):
            answer = work.answers[candidate, prompt]
            seen[phase.start == 0].append((answer, ranked[prompt]))
            known[prompt].append(answer)
    points, search = (draft_shares.shares_of(seen[first]) for first in (True, False))
    assert points.accepted == pytest.approx(0.3, abs=0.05) and points.known == 0
    assert search.accepted == pytest.approx(0.6, abs=0.05) and search.known == pytest.approx(0.2, abs=0.05)


def test_first_phase_that_is_as_good_as_the_published_end() -> None:
    class Start:
        class texts:
            task = get_task("movie_tagging")

    good, bad = [("comedy", "comedy")], [("action", "comedy")]
    published = [{"seconds": 60.0, "held": good, "differing": 0, "rows": 9}]
    ours = [{"seconds": [1.0, 2.0, 3.0], "held": [bad, good, good], "rows": 10, "from_draft": 5}]
    found = time_to_quality.summary(Start(), published, ours)
    assert found["ours"]["phase_reached"] == 1 and found["speedup_to_quality"] == 30.0
    assert found["speedup_whole_search"] == 20.0 and found["answers_from_drafts"] == 0.5
    ours[0]["held"] = [bad, bad, bad]
    assert time_to_quality.summary(Start(), published, ours)["speedup_to_quality"] is None


def test_stages(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real stages on a saved model; in this process, to spare five starts of Python."""
    monkeypatch.setattr(stages, "in_process", lambda words, threads: {"seconds": 0.0, **stages.child(words)})
    sizes = ["--users", "2", "--queries", "2", "--items", "3", "--anchors", "5", "--base_users", "2", "--epochs", "1"]
    stages.main(["--shape", "tiny", *sizes, "--work_dir", str(tmp_path)])
    found = last_line(capsys)
    assert list(found["stages"]) == [
        "task_lora.py", "history_anchor.py", "train_anchor_peft.py", "lora_composition_evo.py", "mia.py",
    ]  # fmt: skip
    assert (found["users"], found["anchors"]) == (2, 5)
    assert all(figures["peak_mb"] > 0 and figures["work_seconds"] > 0 for figures in found["stages"].values())
    assert (tmp_path / "tiny/run/merged/mia_summary.json").is_file()
    assert (tmp_path / "tiny/model/model.safetensors").stat().st_size > 4 * 2 * 2048 * 64


def test_plan(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, whose memory is that of all tests before: so no two of the figures can be compared."""
    monkeypatch.setattr(plan, "apart", plan.measure)
    monkeypatch.setattr(plan, "RECORDS", plan.RECORDS[:8])
    plan.main(["--shape", "tiny"])
    figures = last_line(capsys)
    assert set(figures) == set(plan.PHASES)
    assert all(sides["planned"] > 0 and sides["measured"] > 0 for sides in figures.values())


def test_convert(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(convert, "WIDTH", 64)
    monkeypatch.setattr(convert, "HIDDEN", 256)
    monkeypatch.setattr(convert, "child_report", lambda words: convert.child(tmp_path / "work"))
    convert.main(["--layers", "2", "--work_dir", str(tmp_path / "work")])
    found = last_line(capsys)
    assert found["checkpoint_mb"] == pytest.approx(2 * 64 * (2 * 32_000 + 2 * (4 * 64 + 3 * 256)) / 2**20, rel=0.05)
    assert found["peak_over_checkpoint"] == found["peak"] / found["checkpoint_mb"]
    assert found["seconds"] > 0 and not (tmp_path / "work").exists()


def test_sharer_search(capsys: pytest.CaptureFixture) -> None:
    size = ["--sharers", "5000", "--users", "30", "--width", "16", "--repeats", "1", "--check", "30"]
    sharer_search.main([*size, "--spread", "0.01"])
    found = last_line(capsys)
    assert found["same_as_sorting_fp64"] == found["checked"] == 30
    assert found["search_over_product"] > 0 and found["peak_mb_of_the_process"] > found["embeddings_mb"] > 0
