"""Tiny models, adapters and a tokenizer made on the spot (no download), and the plain oracles beside them.

Weights are larger than the usual initialisation, so that adapters change logits by tenths, yet small enough that
rounding stays near 1e-6: a tolerance of 1e-5 then tells a wrong product from a different order of sums.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from prime.bank.encoding import EncodedRecord
from prime.bank.lora import Adapter
from prime.bank.train import clip_by_adapter

VOCAB = 97
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILIES: dict[str, tuple[Callable, dict]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),  # biases in q, k, v
    "gemma": (GemmaConfig, {"head_dim": 24, "pad_token_id": 0}),  # heads wider than hidden / heads, tied embeddings
}


def model(family: str = "llama", seed: int = 0, **changes: object) -> nn.Module:
    """A frozen-in-time causal LM: hidden 64, 2 layers, 4 heads over 2 key-value heads, vocabulary 97, fp32."""
    make, of_family = FAMILIES[family]
    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        causal_lm = AutoModel.from_config(make(**(settings | of_family | changes)), dtype=torch.float32).eval()
        for name, parameter in causal_lm.named_parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(4.0)
            elif name.endswith("bias"):
                parameter.data.normal_(0, 0.1)
    causal_lm.generation_config.pad_token_id = 0
    return causal_lm


def targets_of(base: nn.Module, targets: Sequence[str] = TARGETS) -> dict[str, nn.Linear]:
    """The plain linear layers that carry adapters, by name."""
    return {name: module for name, module in base.named_modules() if name.rsplit(".", 1)[-1] in targets}


def adapter(base: nn.Module, seed: int, rank: int = 4, scale: float = 1.0, size: float = 0.15) -> Adapter:
    """A random adapter on q, k, v, o of every layer."""
    stream = torch.Generator().manual_seed(1000 + seed)
    factors = {}
    for name, module in targets_of(base).items():
        a = torch.randn(rank, module.in_features, generator=stream) * size
        b = torch.randn(module.out_features, rank, generator=stream) * size
        factors[name] = (a, b)
    return Adapter(factors, scale)


def peft_model(base: nn.Module, lora: Adapter, dropout: float = 0.0) -> nn.Module:
    """PEFT's own model with this adapter's numbers copied in by hand; base is not touched."""
    alpha = lora.scale * lora.rank
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(TARGETS))
    wrapped = get_peft_model(copy.deepcopy(base), config)
    for name, (a, b) in lora.factors.items():
        module = wrapped.base_model.model.get_submodule(name)
        module.lora_A["default"].weight.data.copy_(a)
        module.lora_B["default"].weight.data.copy_(b)
    return wrapped.eval()


def dense_updates(lora: Adapter) -> dict[str, Tensor]:
    """scale * B @ A of every module, in fp64."""
    return {name: lora.scale * (b.double() @ a.double()) for name, (a, b) in lora.factors.items()}


def with_updates(base: nn.Module, updates: dict[str, Tensor]) -> nn.Module:
    """A copy of the base whose weights carry dense updates: an oracle without any low-rank arithmetic."""
    changed = copy.deepcopy(base)
    for name, update in updates.items():
        weight = changed.get_submodule(name).weight
        weight.data = (weight.data.double() + update).float()
    return changed


@torch.inference_mode()
def logits(owner: nn.Module, ids: Tensor) -> Tensor:
    return owner(input_ids=ids, use_cache=False).logits


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids `[rows, length]`, without the special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def text_ids(seed: int, low: int, high: int) -> tuple[int, ...]:
    """BOS and low to high random tokens."""
    rng = random.Random(seed)
    return (1, *(rng.randrange(3, VOCAB) for _ in range(rng.randint(low, high))))


def records(count: int, seed: int) -> list[EncodedRecord]:
    """Prompts of 3 to 12 tokens, targets of 1 to 4 and EOS."""
    made = []
    for i in range(count):
        target = (*text_ids(50 * seed + i, 1, 4)[1:], 2)
        made.append(EncodedRecord(f"r{i}", text_ids(100 * seed + i, 3, 12), target))
    return made


def textbook_loss(owner: nn.Module, batch: Sequence[EncodedRecord]) -> Tensor:
    """Pad right, mask attention, labels -100 on prompt and padding, mean over the batch's target tokens."""
    rows = [[*record.ids, *record.target] for record in batch]
    width = max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.full_like(padded, -100)
    for row, record in enumerate(batch):
        labels[row, len(record.ids) : len(rows[row])] = torch.tensor(record.target)
    predicted = owner(input_ids=padded, attention_mask=mask, use_cache=False).logits
    return cross_entropy(predicted[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@contextmanager
def noted_gradients() -> Iterator[list[list[Tensor]]]:
    """Copies of what training clips, by step and trained tensor."""
    noted: list[list[Tensor]] = []

    def note(parameters: list[Tensor], limit: float) -> Tensor:
        noted.append([parameter.grad.clone() for parameter in parameters])
        return clip_by_adapter(parameters, limit)

    with patch("prime.bank.train.clip_by_adapter", note):
        yield noted


@torch.inference_mode()
def naive_answer(
    owner: nn.Module, prompt: Sequence[int], limit: int, choose: Callable[[Tensor, int], int]
) -> tuple[int, ...]:
    """One row, one token at a time, no cache; `choose(logits [v], position) -> token`; EOS is not looked at."""
    tokens = list(prompt)
    for position in range(limit):
        tokens.append(choose(logits(owner, torch.tensor([tokens]))[0, -1], position))
    return tuple(tokens[len(prompt) :])


def until(answer: Sequence[int], eos: Sequence[int]) -> tuple[int, ...]:
    """The answer before its first EOS."""
    cut = next((i for i, token in enumerate(answer) if token in eos), len(answer))
    return tuple(answer[:cut])


SENTENCES = (
    "the science of a quiet film about a robot who learns to dance",
    "which tag fits the movie? the answer is science fiction",
    "which tag fits the movie? the answer is romance and comedy",
    "a true story of violence, social commentary and romance",
    "scientists and romantics answer the movie in a comedy of errors",
)


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE that does not split at spaces, so tokens reach over the border of prompt and target."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(SENTENCES, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )
