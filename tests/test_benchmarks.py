"""Each benchmark at a tiny shape: its last line is JSON, outputs are equal, ratios follow from its own figures."""

import json
import math
from pathlib import Path
from statistics import median
from unittest.mock import Mock

import pytest

import lora_composition_evo
import train_anchor_peft
from benchmarks import (
    ablation,
    convert,
    demo_runs,
    dp,
    dp_tuning,
    draft_shares,
    measuring,
    membership,
    merge,
    privacy,
    products,
    seeds,
    shapes,
    sharer_search,
    stages,
    time_to_quality,
    train_anchors,
)
from benchmarks.shapes import Shares
from prime import cli
from prime.users.data import User, load_labels
from prime.users.metrics import METRICS, sum_stats
from prime.users.prompts import Record
from prime.users.tasks import TASKS, get_task

RATIOS = {  # name: (over, under)
    "speedup_over_peft_loop": ("peft_loop", "ours"),
    "speedup_over_published": ("published", "ours"),
    "time_over_forward_limit": ("ours", "forward_limit"),
}
OTHER = ablation.ARMS["the other fitness"].changes
MERGE = ["--shape", "tiny", "--prompts", "4", "--n_sim", "2", "--budget", "6", "--repeats", "1"]


@pytest.fixture(autouse=True)
def no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "product_peak", lambda *_: 1e12)


