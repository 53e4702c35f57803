"""Those who answer the rows of a `Work`: the bank, PEFT in three ways, and plain forward passes as the limit.

All who answer are scripted by the same `Script`: it reads the largest of the logits they computed, keeps it for
comparison, and gives the scripted token back. So each pays its own machinery in full, EOS handling included, and a
comparison of two results' `tops` tells whether they computed the same logits at every place of every answer.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product, takewhile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.shapes import EOS, PAD, Work, shared_length
from prime.bank.bank import DEFAULT_TARGETS, AdapterBank
from prime.bank.batching import Pair
from prime.bank.cpu import quicken, restore
from prime.bank.decode import Counts, Request, decode
from prime.bank.encoding import EncodedPrompt, Tokens
from prime.bank.lora import Adapter
from prime.bank.sampling import Sampler

BATCH = 8  # rows of the PEFT contenders' batches, as published
PUBLISHED_TOKENS = 100  # new tokens of every answer in the published procedure

Answers = dict[Pair, Tokens]


class Script:
    """Scripted answers of all rows `[c * p, longest + 2]`, EOS behind them, and the logits met on the way."""

    def __init__(self, work: Work, device: torch.device):
        self.prompts = len(work.prompts)
        self.lengths = torch.full((len(work.candidates) * self.prompts,), -1)
        longest = max(map(len, work.answers.values()))
        table = torch.full((len(self.lengths), longest + 2), EOS)
        for pair, answer in work.answers.items():
            table[self.row(pair), : len(answer)] = torch.tensor(answer)
            self.lengths[self.row(pair)] = len(answer)
        self.table = table.to(device)
        self.tops = torch.full(table.shape, torch.nan, device=device)

    def row(self, pair: Pair) -> int:
        return pair[0] * self.prompts + pair[1]

    def take(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Scripted tokens `[m]` in place of the best of the logits `[m, v]`, which are noted."""
        places = positions.clamp(max=self.table.shape[1] - 1)
        self.tops[rows, places] = logits.max(-1).values.float()
        return self.table[rows, places]

    def noted(self) -> Tensor:
        """The largest logits at all places of all answers, EOS included."""
        columns = torch.arange(self.tops.shape[1])
        return self.tops.cpu()[columns <= self.lengths[:, None]]


@dataclass(frozen=True)
class ScriptedSampler(Sampler):
    """Our decoding's choice of a token, scripted; prompt ids are row numbers of the script."""

    script: Script | None = None

    def key(self, prompt_id: str) -> int:
        return int(prompt_id)

    def choose(self, logits: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        assert self.script is not None
        return self.script.take(logits, keys, positions)


class ScriptedProcessor(LogitsProcessor):
    """The same for Hugging Face's `generate`, one batch."""

    def __init__(self, script: Script, rows: Sequence[int], width: int, device: torch.device):
        self.script, self.width = script, width
        self.rows = torch.tensor(rows, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        positions = torch.full_like(self.rows, input_ids.shape[1] - self.width)
        token = self.script.take(scores, self.rows, positions)
        return scores.scatter_(1, token[:, None], torch.finfo(scores.dtype).max)


@dataclass
class Result:
    """Answers by pair, the largest logits at all their places, and what decoding says it did."""

    answers: Answers
    tops: Tensor
    counts: Counts = field(default_factory=Counts)


# -- ours -----------------------------------------------------------------------------------------------------------


def answer_with_bank(
    bank: AdapterBank, sharers: Sequence[Adapter], weights: Tensor, rule: str, work: Work, max_batch_tokens: int
) -> Result:
    """As `prime.merging.population.Population` does: base and sharers first, then generations; answers become drafts.

    Each candidate has prompts of its own in the list only so that the script can tell candidates apart by prompt id.
    """
    script, counts = Script(work, bank.device), Counts()
    sampler = ScriptedSampler(0.0, script=script)
    bank.load(sharers)
    drafts = [[gold] for gold in work.golds]
    answers: Answers = {}
    for phase in work.phases:
        bank.combine(weights[phase.start : phase.stop], rule)
        pairs = list(product(phase, range(len(work.prompts))))
        prompts = [EncodedPrompt(str(script.row(pair)), work.prompts[pair[1]]) for pair in pairs]
        rows = [(candidate - phase.start, index) for index, (candidate, _) in enumerate(pairs)]
        known = [tuple(drafts[prompt]) for _, prompt in pairs]
        request = Request(prompts, rows, sampler, work.cap, known)
        decoded = decode(bank, request, [EOS], max_batch_tokens, counts)
        for row, (candidate, prompt) in zip(rows, pairs, strict=True):
            answers[candidate, prompt] = decoded[row]
            drafts[prompt].append(decoded[row])
    return Result(answers, script.noted(), counts)


# -- PEFT -----------------------------------------------------------------------------------------------------------


def peft_model(model: nn.Module, adapters: Sequence[Adapter], dropout: float = 0.0) -> Any:
    """A PEFT model with these adapters, called `0`, `1`, ..., over a copy of the model."""
    wrapped: Any = None
    for number, adapter in enumerate(adapters):
        config = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.scale * adapter.rank, lora_dropout=dropout,
            target_modules=list(DEFAULT_TARGETS),
        )  # fmt: skip
        if wrapped is None:
            wrapped = get_peft_model(copy.deepcopy(model), config, adapter_name="0")
        else:
            wrapped.add_adapter(str(number), config)
        copy_factors(wrapped, str(number), adapter)
    return wrapped.eval()


def copy_factors(model: Any, name: str, adapter: Adapter) -> None:
    """Let the PEFT model's adapter of this name have our adapter's factors; both have the same scale."""
    for target, (a, b) in adapter.factors.items():
        module = model.base_model.model.get_submodule(target)
        module.lora_A[name].weight.data.copy_(a)
        module.lora_B[name].weight.data.copy_(b)


def with_onednn(model: nn.Module, run: Callable[[], Any]) -> Any:
    """What `run` returns, the model's frozen layers computing meanwhile by oneDNN as ours do (`prime.bank.cpu`)."""
    quicken(model)
    try:
        return run()
    finally:
        restore(model)


def answer_by_loop(model: Any, work: Work, *, stop: bool, in_order: bool) -> Result:
    """One adapter at a time, batches of 8.

    Args:
        stop: end a batch when all its rows have ended; else (published) 100 new tokens always.
        in_order: batches of prompts as they come (published); else sorted by length.
    """
    script = Script(work, model.device)
    places = list(range(len(work.prompts)))
    if not in_order:
        places.sort(key=lambda prompt: -len(work.prompts[prompt]))
    answers: Answers = {}
    for candidate in work.candidates:
        if candidate:
            model.set_adapter(str(candidate))
        with nullcontext() if candidate else model.disable_adapter():
            for start in range(0, len(places), BATCH):
                pairs = [(candidate, prompt) for prompt in places[start : start + BATCH]]
                answers |= generate(model, work, script, pairs, stop=stop)
    return Result(answers, script.noted())


def answer_mixed(model: Any, work: Work) -> Result:
    """Rows of all candidates sorted by length, batches of 8 with PEFT's `adapter_names`."""
    script = Script(work, model.device)
    pairs = sorted(work.pairs, key=lambda pair: (-len(work.prompts[pair[1]]), pair[1], pair[0]))
    answers: Answers = {}
    for phase in work.phases:
        of_phase = [pair for pair in pairs if pair[0] in phase]
        for start in range(0, len(of_phase), BATCH):
            batch = of_phase[start : start + BATCH]
            names = [str(candidate) if candidate else "__base__" for candidate, _ in batch]
            answers |= generate(model, work, script, batch, stop=True, adapter_names=names)
    return Result(answers, script.noted())


@torch.inference_mode()
def generate(model: Any, work: Work, script: Script, pairs: list[Pair], *, stop: bool, **options: Any) -> Answers:
    """Greedy answers of one batch by Hugging Face's `generate`."""
    ids, mask = padded([work.prompts[prompt] for _, prompt in pairs], model.device)
    processor = ScriptedProcessor(script, [script.row(pair) for pair in pairs], ids.shape[1], model.device)
    model.generation_config.eos_token_id = EOS if stop else None
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=PUBLISHED_TOKENS, pad_token_id=PAD,
        logits_processor=LogitsProcessorList([processor]), **options,
    )  # fmt: skip
    rows = out[:, ids.shape[1] :].tolist()
    return {pair: tuple(takewhile(lambda token: token != EOS, row)) for pair, row in zip(pairs, rows, strict=True)}


def padded(rows: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[b, t]`, padded at the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


# -- limits ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def forward_only(model: nn.Module, rows: Iterable[tuple[Tokens, int]], max_batch_tokens: int) -> None:
    """Plain forward passes over rows (tokens, how many of the last ones need logits), longest first.

    Kinder than a plain loop would be: no logits where none are needed, no key-value cache.
    """
    for part in packed(sorted(rows, key=lambda row: -len(row[0])), max_batch_tokens):
        ids, mask = padded([tokens for tokens, _ in part], model.device)
        wanted = max(count for _, count in part)
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=wanted).logits.argmax(-1)


def packed(rows: list[tuple[Tokens, int]], max_batch_tokens: int) -> Iterator[list[tuple[Tokens, int]]]:
    """Rows in descending length, as many together as stay within the budget."""
    start = 0
    while start < len(rows):
        count = max(1, max_batch_tokens // len(rows[start][0]))
        yield rows[start : start + count]
        start += count


def all_rows(work: Work) -> list[tuple[Tokens, int]]:
    """Prompt and answer of every row; logits are wanted for the answer and EOS."""
    return [(work.prompts[prompt] + answer, len(answer) + 1) for (_, prompt), answer in work.answers.items()]


def distinct_rows(work: Work) -> list[tuple[Tokens, int]]:
    """The shared prefix once per candidate, and of every row what follows it."""
    length = shared_length(work.prompts)
    prefixes = [(work.prompts[0][:length], 1) for _ in work.candidates]
    return prefixes + [(row[length:], wanted) for row, wanted in all_rows(work)]
