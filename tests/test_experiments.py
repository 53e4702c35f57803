"""The experiments' own computations: what they compare, leave out and print, on figures made up."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

import lora_composition_evo
import train_anchor_peft
from experiments import ablation, demo_runs, dp, dp_tuning, privacy, seeds
from prime import cli
from prime.users.data import User, load_labels
from prime.users.metrics import METRICS, sum_stats
from prime.users.prompts import Record
from prime.users.tasks import TASKS, get_task
from prime.users.texts import load_texts


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
    settings = ablation.as_reproduced(demo_runs.search_settings("citation", 0, Path("unused")))
    texts = load_texts(settings.data.folder, "citation", None)
    start = demo_runs.Start(settings, texts, [], {}, Mock(), Mock())
    asked_queries = start.setup()
    asked_history = replace(start, settings=ablation.ARMS["the other fitness"].settings(settings)).setup()
    assert (asked_queries.fitness.fitness, asked_history.fitness.fitness) == ("query", "history")
    assert asked_queries.texts.task.history_labels == texts.task.labels and asked_queries.texts.others
    assert asked_history.texts.task.history_labels == texts.task.history_labels and not asked_history.texts.others
    missing = {task: ablation.ARMS.keys() - ablation.arms_of(get_task(task)).keys() for task in TASKS}
    assert missing["tweet_paraphrase"] == {"the other fitness"} and not missing["citation"]


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
    assert rows["rule factor"]["paired"]["better"] == 1 and rows["no search"]["paired"]["worse"] == 1
    assert rows["prime"]["origins"] == {"search": 2, "sharer": 2}
    assert ablation.cells("movie_tagging", rows["rule factor"])[2:] == ["1 : 0", "0 / 2 / 0 / 2"]
    arms = dict.fromkeys(ablation.ROWS, answered("wrong", "wrong")) | {"prime": answered(one[1], two[1])}
    clear = ablation.compare("movie_tagging", [{"answers": arms, "origins": origins, "same": [1.0]}])
    shown = [ablation.overview({"movie_tagging": own}).splitlines() for own in (found, clear)]
    assert shown[0][2:4] == ["| prime | 0.500 |", "| no search | 0.000 |"]  # alike for one of two users
    assert shown[1][2:4] == ["| prime | 1.000 |", "| no search | 0.000 - |"]


def test_every_arm_of_the_privacy_benchmark_trains_under_its_own_options() -> None:
    args = dp.build_parser().parse_args(["--epsilons", "8,1"])
    model = ["--task_name", "movie_tagging", "--llama_model_path", "m", "--lora_ckpt", "t"]
    by_arm = {}
    for arm, training in dp.arms(args).items():
        by_arm[arm] = cli.parse(train_anchor_peft.Settings, None, [*model, *training])
    assert [(arm, settings.privacy.enable_dp, settings.privacy.epsilon) for arm, settings in by_arm.items()] == [
        ("plain", False, None), ("clipped", True, None), ("epsilon 8", True, 8.0), ("epsilon 1", True, 1.0),
    ]  # fmt: skip
    assert by_arm["clipped"].privacy.sigma == dp.NO_NOISE and by_arm["plain"].training.lora_r == 8


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
        stats = sum_stats(METRICS[task.metrics[0]], answers, golds, task.choices)
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
    settings = cli.parse(lora_composition_evo.Settings, None, [*words, *privacy.MECHANISMS[mechanism]])
    assert len(privacy.rows_of(mechanism, Path("x"))) == len(settings.search.sim_penalty)


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