def last_line(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check(found: dict, published: str = "published") -> None:
    """The promises every benchmark makes."""
    assert found["outputs_equal"] is True
    own = found["contenders"]
    for name, sides in RATIOS.items():
        over, under = (published if side == "published" else side for side in sides)
        assert found[name] == pytest.approx(own[over]["median"] / own[under]["median"], rel=0.02)
    for figures in own.values():
        assert figures["median"] == pytest.approx(median(figures["seconds"]), abs=1e-3)
        assert figures["peak_mb"] > 0 and figures["fraction_of_peak"] > 0
    assert found["environment"]["threads"] > 0 and found["environment"]["torch"]
    assert found["tokens"]["total"] > 0


def test_merge(capsys: pytest.CaptureFixture) -> None:
    merge.main([*MERGE, "--published_candidates", "1"])
    found = last_line(capsys)
    check(found)
    assert set(found["contenders"]) == {*merge.ANSWERING, *merge.LIMITS}
    assert found["published_scaled_from_candidates"] == 1
    assert found["tokens"]["total"] - found["tokens"]["distinct"] == (4 - 1) * 9 * shapes.SHARED_TOKENS
    assert set(found["largest_logit_difference"]) == {
        "peft_loop", "peft_sorted", "peft_mixed", "peft_onednn", "published",
    }  # fmt: skip
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


def test_membership(capsys: pytest.CaptureFixture) -> None:
    membership.main(["--shape", "tiny", "--adapters", "3", "--records", "10", "--repeats", "1"])
    found = last_line(capsys)
    check(found, published="peft_loop")
    assert set(found["largest_loss_difference"]) == {"peft_loop", "peft_sorted", "peft_mixed", "peft_onednn"}


def test_products(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WORK", 0)
    products.main(["--shape", "tiny", "--threads", "1"])
    found = last_line(capsys)
    assert {(one["layer"], one["rows"]) for one in found["layers"]} == {
        (name, rows) for name in products.sizes_of("tiny") for rows in products.ROWS
    }
    for one in found["layers"]:
        assert one["apart"] < 1e-5
        assert all(rate > 0 for side in (one["forward"], one["gradient"]) for rate in side.values())


def test_scripts_repeat_as_often_as_the_shares_say() -> None:
    kind = shapes.WORKLOADS["tag"]._replace(points=Shares(0.3, 0.0, 0.0), search=Shares(0.6, 0.2, 0.0))
    work = shapes.make_work(kind, 4000, prompts=300, n_sim=3, budget=10, seed=0)
    known = [[gold] for gold in work.golds]
    seen: dict[bool, list] = {True: [], False: []}
    for phase in work.phases:
        own = {(c, p): work.answers[c, p] for c in phase for p in range(300)}
        seen[phase.start == 0] += [(answer, ranked(known[p])) for (_, p), answer in own.items()]
        for (_, p), answer in own.items():
            known[p].append(answer)
    points, search = (draft_shares.shares_of(seen[first]) for first in (True, False))
    assert points.accepted == pytest.approx(0.3, abs=0.05) and points.known == 0
    assert search.accepted == pytest.approx(0.6, abs=0.05) and search.known == pytest.approx(0.2, abs=0.05)


def ranked(known: list) -> list:
    return sorted(dict.fromkeys(known), key=lambda answer: -known.count(answer))


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


def test_ablation_halves_keep_an_items_records_together() -> None:
    ids = ["u1-7", "u1-7-k1-p", "u1-9", "u1-9-k1-p", "u1-12"]
    whole = ablation.Watched.__new__(ablation.Watched)
    whole.records = [Record(name, "", "") for name in ids]
    for name in ("golds", "prompts", "encoded", "drafts", "about"):
        setattr(whole, name, ids)
    first, second = ablation.half_of(whole, 0), ablation.half_of(whole, 1)
    assert first.golds == ["u1-7", "u1-7-k1-p", "u1-12"] and second.about == ["u1-9", "u1-9-k1-p"]
    assert [record.id for record in first.records] == first.golds and ablation.half_of(whole, None) is whole
    assert len(whole.records) == 5


def test_ablation_asks_citation_as_test_queries() -> None:
    """With the labels of the test, and with other users' items as wrong references; the other arm asks its history."""
    args = demo_runs.stage_args("citation", 0, Path("unused"))
    start = demo_runs.Start(args, cli.load_texts(args), [], {}, Mock(), Mock())
    texts, own = ablation.texts_of(start), [ablation.options(args, "citation", more) for more in ((), OTHER)]
    assert [one.fitness for one in own] == ["query", "history"] and texts["query"].others
    assert texts["query"].task.history_labels == texts["query"].task.labels
    missing = {task: ablation.ARMS.keys() - ablation.arms_of(get_task(task)).keys() for task in TASKS}
    assert missing["tweet_paraphrase"] == {"the other fitness"} and not missing["citation"]
    assert texts["history"].task.history_labels == start.texts.task.history_labels and not texts["history"].others


def test_ablation_compares_by_user_over_seeds() -> None:
    """Two seeds of two users: one better off under an arm, one equal; another arm answers as prime does."""
    golds = load_labels(ablation.ROOT / "data/demo/movie_tagging/test_100/user_test_100_label.json")
    one, two = list(golds.items())[:2]

    def answered(first: str, second: str) -> dict[str, list]:
        return {"a": [{"id": one[0], "output": first}], "b": [{"id": two[0], "output": second}]}

    arms = dict.fromkeys(ablation.ROWS, answered("wrong", two[1]))
    arms |= {"rule factor": answered(one[1], two[1]), "no search": answered("wrong", "wrong")}
    origins = {name: {"search": 1, "sharer": 1} for name in arms}
    found = ablation.compare("movie_tagging", [{"answers": arms, "origins": origins, "same": [0.5, 1.0]}] * 2)
    rows = found["rows"]
    assert found["same_choice"] == 0.75
    assert [rows[name]["scores"]["accuracy"]["mean"] for name in ("prime", "rule factor", "no search")] == [0.5, 1, 0]
    assert rows["rule factor"]["to_prime"]["better"] == 1 and rows["no search"]["to_prime"]["worse"] == 1
    assert rows["prime"]["origins"] == {"search": 2, "sharer": 2}
    assert ablation.cells("movie_tagging", rows["rule factor"])[2:] == ["1 : 0", "0 / 2 / 0 / 2"]
    arms = dict.fromkeys(ablation.ROWS, answered("wrong", "wrong")) | {"prime": answered(one[1], two[1])}
    clear = ablation.compare("movie_tagging", [{"answers": arms, "origins": origins, "same": [1.0]}])
    shown = [ablation.overview({"movie_tagging": own}).splitlines() for own in (found, clear)]
    assert shown[0][2:4] == ["| prime | 0.500 |", "| no search | 0.000 |"]  # alike for one of two users
    assert shown[1][2:4] == ["| prime | 1.000 |", "| no search | 0.000 - |"]


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
    assert all(own["peak_mb"] > 0 and own["work_seconds"] > 0 for own in found["stages"].values())
    assert (tmp_path / "tiny/run/merged/mia_summary.json").is_file()
    assert (tmp_path / "tiny/model/model.safetensors").stat().st_size > 4 * 2 * 2048 * 64


def test_convert(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(convert, "WIDTH", 64)
    monkeypatch.setattr(convert, "HIDDEN", 256)
    monkeypatch.setattr(convert, "child_report", lambda words: convert.child(tmp_path / "work"))
    convert.main(["--layers", "2", "--work_dir", str(tmp_path / "work")])
    found = last_line(capsys)
    assert found["checkpoint_mb"] == pytest.approx(2 * 64 * (2 * 32_000 + 2 * (4 * 64 + 3 * 256)) / 2**20, rel=0.05)
    assert found["peak_over_checkpoint"] == pytest.approx(found["peak"] / found["checkpoint_mb"], abs=0.01)
    assert found["seconds"] > 0 and not (tmp_path / "work").exists()


def test_sharer_search(capsys: pytest.CaptureFixture) -> None:
    size = ["--sharers", "5000", "--users", "30", "--width", "16", "--repeats", "1", "--check", "30"]
    sharer_search.main([*size, "--spread", "0.01"])
    found = last_line(capsys)
    assert found["same_as_sorting_fp64"] == found["checked"] == 30
    assert found["search_over_product"] > 0 and found["peak_mb_of_the_process"] > found["embeddings_mb"] > 0


def test_every_arm_of_the_privacy_benchmark_trains_under_its_own_options() -> None:
    args = dp.build_parser().parse_args(["--epsilons", "8,1"])
    model = ["--task_name", "movie_tagging", "--llama_model_path", "m", "--lora_ckpt", "t"]
    parser = train_anchor_peft.build_parser()
    parsed = {arm: parser.parse_args([*model, *words]) for arm, words in dp.arms(args).items()}
    assert [(arm, own.enable_dp, own.epsilon) for arm, own in parsed.items()] == [
        ("plain", False, None), ("clipped", True, None), ("epsilon 8", True, 8.0), ("epsilon 1", True, 1.0),
    ]  # fmt: skip
    assert parsed["clipped"].sigma == dp.NO_NOISE and parsed["plain"].lora_r == 8


def test_the_privacy_benchmark_shows_every_arm_with_its_noise(tmp_path: Path) -> None:
    def span(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    names = [f"{whose} {name}" for whose in ("merged", "sharers") for name in ("published", "controlled")]
    rows = {
        arm: {
            "sigma": sigma, "utility": {name: span(0.5) for name in ("prime", "best_sharer", "uniform")},
            "auroc": {name: span(0.6) for name in names},
        }
        for arm, sigma in (("plain", None), ("epsilon 8", 2.0))
    }  # fmt: skip
    task = get_task("movie_tagging")
    lines = dp.table(task, span(0.4), rows).splitlines()
    assert {line.count("|") for line in lines} == {10}
    assert "| task_lora | - | 0.400 [0.300, 0.500] |" in lines[2] and lines[4].startswith("| epsilon 8 | 2.00 | 0.500")
    dp.plot(task, span(0.4), rows, tmp_path / "frontier")
    assert (tmp_path / "frontier.png").stat().st_size > 5000 and (tmp_path / "frontier.svg").is_file()


def test_tuning_under_privacy_holds_out_every_third_item() -> None:
    user = User("u", tuple({"id": str(place)} for place in range(8)), ())
    kept, out = dp_tuning.split(user)
    assert [item["id"] for item in kept.profile] == ["0", "1", "3", "4", "6", "7"]
    assert [item["id"] for item in out.profile] == ["2", "5"]


def made_up_attack(member: list[float], held_out: list[float]) -> dict:
    scores = {"loss": {"member": member, "held_out": held_out, "non_member": held_out}}
    return {"scores": scores | {"calibrated": scores["loss"]}, "blind": scores | {"calibrated": scores["loss"]}}


@pytest.mark.parametrize(
    ("name", "worse", "reference", "loss"),
    [
        ("movie_tagging", ["comedy", "comedy", "comedy", "action"], ["comedy"] * 4, 0.25),  # accuracy 3/4, not 4/4
        ("product_rating", ["3"] * 4, ["2"] * 4, 1.0),  # a mean error of 2, not 1
    ],
)
def test_what_protects_is_told_by_loss_relative_to_no_penalty(
    name: str, worse: list[str], reference: list[str], loss: float
) -> None:
    task = get_task(name)
    golds = ["comedy" if name == "movie_tagging" else "1"] * 4

    def users(answers: list[str]) -> list[dict]:
        stats = sum_stats(METRICS[task.metrics[0]], answers, golds, task.labels)
        attack = made_up_attack([3.0, 1.0], [2.0, 0.0])
        one = {"stats": stats, "similarity": 0.5, "deployed": "sharer", "attack": attack}
        return [one | {"user": (0, str(number))} for number in range(3)]

    found = privacy.figures(task, users(worse), users(reference))
    assert found["relative_loss"]["mean"] == pytest.approx(loss) and found["single_sharer"] == 1.0
    assert found["controlled"]["mean"] == pytest.approx(0.75) and found["similarity"]["mean"] == pytest.approx(0.5)
    assert privacy.figures(task, users(reference), users(reference))["relative_loss"]["mean"] == pytest.approx(0)
    assert "+" in privacy.table(task, {"penalty 1": found})
    drawn = privacy.points(task, {"penalty 0.5": found, "keep_rank 1": found})
    assert [(one["label"], one["penalty"]) for one in drawn] == [("penalty 0.5", 0.5), ("rank 1", None)]
    assert drawn[0]["controlled_auroc"] == found["controlled"] and drawn[0]["auroc"] == found["published"]


@pytest.mark.parametrize("mechanism", privacy.MECHANISMS)
def test_every_mechanism_is_a_command_of_stage_4(mechanism: str) -> None:
    words = ["--task_name", "movie_tagging", "--llama_model_path", "m", "--lora_ckpt", "t"]
    args = lora_composition_evo.build_parser().parse_args([*words, *privacy.MECHANISMS[mechanism]])
    assert len(privacy.rows_of(mechanism, Path("x"))) == len(args.sim_penalty)


def test_the_benchmark_of_seeds_shows_each_experiment_that_all_seeds_have() -> None:
    """By hand: means over two seeds; the controlled experiment is left out where a seed has none."""

    def attacks(auroc: float) -> dict:
        return {"attacks": {n: {k: {"mean": auroc} for k in ("auroc", "blind_auroc")} for n in ("loss", "calibrated")}}

    both = [{"prime": {"published": attacks(auroc), "controlled": attacks(auroc - 0.1)}} for auroc in (0.6, 0.8)]
    assert seeds.leakage(both, "prime", "published") == pytest.approx(dict.fromkeys(seeds.LEAKAGE, 0.7))
    assert seeds.leakage(both, "prime", "controlled") == pytest.approx(dict.fromkeys(seeds.LEAKAGE, 0.6))
    one = [both[0], {"prime": {"published": attacks(0.8)}}]
    rows = []
    for own in (both, one):
        found = {p: seeds.leakage(own, "prime", name) for p, name in seeds.EXPERIMENTS.items()}
        rows.append({"method": "prime"} | {p + key: value for p, of in found.items() for key, value in of.items()})
    tables = [[seeds.leakages([{"task": "t", "rows": [row]}], p) for p in seeds.EXPERIMENTS] for row in rows]
    assert tables[0][1].splitlines()[-1] == "| prime | 0.600 (0.600), 0.600 |" and tables[1][1] == ""
    assert tables[0][0] == tables[1][0] and "0.700 (0.700), 0.700" in tables[1][0]


def test_seeds_tell_what_a_user_costs() -> None:
    summaries = [
        {"rows": [{"method": "oppu", "seconds_per_user": 2.0 + seed, "bytes_per_user": 4000, "gradient": True},
                  {"method": "uniform", "seconds_per_user": 0.0, "bytes_per_user": None, "gradient": False}]}
        for seed in (0, 1)
    ]  # fmt: skip
    found = {name: seeds.cost(summaries, name) for name in ("uniform", "oppu")}
    assert found["oppu"] == {"gradient": True, "seconds_per_user": 2.5, "bytes_per_user": 4000}
    shown = seeds.costs([{"task": "t", "rows": [{"method": name} | own for name, own in found.items()]}])
    assert shown.splitlines()[2:] == ["| uniform | 0.0 s, - |", "| oppu | 2.5 s, 4 kB, gradient |"]
