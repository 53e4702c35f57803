"""One model on several devices: hooks and offloading change no number, and two GPUs without data are never mixed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from torch import nn

from prime.bank.bank import AdapterBank
from prime.bank.batching import every_pair
from prime.bank.decode import Request, decode
from prime.bank.logprobs import target_logprobs
from prime.bank.sampling import Sampler
from prime.checkpoints import placement
from prime.checkpoints.loading import load_model
from prime.checkpoints.peft import save_adapter
from prime.errors import InputError
from prime.merging.gates import Gates, compose
from tests import meta_world, tiny
from tests.pretended import KIND, PARTS, RECORDS

BASE = tiny.model()
WITH_DISK = dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk", "lm_head": "disk"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, and a task adapter in it."""
    folder = tmp_path_factory.mktemp("model")
    BASE.save_pretrained(folder)
    save_adapter(tiny.adapter(BASE, 9), folder / "task", "base")
    return folder


def written(folder: Path, found: Any) -> str:
    world.write(folder / "map.json", found)
    return str(folder / "map.json")


def filled(model: nn.Module) -> AdapterBank:
    bank = AdapterBank(model)
    bank.load([tiny.adapter(BASE, seed) for seed in range(3)])
    return bank


def found_by(model: nn.Module) -> list[Any]:
    """Answers, log-probabilities of merged adapters beside the base, and a composed adapter."""
    bank = filled(model)
    gates = Gates(bank, [{name: torch.ones(64) * (1 + place) for name in bank.wrappers} for place in range(3)])
    composed = compose(bank, gates, [RECORDS[:3], RECORDS[3:]], 2, 0.5)
    own = bank.adapter(0).factors
    bank.load([tiny.adapter(BASE, seed) for seed in range(3)])
    bank.combine(torch.tensor([[0.5, 0.3, -0.2], [1.0, 0.0, 0.0]]), "delta")
    pairs = every_pair([-1, 0, 1], len(RECORDS))
    answers = decode(bank, Request(RECORDS, pairs, Sampler(0.7), 6), [2])
    return [answers, target_logprobs(bank, RECORDS, pairs), composed, own]


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# -- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [WITH_DISK, dict.fromkeys(PARTS, "disk"), "auto"])
def test_a_dispatched_model_gives_the_same_numbers(saved: Path, tmp_path: Path, parts: Any) -> None:
    """Layers behind hooks, on disk, with the task adapter folded in."""
    own = (str(saved), "cpu", "auto", str(saved / "task"))
    parted: Any = load_model(*own, device_map=parts if isinstance(parts, str) else written(tmp_path, parts))
    on_disk = {"cpu"} if parts == "auto" else {"meta"}
    assert {p.device.type for p in parted.model.layers[1].parameters()} == on_disk
    assert_same(found_by(parted), found_by(load_model(*own)))


def test_a_meta_directory_is_dispatched_too(tmp_path: Path) -> None:
    params = meta_world.LLAMA3
    meta_world.save(tmp_path, params, meta_world.weights(params, 97, meta_world.HIDDEN["llama3"]))
    plain: Any = load_model(str(tmp_path), "cpu")
    names = [name for name, _ in plain.model.named_children() if name != "layers"]
    layers = [f"model.layers.{place}" for place in range(len(plain.model.layers))]
    parts = dict.fromkeys([*(f"model.{name}" for name in names), *layers, "lm_head"], "cpu")
    parted = load_model(str(tmp_path), "cpu", device_map=written(tmp_path, parts | {layers[-1]: "disk"}))
    ids = torch.randint(3, plain.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tiny.logits(parted, ids), tiny.logits(plain, ids))


@pytest.mark.slow
def test_factors_and_cache_are_where_their_layer_is() -> None:
    """Scoring, composing and decoding on two pretended devices: an operation across them would be an error."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretended"], cwd=world.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ends"] == [f"{KIND}:0"] * 2  # of ids and of logits
    assert found["factors"] == found["cache"] == [f"{layer} {KIND}:{layer}" for layer in range(2)]


# -- which part goes where ------------------------------------------------------------------------------------------


def two_gpus(monkeypatch: pytest.MonkeyPatch, share: float, strategy: str) -> tuple[nn.Module, dict[str, int | str]]:
    """What accelerate makes of two GPUs that each have room for this share of a model with four layers."""
    model = tiny.model(num_hidden_layers=4)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = {0: int(share * size), 1: int(share * size), "cpu": 2**30}
    monkeypatch.setattr(placement, "get_max_memory", lambda: dict(memory))
    return model, placement.planned(model, strategy, torch.device("cuda"))


@pytest.mark.parametrize("strategy", ["auto", "balanced", "sequential"])
def test_strategies_part_between_layers(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    model, found = two_gpus(monkeypatch, 0.8, strategy)
    assert set(found.values()) == {0, 1}
    assert not any(".self_attn" in name or ".mlp" in name for name in found)
    placement._check(found, model)  # every tensor has its place


def test_what_no_gpu_has_room_for_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(two_gpus(monkeypatch, 0.4, "auto")[1].values()) == {0, 1, "cpu"}


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, told",
    [
        ({**WITH_DISK, "model.layers.7": "cpu"}, "the model has no module model.layers.7"),
        ({"model": "cpu"}, "does not give any device for the following parameters: lm_head"),
        ({"": "disk"}, "the whole model cannot go to disk"),
        ({"": 99}, "no device 99 here"),
        ({"": "moon", "lm_head": True}, "no device 'moon' here\n.*lm_head: no device True here"),
        (["cpu"], "expected an object, module to device; found list"),
    ],
)
def test_a_map_that_does_not_fit(saved: Path, tmp_path: Path, wanted: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_model(str(saved), "cpu", device_map=written(tmp_path, wanted))


def test_neither_a_strategy_nor_a_file(saved: Path) -> None:
    with pytest.raises(InputError, match="none of auto, balanced, balanced_low_0, sequential, and no JSON file"):
        load_model(str(saved), "cpu", device_map="automatic")


def test_several_processes_refuse(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="one process uses all devices"):
        load_model(str(saved), "cpu", device_map="auto")


WORDS = ["--task_name", "movie_tagging", "--llama_model_path", "m", "--lora_ckpt", "t", "--device_map", "auto"]


@pytest.mark.parametrize("stage", ["train_anchor_peft", "train_anchor_gate"])
def test_training_stages_refuse(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        world.parser(stage).parse_args(WORDS)
    assert stopped.value.code == 2
    assert "a stage that trains keeps its model on one device" in capsys.readouterr().err
