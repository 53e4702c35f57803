"""Tiny models, adapters and a tokenizer made on the spot (no download), and the plain oracles beside them.

Weights are larger than the usual initialisation, so that adapters change logits by tenths, yet small enough that
rounding stays near 1e-6: a tolerance of 1e-5 then tells a wrong product from a different order of sums.
"""

import copy
import random
from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from prime.bank.lora import Adapter

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
    make, own = FAMILIES[family]
    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = AutoModel.from_config(make(**(settings | own | changes)), dtype=torch.float32).eval()
        for name, parameter in found.named_parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(4.0)
            elif name.endswith("bias"):
                parameter.data.normal_(0, 0.1)
    found.generation_config.pad_token_id = 0
    return found


def targets_of(base: nn.Module, targets: Sequence[str] = TARGETS) -> dict[str, nn.Linear]:
    """The plain linear layers that carry adapters, by name."""
    return {name: module for name, module in base.named_modules() if name.rsplit(".", 1)[-1] in targets}


def adapter(base: nn.Module, seed: int, rank: int = 4, scale: float = 1.0, size: float = 0.15) -> Adapter:
    """A random adapter on q, k, v, o of every layer."""
    stream = torch.Generator().manual_seed(1000 + seed)
    return Adapter(
        {
            name: (
                torch.randn(rank, module.in_features, generator=stream) * size,
                torch.randn(module.out_features, rank, generator=stream) * size,
            )
            for name, module in targets_of(base).items()
        },
        scale,
    )


def peft_model(base: nn.Module, own: Adapter, dropout: float = 0.0) -> nn.Module:
    """PEFT's own model with this adapter's numbers copied in by hand; base is not touched."""
    rank = own.rank
    config = LoraConfig(r=rank, lora_alpha=own.scale * rank, lora_dropout=dropout, target_modules=list(TARGETS))
    found = get_peft_model(copy.deepcopy(base), config)
    for name, (a, b) in own.factors.items():
        module = found.base_model.model.get_submodule(name)
        module.lora_A["default"].weight.data.copy_(a)
        module.lora_B["default"].weight.data.copy_(b)
    return found.eval()


def dense_updates(own: Adapter) -> dict[str, Tensor]:
    """scale * B @ A of every module, in fp64."""
    return {name: own.scale * (b.double() @ a.double()) for name, (a, b) in own.factors.items()}


def with_updates(base: nn.Module, updates: dict[str, Tensor]) -> nn.Module:
    """A copy of the base whose weights carry dense updates: an oracle without any low-rank arithmetic."""
    found = copy.deepcopy(base)
    for name, update in updates.items():
        weight = found.get_submodule(name).weight
        weight.data = (weight.data.double() + update).float()
    return found


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


@torch.inference_mode()
def naive_answer(
    owner: nn.Module, prompt: Sequence[int], limit: int, choose: Callable[[Tensor, int], int]
) -> tuple[int, ...]:
    """One row, one token at a time, no cache; `choose(logits [v], position) -> token`; EOS is not looked at."""
    found = list(prompt)
    for position in range(limit):
        found.append(choose(owner(input_ids=torch.tensor([found]), use_cache=False).logits[0, -1], position))
    return tuple(found[len(prompt) :])


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
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )
