"""A search that was cut off goes on only with the sharers, the task adapter and the model that it began with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import world

from prime.bank.bank import AdapterBank
from prime.bank.identity import SAMPLE, digest_of_tensors, model_identity
from prime.bank.lora import Adapter
from prime.checkpoints.loading import fold, load_model
from prime.engine import Engine, load_engine
from prime.merging.population import Population, Setup
from prime.runs.journal import Journal
from prime.settings import FitnessSettings, ModelSettings, PromptSettings, SamplingSettings, SearchSettings
from prime.users.data import User
from prime.users.tasks import get_task
from prime.users.templates import load_templates
from prime.users.texts import Texts
from tests import tiny

MODEL = ModelSettings(llama_model_path=str(world.DEMO / "model"))
PROMPTS = PromptSettings(max_length=512)
ENGINE = load_engine(MODEL, PROMPTS)
TASK = get_task("movie_tagging")
TEXTS = Texts(TASK, load_templates(None, TASK), None)
USER = User("7", tuple({"id": str(i), "description": f"a film about {i} robots", "tag": "comedy"} for i in range(2)))
SHARERS = [tiny.adapter(load_model(MODEL.llama_model_path), seed) for seed in range(2)]
WEIGHTS = torch.tensor([[0.0, 0.0], [0.5, 0.5]])


def asks(path: Path, adapters: list[Adapter], objective: str = "metric", engine: Engine = ENGINE) -> int:
    """How many questions of a search are computed, not answered by the journal at `path`."""
    engine.bank.load(adapters)
    fitness = FitnessSettings(objective=objective, train_gen_len=2)
    setup = Setup(SearchSettings(), fitness, SamplingSettings(temperature=0.0), 50, TEXTS, engine)
    journal = Journal(path)
    population = Population(setup, USER, 3, len(adapters), journal)
    before = journal.spared
    (population.logprobs if objective == "nll" else population.answers)(WEIGHTS)
    return int(journal.spared == before)


@pytest.mark.parametrize("objective", ["metric", "nll"])
def test_answers_of_other_sharers_are_not_believed(tmp_path: Path, objective: str) -> None:
    path = tmp_path / "j.jsonl"
    assert asks(path, SHARERS, objective) == 1 and asks(path, SHARERS, objective) == 0
    retrained = dict(SHARERS[1].factors)
    name, (a, b) = next(iter(retrained.items()))
    retrained[name] = a, b + 1e-4 * (torch.arange(b.numel()).reshape(b.shape) == 5)
    assert asks(path, [SHARERS[0], Adapter(retrained, SHARERS[1].scale)], objective) == 1
    assert asks(path, [SHARERS[0], replace(SHARERS[1], scale=0.5)], objective) == 1
    assert asks(path, SHARERS[::-1], objective) == 1


def test_answers_of_another_model_or_task_adapter_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    assert asks(path, SHARERS) == 1
    again, other = load_engine(MODEL, PROMPTS), load_engine(MODEL, PROMPTS)
    assert asks(path, SHARERS, engine=again) == 0
    next(iter(other.bank.wrappers.values())).base.weight.data[3, 5] += 1e-4
    assert asks(path, SHARERS, engine=other) == 1


def test_a_task_adapter_changes_the_models_identity() -> None:
    adapted = tiny.model()
    fold(adapted, tiny.adapter(tiny.model(), 3), "task")
    plain, again, other = (model_identity(AdapterBank(model)) for model in (tiny.model(), tiny.model(), adapted))
    assert plain == again != other


def test_all_of_a_small_tensor_and_much_of_a_large_one_is_looked_at() -> None:
    """A digest does not depend on how a tensor lies in memory; another name, type or shape is another tensor."""
    small, large = torch.randn(40, 30), torch.zeros(3, SAMPLE)
    assert digest_of_tensors([("x", small)]) == digest_of_tensors([("x", small.t().contiguous().t())])
    found = {
        digest_of_tensors([("x", small)]),
        digest_of_tensors([("y", small)]),
        digest_of_tensors([("x", small.reshape(30, 40))]),
    }
    found |= {digest_of_tensors([("x", small.double())]), digest_of_tensors([("x", small.bfloat16())])}
    for place in range(0, 1200, 61):
        changed = small.clone()
        changed.view(-1)[place] += 1
        found.add(digest_of_tensors([("x", changed)]))
    assert len(found) == 25
    assert digest_of_tensors([("x", large)]) != digest_of_tensors([("x", large + 1)])
