"""Several penalties in one run: each search goes the way it would go alone, and what they share is answered once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import world
from torch import Tensor

import lora_composition_evo
import postprocess
from prime.errors import InputError
from prime.merging.evolution import Evaluation, Memo, check_search, choose, evolve
from prime.merging.objective import Objective, Trial
from prime.report.frontier import frontier_table, write_frontier
from prime.runs.files import read_json, write_json
from prime.runs.journal import Journal
from prime.runs.penalties import penalty_runs, sharing_text
from prime.runs.run import Run
from prime.settings import FitnessSettings, SearchSettings
from prime.users.data import User
from prime.users.tasks import TASKS

MOVIE, RATING = TASKS["movie_tagging"], TASKS["product_rating"]
PENALTIES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)


class Hills:
    """Stands in for a `Population`: utility and similarity are rough functions of the weights, without any model."""

    def __init__(self, n: int = 3, layers: int = 0, **given: Any):
        self.search = SearchSettings(**given)
        self.golds = ["comedy"]
        self.n, self.shape = n, (n, layers) if layers else (n,)
        self.batches: list[int] = []
        self.journal = Journal(Path("/nonexistent"))

    def known_points(self) -> Tensor:
        points = torch.cat([torch.zeros(1, self.n), torch.eye(self.n)])
        return points[:, :, None].expand(-1, -1, self.shape[1]).clone() if len(self.shape) == 2 else points

    def trials(self, objective: Objective):
        def measure(weights: Tensor) -> list[list[Trial]]:
            self.batches.append(len(weights))
            return [[Trial(self.utility(own), self.similarity(own))] for own in weights]

        return measure

    def utility(self, own: Tensor) -> float:
        """Whole thirtieths, as an accuracy over thirty records is."""
        flat = own.double().flatten()
        near = 1 - (flat - torch.linspace(0.2, 0.6, len(flat))).abs().mean()
        return round(30 * float(near + 0.1 * (7 * flat).sin().mean())) / 30

    def similarity(self, own: Tensor) -> float:
        return round(30 * float(own.double().abs().sum(0).clamp(max=1.2).mean() / 1.2)) / 30


def objectives(penalties: Sequence[float] = PENALTIES, task=MOVIE) -> list[Objective]:
    return [Objective(task, ["comedy"], penalty) for penalty in penalties]


def run(hills: Hills, penalties: Sequence[float], folder: Path, seed: int = 3, task=MOVIE) -> list[list[Evaluation]]:
    made = objectives(penalties, task)
    memo = Memo(hills, hills.trials(made[0]))
    logs = [folder / f"{penalty:g}.jsonl" for penalty in penalties]
    return [evolve(memo, one.score, hills.search, seed, log) for one, log in zip(made, logs, strict=True)]


@pytest.mark.parametrize("layers", [0, 4])
@pytest.mark.parametrize("opt_type", ["cma", "OnePlusOne"])
@pytest.mark.parametrize("task", [MOVIE, RATING], ids=lambda task: task.name)
def test_each_penalty_finds_what_it_finds_alone(tmp_path: Path, layers: int, opt_type: str, task) -> None:
    together = run(Hills(layers=layers, opt_type=opt_type), PENALTIES, tmp_path / "together", task=task)
    for penalty, found in zip(PENALTIES, together, strict=True):
        (alone,) = run(Hills(layers=layers, opt_type=opt_type), [penalty], tmp_path / "alone", task=task)
        name = f"{penalty:g}.jsonl"
        assert world.entries(tmp_path / "together" / name) == world.entries(tmp_path / "alone" / name)
        assert all(torch.equal(one.weights, own.weights) for one, own in zip(found, alone, strict=True))


def test_what_is_asked_twice_is_answered_once(tmp_path: Path) -> None:
    hills = Hills()
    together = run(hills, PENALTIES, tmp_path)
    different: set[bytes] = set()
    for found in together:
        different |= {one.weights.numpy().tobytes() for one in found}
    assert sum(hills.batches) == len(different) < sum(map(len, together))


def test_penalties_that_rank_alike_cost_nothing(tmp_path: Path) -> None:
    hills = Hills()
    run(hills, [0.0, 1e-9, 1e-8], tmp_path)
    assert hills.batches == [4, 1, 5, 5]


def dominated(one: Evaluation, others: Sequence[Evaluation]) -> bool:
    return any(
        other.unpenalised <= one.unpenalised and other.cost <= one.cost
        and (other.unpenalised, other.cost) != (one.unpenalised, one.cost)
        for other in others
    )  # fmt: skip


@pytest.mark.parametrize("task", [MOVIE, RATING], ids=lambda task: task.name)
def test_pareto_is_one_search_whose_deployed_points_nobody_dominates(tmp_path: Path, task) -> None:
    hills = Hills(opt_type="pareto", opt_budget=30)
    together = run(hills, PENALTIES, tmp_path, task=task)
    assert sum(hills.batches) == 4 + 1 + 30
    for penalty, found in zip(PENALTIES, together, strict=True):
        assert [one.weights.tolist() for one in found] == [one.weights.tolist() for one in together[0]]
        assert all(one.loss == pytest.approx(one.unpenalised + penalty * one.cost) for one in found)
        best = choose(found, SearchSettings())
        assert best.loss == min(one["loss"] for one in world.entries(tmp_path / f"{penalty:g}.jsonl"))
        assert penalty == 0 or not dominated(best, found)


def volume(found: Sequence[Evaluation]) -> float:
    """Area that the evaluations dominate below (0, 1), as (unpenalised, cost)."""
    area, lowest = 0.0, 1.0
    for loss, cost in sorted((one.unpenalised, one.cost) for one in found):
        area += max(0.0, -loss) * max(0.0, lowest - cost)
        lowest = min(lowest, cost)
    return area


def test_pareto_in_any_case_is_pareto_and_needs_a_resemblance(tmp_path: Path) -> None:
    one, other = (run(Hills(opt_type=name), PENALTIES, tmp_path / name) for name in ("pareto", "Pareto"))
    assert [[e.line() for e in found] for found in one] == [[e.line() for e in found] for found in other]
    pareto = SearchSettings(opt_type="Pareto")
    check_search(pareto, FitnessSettings())
    with pytest.raises(InputError, match="--opt_type Pareto: --objective nll knows no resemblance"):
        check_search(pareto, FitnessSettings(objective="nll"))


def test_a_named_baseline_is_deployed_whoever_else_may_win(tmp_path: Path) -> None:
    search = {"baseline": "best_sharer", "search_only": True}
    check_search(SearchSettings(**search), FitnessSettings())
    (found,) = run(Hills(**search), [0.1], tmp_path)
    assert choose(found, SearchSettings(**search)).origin == "sharer"


def test_pareto_covers_more_of_both_objectives_than_a_search_of_utility(tmp_path: Path) -> None:
    def mean_volume(opt_type: str) -> float:
        hills = [Hills(opt_type=opt_type, opt_budget=40) for _ in range(5)]
        return float(np.mean([volume(run(one, [0.0], tmp_path, seed)[0]) for seed, one in enumerate(hills)]))

    assert mean_volume("pareto") > mean_volume("cma")


def test_search_only_deploys_no_single_sharer(tmp_path: Path) -> None:
    (found,) = run(Hills(opt_budget=0, start="zero"), [0.0], tmp_path)
    assert choose(found, SearchSettings()).origin == "sharer"
    assert choose(found, SearchSettings(search_only=True)) is found[0]


def test_under_search_only_the_base_wins_with_a_smaller_loss_alone() -> None:
    def candidate(origin: str, loss: float) -> Evaluation:
        return Evaluation(torch.zeros(3), loss, 0.0, 0.0, loss, 0.0, origin)

    published = SearchSettings(search_only=True)
    tie = [candidate("base", 1.0), candidate("sharer", 0.5), candidate("search", 1.0)]
    assert choose(tie, published).origin == "search" and choose(tie, SearchSettings()).origin == "sharer"
    assert choose([*tie, candidate("search", 1.5)], published).loss == 1.0
    assert choose([candidate("base", 0.9), *tie[1:]], published).origin == "base"
    assert choose([tie[0], tie[2]], SearchSettings()).origin == "base"


@pytest.mark.parametrize("layers", [0, 2])
def test_baselines_are_choices_without_a_search(tmp_path: Path, layers: int) -> None:
    (found,) = run(Hills(layers=layers, baseline="best_sharer"), [0.1], tmp_path)
    assert [one.origin for one in found] == ["base", "sharer", "sharer", "sharer"]
    best = choose(found, SearchSettings(baseline="best_sharer"))
    assert best.unpenalised == min(one.unpenalised for one in found[1:])
    (found,) = run(Hills(layers=layers, baseline="uniform"), [0.1], tmp_path)
    assert [one.origin for one in found] == ["base", "sharer", "sharer", "sharer", "start"]
    average = choose(found, SearchSettings(baseline="uniform"))
    assert torch.equal(average.weights, torch.full_like(average.weights, 1 / 3))


# -- frontier.json --------------------------------------------------------------------------------------------------


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def made_up_run(folder: Path, penalty: float, weights: Sequence[list[float]], attacked: bool) -> None:
    """One finished user, who asked these candidates and deployed the last, with one right answer of two."""
    settings = {"stage": "lora_composition_evo", "method": "prime"}
    write_json(folder / "settings.json", settings | {"settings": {"task_name": MOVIE.name, "sim_penalty": penalty}})
    asked = [{"weights": own, "similarity": 0.1 * place} for place, own in enumerate(weights)]
    (folder / "users" / "user_7").mkdir(parents=True)
    lines = "".join(json.dumps(one) + "\n" for one in asked)
    (folder / "users" / "user_7" / "evaluations.jsonl").write_text(lines)
    right, wrong = ({"id": name, "output": "comedy"} for name in ("q1", "q2"))
    best = [right, {"id": "q2", "output": "action"}]
    predictions = {"prime": [right, wrong], "base": [wrong], "best_sharer": best, "uniform": [right, wrong]}
    result = {"user_id": "7", "index": 0, "sharers": ["a", "b"], "best_sharer": "b", "similarity": 0.7}
    told = {method: {"k0": answers} for method, answers in predictions.items()}
    write_json(folder / "users" / "user_7" / "result.json", result | {"predictions": told})
    if attacked:
        sets = {
            name: {"attacks": {"calibrated": {"auroc": interval(auroc), "blind_auroc": interval(0.5)}}}
            for name, auroc in (("published", 0.8), ("controlled", 0.6))
        }
        write_json(folder / "mia_summary.json", {"method": "prime", "sets": sets, "sharers": {"sets": {}}})


def test_frontier_json_has_a_point_for_each_penalty_and_baseline(tmp_path: Path) -> None:
    known = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    made_up_run(tmp_path / "evo" / "penalty-0.5", 0.5, [*known, [0.5, 0.5]], attacked=False)
    made_up_run(tmp_path / "evo" / "penalty-0", 0.0, [*known, [0.6, 0.4]], attacked=True)
    assert [path.name for path in penalty_runs(tmp_path / "evo")] == ["penalty-0", "penalty-0.5"]
    found = write_frontier(tmp_path / "evo", MOVIE, {"q1": "comedy", "q2": "action"})
    points = {one["label"]: one for one in found["points"]}
    labels = ["penalty 0", "penalty 0.5", "base", "best sharer (AUROC: of all sharers)", "uniform average"]
    assert list(points) == labels
    free, dear, base, best, uniform = points.values()
    assert base["auroc"] is None, "nobody attacked the untouched base; the blind baseline is the task-adapted one's"
    assert free["accuracy"]["mean"] == dear["accuracy"]["mean"] == 0.5 and best["accuracy"]["mean"] == 1.0
    assert (free["auroc"], free["controlled_auroc"]) == (interval(0.8), interval(0.6)) and dear["auroc"] is None
    assert free["similarity"]["mean"] == pytest.approx(0.7) and best["similarity"]["mean"] == pytest.approx(0.2)
    assert free["settings"]["sim_penalty"] == free["penalty"] == 0.0 and uniform["penalty"] is None
    assert found["evaluations"] == {"asked": 8, "shared": 3, "decoded": 5, "alone": 4}
    assert sharing_text(found["evaluations"]).endswith("1.25 times those of one penalty")
    assert "penalty 0.5" in frontier_table(found) and "0.600 [0.500, 0.700]" in frontier_table(found)
    stored = json.loads((tmp_path / "evo" / "frontier.json").read_text())
    assert stored["points"] == found["points"]
    assert stored["sentence"].startswith("From penalty 0 to 0.5 nothing changes: accuracy 0.500")
    assert (tmp_path / "evo" / "frontier.png").stat().st_size > 0 and (tmp_path / "evo" / "frontier.svg").exists()


def spoil(path: Path, text: str, other: str) -> None:
    whole = path.read_text()
    assert text in whole
    path.write_text(whole.replace(text, other))


@pytest.mark.parametrize(
    ("file", "text", "other", "told"),
    [
        ("settings.json", '"sim_penalty"', '"x"', "settings.sim_penalty is missing"),
        ("settings.json", '"sim_penalty": 0.5', '"sim_penalty": "0.5"', "sim_penalty is a text, expected a number"),
        ("users/user_7/result.json", '"best_sharer": "b"', '"best_sharer": "c"', "best_sharer is none of the sharers"),
        ("users/user_7/result.json", '"similarity"', '"x"', "similarity is missing"),
        ("users/user_7/evaluations.jsonl", '"weights"', '"x"', "line 1.weights is missing"),
        ("users/user_7/evaluations.jsonl", '{"weights": [0.0, 1.0], "similarity": 0.2}\n', "", "2 lines, expected"),
        ("mia_summary.json", '"attacks"', '"x"', "sets.'published'.attacks is missing"),
    ],
)
def test_a_strangers_frontier_is_refused_by_name(tmp_path: Path, file: str, text: str, other: str, told: str) -> None:
    for penalty in (0.0, 0.5):
        folder = tmp_path / "evo" / f"penalty-{penalty:g}"
        made_up_run(folder, penalty, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], attacked=True)
    spoil(tmp_path / "evo" / "penalty-0.5" / file, text, other)
    with pytest.raises(InputError, match=f"penalty-0.5/{file}.*{told}"):
        write_frontier(tmp_path / "evo", MOVIE, {"q1": "comedy", "q2": "action"})


def test_no_frontier_without_the_answers_predicted(tmp_path: Path) -> None:
    made_up_run(tmp_path / "evo" / "penalty-0", 0.0, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], attacked=False)
    data = tmp_path / "data"
    user = {"user_id": "7", "profile": [], "query": [{"id": "q1", "input": "x", "gold": ""}]}
    write_json(data / "test_100" / "user_test_100.json", [user])
    golds = [{"id": "q1", "output": "comedy"}]
    write_json(data / "test_100" / "user_test_100_label.json", {"task": MOVIE.lamp, "golds": golds})
    with pytest.raises(InputError, match="no gold for 1 predicted sample ids: q2"):
        options = ["--data_dir", str(data), "--output_dir", str(tmp_path / "evo")]
        postprocess.main(["--task_name", MOVIE.name, *options])


def test_weights_of_zero_deploy_the_base_however_they_were_found(tmp_path: Path) -> None:
    found = Evaluation(torch.zeros(2, 4), -1.0, 1.0, 0.5, -1.0, 0.0, "search")
    stage = Run(tmp_path, "lora_composition_evo", "prime", {})
    pool = Mock(sharers=lambda index: [User("a", ()), User("b", ())])
    settings = Mock(search=SearchSettings())
    work = lora_composition_evo.Stage(settings, Mock(), Mock(), pool, [stage])
    lora_composition_evo.deploy(work, stage, 0, User("7", ()), found, {})
    result = read_json(stage.result_path("7"))
    assert (result["deployed"], result["origin"]) == ("base", "search")
    assert not (stage.user_dir("7") / "adapter").exists()


def test_a_run_of_one_penalty_is_no_frontier(tmp_path: Path) -> None:
    made_up_run(tmp_path / "evo", 0.1, [[0.0, 0.0]], attacked=False)
    assert penalty_runs(tmp_path / "evo") == []
