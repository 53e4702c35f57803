"""The whole pipeline on a checkpoint of another family, Mistral, made here with the demo's tokenizer."""

import shutil
from pathlib import Path

import pytest
import world
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prime.checkpoint import load_tokenizer
from prime.lora import load_adapter
from tests import tiny

TASK = "movie_tagging"
QUICK = {
    "task_lora.py": ["--epochs", "1", "--k_list", ""],
    "history_anchor.py": ["--encoder", world.CHECKPOINT, "--k", "4"],
    "train_anchor_peft.py": ["--epochs", "1", "--recent_k", "11", "--gradient_checkpointing"],
    "lora_composition_evo.py": [
        "--k_list", "", "--opt_budget", "2", "--n_sim", "2", "--recent_k", "2", "--export_full"
    ],
    "mia.py": ["--recent_k", "11", "--max_records", "2", "--skip_sharers"],
}  # fmt: skip


def commands() -> list[list[str]]:
    """The announcement's first command of each stage, made quick, and the table."""
    found = []
    for name, more in QUICK.items():
        found.append([*next(words for words in world.announcement() if words[0] == name), *more])
    return [*found, ["postprocess.py", "--task_name", TASK, "--output_dir", f"./output/{TASK}/LoRA-Composition-evo"]]


def build(folder: Path, family: str) -> None:
    """The small world, and a random model of the family in the demo model's place."""
    world.build(folder, test_users=2, anchors=4)
    checkpoint = folder / world.CHECKPOINT
    size = load_tokenizer(str(checkpoint)).vocab_size
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (checkpoint / name).unlink(missing_ok=True)
    made = tiny.model(family, vocab_size=size, max_position_embeddings=4096)
    made.save_pretrained(folder / "made")
    for path in (folder / "made").iterdir():
        shutil.copy(path, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral"])
def test_all_stages(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, family)
    monkeypatch.chdir(tmp_path)
    for words in commands():
        world.run(words)
    rows = world.read(tmp_path / f"output/{TASK}/summary.json")["rows"]
    assert {row["method"] for row in rows} >= {"base", "task_lora", "best_sharer", "uniform", "prime"}
    mia = world.read(tmp_path / f"output/{TASK}/LoRA-Composition-evo/mia_results.json")
    assert len(mia) == 2 and all(entry["member_loss"] for entry in mia.values())
    full = next(tmp_path.glob(f"output/{TASK}/LoRA-Composition-evo/users/*/adapter_full"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / world.CHECKPOINT)
    assert base.config.model_type == family
    loaded = PeftModel.from_pretrained(base, full)
    assert len(load_adapter(full).factors) == 8 == sum("lora_A" in name for name, _ in loaded.named_parameters())
