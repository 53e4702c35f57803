"""Checkpoints in Meta's format made on the spot, and an independent forward pass in Meta's layout to hold ours against.

Written from the papers (Su et al. 2021 on rotary embeddings, Touvron et al. 2023, Dubey et al. 2024): rotary pairs are
neighbouring entries of a head, turned as complex numbers.
"""

import base64
import json
import math
import random
import re
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from prime.bank.lora import Adapter

LLAMA2 = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA3 = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True,
}  # fmt: skip
HIDDEN = {"llama2": 192, "llama3": 224}  # worked out by hand: 170 -> 192; 170 * 1.3 = 221 -> 224
CUT_COLUMNS = ("attention.wo", "feed_forward.w2")
TEXT = "the movie café naïve robot 1234 3.14 don't we'll HELLO I'm über straße 日本 tag: sci-fi newline aaaa bbb hahaha"
WORDS = TEXT.split()


def weights(params: dict, vocab: int, hidden: int, tied: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Whole random weights under Meta's names, fp32, large enough that a misplaced row shows."""
    stream = torch.Generator().manual_seed(seed)
    d, kv = params["dim"], params.get("n_kv_heads", params["n_heads"]) * params["dim"] // params["n_heads"]
    shapes = {"tok_embeddings.weight": (vocab, d), "norm.weight": (d,)}
    shapes |= {} if tied else {"output.weight": (vocab, d)}
    for layer in range(params["n_layers"]):
        of_layer = {
            "attention.wq": (d, d), "attention.wk": (kv, d), "attention.wv": (kv, d), "attention.wo": (d, d),
            "feed_forward.w1": (hidden, d), "feed_forward.w2": (d, hidden), "feed_forward.w3": (hidden, d),
            "attention_norm": (d,), "ffn_norm": (d,),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    drawn = {name: torch.randn(shape, generator=stream) * 0.08 for name, shape in shapes.items()}
    return {name: 1 + tensor if tensor.dim() == 1 else tensor for name, tensor in drawn.items()}


def save(folder: Path, params: dict, whole: dict[str, Tensor], shards: int = 1, by_rows: bool = False) -> None:
    """params.json and consolidated.*.pth; Llama 2 cuts its embeddings by columns, Llama 3 by rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for place in range(shards):
        shard = {name: _part(name, tensor, place, shards, by_rows) for name, tensor in whole.items()}
        if "use_scaled_rope" not in params:
            shard["rope.freqs"] = torch.zeros(8)
        torch.save(shard, folder / f"consolidated.{place:02d}.pth")


def _part(name: str, tensor: Tensor, place: int, shards: int, by_rows: bool) -> Tensor:
    if tensor.dim() == 1:
        return tensor
    columns = any(part in name for part in CUT_COLUMNS) or (name.startswith("tok_embeddings") and not by_rows)
    return tensor.chunk(shards, dim=1 if columns else 0)[place].clone()


@torch.no_grad()
def forward(params: dict, whole: dict[str, Tensor], ids: Tensor, lora: dict[str, Tensor] | None = None) -> Tensor:
    """Logits `[b, t, v]` of the model in Meta's layout, with an adapter of scale 1 under published names."""
    eps, heads = params["norm_eps"], params["n_heads"]
    kv_heads = params.get("n_kv_heads", heads)
    b, t = ids.shape
    turn = rotations(params, t)
    x = whole["tok_embeddings.weight"][ids]
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}."
        h = norm(x, whole[at + "attention_norm.weight"], eps)
        q, k, v = (project(whole, lora, at, kind, h).view(b, t, -1, params["dim"] // heads) for kind in "qkv")
        q, k = rotate(q, turn), rotate(k, turn)
        k, v = (side.repeat_interleave(heads // kv_heads, dim=2) for side in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(b, t, -1)
        x = x + project(whole, lora, at, "o", mixed)
        h = norm(x, whole[at + "ffn_norm.weight"], eps)
        gate, up = (h @ whole[f"{at}feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (functional.silu(gate) * up) @ whole[at + "feed_forward.w2.weight"].T
    return norm(x, whole["norm.weight"], eps) @ whole.get("output.weight", whole["tok_embeddings.weight"]).T


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def project(whole: dict[str, Tensor], lora: dict[str, Tensor] | None, at: str, kind: str, x: Tensor) -> Tensor:
    out = x @ whole[f"{at}attention.w{kind}.weight"].T
    if lora is None:
        return out
    down, up = (lora[f"{at}attention.lora_w{kind}.lora_{side}.weight"] for side in ("down", "up"))
    return out + x @ down.T @ up.T


def rotations(params: dict, t: int) -> Tensor:
    """Unit complex numbers `[t, head_dim / 2]`, low frequencies slowed down as in Llama 3.1."""
    width = params["dim"] // params["n_heads"]
    speeds = [params.get("rope_theta", 10_000.0) ** (-2 * j / width) for j in range(width // 2)]
    if params.get("use_scaled_rope"):
        speeds = [slowed(speed, params.get("rope_scaling_factor", 8)) for speed in speeds]
    angle = torch.arange(t).double()[:, None] * torch.tensor(speeds, dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def slowed(speed: float, factor: float, low: float = 1, high: float = 4, context: int = 8192) -> float:
    turns = context * speed / (2 * math.pi)  # of this pair within the original context
    if turns > high:
        return speed
    if turns < low:
        return speed / factor
    part = (turns - low) / (high - low)
    return (1 - part) * speed / factor + part * speed


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turn[None, :, None, :]).reshape(x.shape)


def published_adapter(params: dict, rank: int = 8, seed: int = 7) -> dict[str, Tensor]:
    """A random adapter under the published names."""
    stream = torch.Generator().manual_seed(seed)
    d, kv = params["dim"], params.get("n_kv_heads", params["n_heads"]) * params["dim"] // params["n_heads"]
    tensors = {}
    for layer in range(params["n_layers"]):
        for kind in "qkvo":
            at, rows = f"layers.{layer}.attention.lora_w{kind}", kv if kind in "kv" else d
            tensors[f"{at}.lora_down.weight"] = torch.randn(rank, d, generator=stream) * 0.15
            tensors[f"{at}.lora_up.weight"] = torch.randn(rows, rank, generator=stream) * 0.15
    return tensors


def as_published(adapter: Adapter, heads: dict[str, int]) -> dict[str, Tensor]:
    """An adapter of scale 1 under the published names, rows of the rotated projections in Meta's order.

    Args:
        heads: number of heads of q and of k.
    """
    tensors = {}
    for module, (a, b) in adapter.factors.items():
        layer, kind = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj", module).groups()
        at = f"layers.{layer}.attention.lora_w{kind}"
        if kind in heads:
            halves = b.reshape(heads[kind], 2, -1, b.shape[1])
            b = halves.transpose(1, 2).reshape(b.shape)
        tensors |= {f"{at}.lora_down.weight": a, f"{at}.lora_up.weight": b}
    return tensors


# -- tokenizers -----------------------------------------------------------------------------------------------------


def corpus() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=12)) for _ in range(400)]


def save_sentencepiece(folder: Path) -> None:
    """tokenizer.model with the settings of Llama 2's: BPE, byte fallback, digits apart, the text as it is."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=400,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        add_dummy_prefix=True, allow_whitespace_only_pieces=True, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()


def save_tiktoken(folder: Path) -> dict[bytes, int]:
    """tokenizer.model in Llama 3's format; returns the ranks."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=letters, show_progress=False)
    inner.train_from_iterator(corpus(), trainer)
    # Byte-level BPE writes the byte b of chr(b) where that prints, and the others from chr(256) on.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    byte_of = {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}
    ranks = {bytes(map(byte_of.get, token)): rank for token, rank in inner.get_vocab().items()}
    by_rank = sorted(ranks, key=ranks.get)
    lines = [base64.b64encode(token) + b" %d\n" % ranks[token] for token in by_rank]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return ranks


LETTERS = [*"abehlmotrs AEI  \n\t0123456789.,!?'\"éüßñ日本😀👍🏽\u200d\u00a0\u2003\u0301\r\x00\x1c\x85ſ", *WORDS]
LETTERS += ["<s>", "</s>", "<unk>", "<0x41>", "<|begin_of_text|>", "<|eot_id|>", "'S", "'ll", "\u2581", "   ", "\n\n "]


def strings(n: int = 1000) -> list[str]:
    """Random texts with spaces, newlines, digits, accents, emoji, odd spaces and special tokens written out."""
    rng = random.Random(1)
    return ["".join(rng.choices(LETTERS, k=rng.randint(0, 40))) for _ in range(n)]
