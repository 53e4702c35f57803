"""Models, adapters and work that the benchmarks share: shapes by name, rows with answers of prescribed length.

Reads   data/demo/model for the shape `demo`; the other shapes are random weights
Writes  nothing, but for `model_dir` and `encoder_dir`

The models' own answers would be noise with random weights, so a script fixes them: every contender computes its
logits in full, and the token it then takes is the scripted one (`prime`'s sampler and Hugging Face's logits processor
are told alike, see `benchmarks/contenders.py`). How often a script repeats an answer known before decides how much
drafts help; the shares were measured on the trained demo.

Shapes: `c` candidates, `p` prompts.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DebertaV2Config, LlamaConfig, PreTrainedConfig

from prime.bank.bank import DEFAULT_TARGETS
from prime.bank.batching import Pair
from prime.bank.encoding import Tokens
from prime.bank.lora import Adapter
from prime.checkpoints.loading import load_model, model_config, pick_device, pick_dtype
from prime.seeds import derive_seed

ROOT = Path(__file__).resolve().parent.parent
PAD, BOS, EOS = 0, 1, 2

# Llama's width, layers, heads, key-value heads, feed-forward width, vocabulary, tied embeddings.
SHAPES = {
    "tiny": (64, 2, 4, 2, 96, 2048, False),
    "30m": (512, 8, 8, 8, 1376, 4000, False),
    "135m": (576, 30, 9, 3, 1536, 49_152, True),  # SmolLM2's
    "llama-3.2-3b": (3072, 28, 24, 8, 8192, 128_256, True),
    "llama-2-7b": (4096, 32, 32, 32, 11_008, 32_000, False),
}
DEMO = "demo"
DEMO_MODEL = ROOT / "data/demo/model"


class Shares(NamedTuple):
    """How answers relate to the drafts at hand when they are decoded, as shares of rows (the last: of tokens)."""

    accepted: float  # the answer is the most frequent known one, the first draft that is tried
    known: float  # the answer is another known one
    agreed: float  # of a new answer's tokens, those that its first draft begins with


class Kind(NamedTuple):
    """A workload: tokens of an answer, the cap on new tokens, shares for base and sharers, then for the search."""

    low: int
    high: int
    cap: int
    points: Shares
    search: Shares


# The shares are those of `python benchmarks/draft_shares.py --users 8` (trained demo, seed 0): movie_tagging for tag,
# news_headline for title. The cap of a labelled task is one more than its longest label, else --max_gen_len's 100.
WORKLOADS = {
    "tag": Kind(1, 5, 6, Shares(0.525, 0.0, 0.0), Shares(0.556, 0.307, 0.021)),
    "title": Kind(12, 25, 100, Shares(0.001, 0.0, 0.054), Shares(0.025, 0.185, 0.053)),
}
SHARED_TOKENS = 60
OWN_TOKENS = (60, 200)
GENERATION = 5  # population of CMA for 3 weights


@dataclass(frozen=True)
class Work:
    """Rows of one user: prompts, and a scripted answer for each candidate."""

    prompts: list[Tokens]
    golds: list[Tokens]  # the history's own answers, the first drafts
    answers: dict[Pair, Tokens]  # by (candidate, prompt), without EOS
    phases: list[range]  # candidates that are decoded together: base and sharers, then generations
    cap: int  # new tokens at most

    @property
    def pairs(self) -> list[Pair]:
        return list(self.answers)

    @property
    def candidates(self) -> range:
        return range(self.phases[-1].stop)

    def first(self, candidates: int, prompts: int) -> "Work":
        """The part of the work with the first candidates and prompts."""
        phases = [range(phase.start, min(phase.stop, candidates)) for phase in self.phases if phase.start < candidates]
        kept = {pair: answer for pair, answer in self.answers.items() if pair[0] < candidates and pair[1] < prompts}
        return Work(self.prompts[:prompts], self.golds[:prompts], kept, phases, self.cap)

    def tokens(self) -> dict[str, int]:
        """Prompt and answer tokens of all rows, and the distinct ones: the shared prefix once per candidate."""
        answers = sum(len(answer) + 1 for answer in self.answers.values())
        total = sum(len(self.prompts[prompt]) for _, prompt in self.answers) + answers
        repeated = (len(self.answers) - len(self.candidates)) * shared_length(self.prompts)
        return {"total": total, "distinct": total - repeated, "answers": answers}


def shared_length(prompts: Sequence[Tokens]) -> int:
    """Tokens that all prompts begin with."""
    columns = zip(*prompts, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, prompts)))


def make_work(
    kind: Kind, vocabulary: int, prompts: int, n_sim: int, budget: int, seed: int, own: tuple[int, int] = OWN_TOKENS
) -> Work:
    """One user's prompts with scripted answers: base and n sharers, then the search by generations."""
    rng = random.Random(derive_seed("work", seed))
    shared = (BOS, *some_tokens(rng, vocabulary, SHARED_TOKENS - 1))
    texts = [shared + some_tokens(rng, vocabulary, rng.randint(*own)) for _ in range(prompts)]
    golds = [new_answer(rng, kind, vocabulary) for _ in texts]
    last = 1 + n_sim + budget
    starts = [0, *range(1 + n_sim, last, GENERATION)]
    phases = [range(start, stop) for start, stop in zip(starts, [*starts[1:], last], strict=True)]
    return Work(texts, golds, scripted(rng, kind, vocabulary, golds, phases), phases, kind.cap)


