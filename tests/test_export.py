"""Adapters that leave the toolkit: PEFT on the downloaded and on the task-adapted base equals our own evaluation."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from prime.bank.bank import AdapterBank
from prime.bank.lora import Adapter
from prime.checkpoints.loading import load_model
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.merging.deploy import add_attacks, export_full, save_personal
from prime.runs.run import Run
from prime.settings import ModelSettings

IDS = tiny.ids(3, 12)


class User:
    def __init__(self, user_id: str):
        self.user_id = user_id


@pytest.fixture
def model(tmp_path: Path) -> ModelSettings:
    """A base and a task adapter on disk, and the settings of a stage that exports."""
    base = tiny.model()
    base.save_pretrained(tmp_path / "base")
    save_adapter(tiny.adapter(base, 0, scale=0.5), tmp_path / "task", "base")
    return ModelSettings(
        llama_model_path=str(tmp_path / "base"), lora_ckpt=str(tmp_path / "task" / "lora_ckpt.pt")
    )


def exported(model: ModelSettings, folder: Path, deployed: bool) -> tuple[Run, Adapter]:
    """A finished user with a personal adapter of another rank and scale, or without one; then --export_full."""
    run = Run(folder, "lora_composition_evo", "prime", {"task_name": "movie_tagging", "seed": 3})
    personal = tiny.adapter(tiny.model(), 1, rank=6, scale=1.5)
    result = {"user_id": "u1", "sharers": ["a", "b"], "weights": [0.5, -0.25], "rule": "delta", "utility": 0.75}
    if deployed:
        save_personal(model, run, personal, result)
    run.finish("u1", result | {"index": 0, "predictions": {}, "seconds": {}})
    export_full(model, run, [User("u1"), User("not finished")])
    return run, personal


def peft_logits(base: nn.Module, folder: Path) -> torch.Tensor:
    return tiny.logits(PeftModel.from_pretrained(base, folder).eval(), IDS)


def own_logits(model: ModelSettings, personal: Adapter) -> torch.Tensor:
    bank = AdapterBank(load_model(model.llama_model_path, "cpu", task_adapter=model.lora_ckpt))
    bank.load([personal])
    with bank.routed([0] * len(IDS)):
        return tiny.logits(bank.model, IDS)


def test_both_adapters_are_our_own_evaluation(model: ModelSettings, tmp_path: Path) -> None:
    run, personal = exported(model, tmp_path / "run", deployed=True)
    expected, folder = own_logits(model, personal), run.user_dir("u1")
    untouched = AutoModelForCausalLM.from_pretrained(model.llama_model_path, dtype=torch.float32)
    assert (expected - tiny.logits(untouched, IDS)).abs().max() > 0.1
    adapted = load_model(model.llama_model_path, "cpu", task_adapter=model.lora_ckpt)
    assert (peft_logits(adapted, folder / "adapter") - expected).abs().max() < 1e-5
    assert (peft_logits(untouched, folder / "adapter_full") - expected).abs().max() < 1e-5
    assert load_adapter(folder / "adapter_full").rank == 4 + 6
    assert not run.user_dir("not finished").exists()


def test_where_the_base_is_deployed_the_task_adapter_is_exported(model: ModelSettings, tmp_path: Path) -> None:
    run, _ = exported(model, tmp_path / "run", deployed=False)
    untouched = AutoModelForCausalLM.from_pretrained(model.llama_model_path, dtype=torch.float32)
    adapted = load_model(model.llama_model_path, "cpu", task_adapter=model.lora_ckpt)
    assert (peft_logits(untouched, run.user_dir("u1") / "adapter_full") - tiny.logits(adapted, IDS)).abs().max() < 1e-5
    assert not (run.user_dir("u1") / "adapter").exists()


def test_cards_say_what_the_adapters_are(model: ModelSettings, tmp_path: Path) -> None:
    run, _ = exported(model, tmp_path / "run", deployed=True)
    add_attacks(run.root, {"u1": {"loss": {"auroc": 0.7, "blind": 0.5}}, "u2": {}})
    for name, base in (("adapter", model.adapted_base), ("adapter_full", model.llama_model_path)):
        folder = run.user_dir("u1") / name
        card = json.loads((folder / "card.json").read_text())
        assert card["base_model"] == base
        assert (card["task"], card["task_adapter"]) == ("movie_tagging", model.lora_ckpt)
        assert card["utility"] == 0.75 and not {"sharers", "weights"} & card.keys()  # they stay in result.json
        assert card["settings"]["seed"] == 3 and card["versions"]["torch"] == str(torch.__version__)
        assert card["attack"]["loss"]["auroc"] == 0.7 and "predictions" not in card
        text = (folder / "README.md").read_text()
        assert f'base_model: "{base}"\n' in text and "| auroc" not in text
        assert "## attack" in text and "## settings" in text and "-0.25" not in text


def test_by_its_own_configuration_an_adapter_loads_what_was_measured_or_nothing(
    model: ModelSettings, tmp_path: Path
) -> None:
    """AutoPeftModel loads the base that adapter_config.json names."""
    run, personal = exported(model, tmp_path / "run", deployed=True)
    expected, folder = own_logits(model, personal), run.user_dir("u1")
    auto = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter_full", dtype=torch.float32).eval()
    assert (tiny.logits(auto, IDS) - expected).abs().max() < 1e-5
    with pytest.raises((OSError, ValueError), match=r"base \+ .*task"):
        AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32)


def test_an_export_is_made_once(model: ModelSettings, tmp_path: Path) -> None:
    run, _ = exported(model, tmp_path / "run", deployed=True)
    file = run.user_dir("u1") / "adapter_full" / "adapter_model.safetensors"
    before = file.stat().st_mtime_ns
    export_full(model, run, [User("u1")])
    assert file.stat().st_mtime_ns == before
