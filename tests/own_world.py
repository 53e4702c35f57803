"""A newcomer's files: a tiny model with a tokenizer of words, PEFT adapters made with PEFT, pairs and records."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# rank and modules of six adapters, as the people whom merge_adapters.py is for have them
SIX = [(4, ATTENTION), (8, ATTENTION), (16, ATTENTION), (4, MLP), (8, (*ATTENTION, *MLP)), (16, ("q_proj", "v_proj"))]


def write_model(folder: Path, hidden: int = 32) -> Path:
    words = {word: i for i, word in enumerate(["[UNK]", "[BOS]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    special = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    size = {"hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=2, initializer_range=0.3, **size))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return folder


def plain(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def write_adapter(model: Path, folder: Path, rank: int, modules: Sequence[str], seed: int, size: float = 0.3) -> Path:
    """By PEFT itself, with random numbers in both factors."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(plain(model), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, size / rank**0.5)
    wrapped.save_pretrained(folder)
    return folder


def six_adapters(root: Path, model: Path) -> list[str]:
    folders = []
    for place, (rank, modules) in enumerate(SIX):
        folders.append(str(write_adapter(model, root / f"adapter_{place}", rank, modules, seed=10 + place)))
    return folders


@torch.inference_mode()
def answer(owner: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, text: str, limit: int) -> str:
    """transformers' own greedy generation."""
    ids = tokenizer(text, return_tensors="pt")
    made = owner.generate(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], do_sample=False, max_new_tokens=limit
    )
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def sentence(stream: random.Random, words: int) -> str:
    return " ".join(stream.choice(WORDS) for _ in range(words))


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
