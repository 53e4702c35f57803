"""The whole pipeline on checkpoints of other families, made here: Mistral, Qwen, Gemma, each with its own tokenizer.

transformers chooses a tokenizer's class by the model's family as well as by the tokenizer's files (those of the demo's
Llama tokenizer beside a Qwen model are read as byte-level pieces), so each family gets one of its own class.
"""

import json
import shutil
from pathlib import Path

import pytest
import world
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GemmaTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from prime.checkpoints.loading import load_tokenizer
from prime.checkpoints.peft import load_adapter
from tests import tiny

TASK = "movie_tagging"
TOKENIZERS = {"mistral": "TokenizersBackend", "qwen2": "Qwen2Tokenizer", "gemma": "GemmaTokenizer"}
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


Pieces = tuple[dict[str, int], list[tuple[str, ...]]]


def pieces_of(text: str) -> Pieces:
    """Vocabulary and merges of a tokenizer.json."""
    own = json.loads(text)["model"]
    return own["vocab"], [tuple(merge) for merge in own["merges"]]


def byte_pieces(texts: list[str]) -> Pieces:
    """Vocabulary and merges of a byte-level BPE, as Qwen has, trained on these texts."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=every_byte, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return pieces_of(inner.to_str())


def family_tokenizer(family: str, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer of the family's class for the small world below `folder`."""
    checkpoint = folder / world.CHECKPOINT
    if family == "gemma":
        pieces = pieces_of((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
        return GemmaTokenizer(*pieces, bos_token="<s>", eos_token="</s>")
    if family == "qwen2":
        users = world.read(folder / "data" / TASK / "user_anchor_candidate.json")
        return Qwen2Tokenizer(*byte_pieces([item["description"] for user in users for item in user["profile"]]))
    return load_tokenizer(str(checkpoint))


def build(folder: Path, family: str) -> None:
    """The small world, and tokenizer and random model of the family in the demo model's place."""
    world.build(folder, test_users=2, anchors=4)
    tokenizer, checkpoint = family_tokenizer(family, folder), folder / world.CHECKPOINT
    shutil.rmtree(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    own = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    tiny.model(family, vocab_size=len(tokenizer), max_position_embeddings=4096, **own).save_pretrained(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("family", TOKENIZERS)
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
    assert base.config.model_type == family and type(load_tokenizer(world.CHECKPOINT)).__name__ == TOKENIZERS[family]
    loaded = PeftModel.from_pretrained(base, full)
    assert len(load_adapter(full).factors) == 8 == sum("lora_A" in name for name, _ in loaded.named_parameters())