def some_tokens(rng: random.Random, vocabulary: int, count: int) -> Tokens:
    return tuple(rng.randrange(EOS + 1, vocabulary) for _ in range(count))


def new_answer(rng: random.Random, kind: Kind, vocabulary: int) -> Tokens:
    return some_tokens(rng, vocabulary, rng.randint(kind.low, kind.high))


def scripted(
    rng: random.Random, kind: Kind, vocabulary: int, golds: Sequence[Tokens], phases: Sequence[range]
) -> dict[Pair, Tokens]:
    """Answers that repeat what is known before their phase as often as the kind's shares say."""
    drafts = [[gold] for gold in golds]
    answers: dict[Pair, Tokens] = {}
    for number, phase in enumerate(phases):
        shares = kind.search if number else kind.points
        ranked = [by_frequency(known) for known in drafts]
        for candidate, (prompt, known) in product(phase, enumerate(ranked)):
            answers[candidate, prompt] = scripted_answer(rng, kind, vocabulary, known, shares)
            drafts[prompt].append(answers[candidate, prompt])
    return answers


def by_frequency(known: Sequence[Tokens]) -> list[Tokens]:
    """Distinct answers, the most frequent first; ties as they came."""
    return [answer for answer, _ in Counter(known).most_common()]


def scripted_answer(rng: random.Random, kind: Kind, vocabulary: int, known: Sequence[Tokens], shares: Shares) -> Tokens:
    drawn = rng.random()
    if drawn < shares.accepted:
        return known[0]
    if drawn < shares.accepted + shares.known and len(known) > 1:
        return rng.choice(known[1:])
    new = new_answer(rng, kind, vocabulary)
    same = min(int(shares.agreed * len(new) + rng.random()), len(known[0]), len(new) - 1)
    return known[0][:same] + new[same:]


# -- models and adapters --------------------------------------------------------------------------------------------


def config_of(shape: str) -> PreTrainedConfig:
    """The configuration of the named shape."""
    if shape == DEMO:
        return model_config(str(DEMO_MODEL), torch.float32)
    width, layers, heads, kv_heads, inner, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=4096,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip


def make_model(shape: str, device: str, dtype: str) -> nn.Module:
    """A frozen causal LM of the named shape, random weights but for `demo`."""
    if shape == DEMO:
        return load_model(str(DEMO_MODEL), device, dtype)
    place = pick_device(device)
    torch.manual_seed(0)
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=pick_dtype(dtype, place))
    return model.requires_grad_(False).eval()


def model_dir(shape: str, folder: Path, device: str, dtype: str) -> Path:
    """The shape as a directory that stages load, with the demo's tokenizer: written into `folder` once."""
    if shape == DEMO:
        return DEMO_MODEL
    return _written(folder / "model", lambda: make_model(shape, device, dtype))


def encoder_dir(folder: Path) -> Path:
    """Random weights of the shape of DeBERTa-v3-large, the published encoder of stage 2, written into `folder` once."""
    config = DebertaV2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, relative_attention=True,
        position_buckets=256, pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
        position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    return _written(folder / "encoder", lambda: AutoModel.from_config(config))


def _written(target: Path, make: Callable[[], nn.Module]) -> Path:
    """A directory of the model and the demo's tokenizer; an interrupted one is made again."""
    if not target.exists():
        part = target.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        model: Any = make()
        model.save_pretrained(part)
        for file in DEMO_MODEL.glob("tokenizer*"):
            shutil.copy(file, part)
        part.rename(target)
        del model
        torch.cuda.empty_cache()
    return target


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that carry adapters, by name."""
    return {name: m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in DEFAULT_TARGETS}


def random_adapter(model: nn.Module, seed: int, rank: int = 8) -> Adapter:
    """An adapter as training leaves one: A at its initial spread, B no longer zero."""
    stream = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: (
                (torch.rand(rank, module.in_features, generator=stream) * 2 - 1) / module.in_features**0.5,
                torch.randn(module.out_features, rank, generator=stream) * 0.02,
            )
            for name, module in targets(model).items()
        }
    )


def random_weights(n_sim: int, budget: int, seed: int) -> torch.Tensor:
    """Weights of all candidates `[c, n]`: the base, the single sharers, then points of the search's box."""
    stream = torch.Generator().manual_seed(seed)
    points = (torch.rand(budget, n_sim, generator=stream) * 2 - 1) * 1.5
    return torch.cat([torch.zeros(1, n_sim), torch.eye(n_sim), points])


def linear_flops(model: nn.Module, tokens: int, predicted: int) -> float:
    """Operations of the base's matrix products: all layers for each token, the output layer where one is predicted."""
    inner = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    per_token = 2 * sum(module.weight.numel() for module in inner)
    return float(per_token) * tokens + 2.0 * model.config.hidden_size * model.config.vocab_size * predicted
