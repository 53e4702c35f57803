"""Population decoding and scoring: rows are (adapter, prompt) pairs, answered in wide batches.

Four things make it fast, none of which changes an answer: prompts that begin alike share that prefix, computed
once per adapter; rows are sorted by length and batched by a token budget; answers already known for a prompt are
drafts, and one forward pass over prompt and draft accepts the longest start that the model would have written
itself (Leviathan et al. 2023, exact here because noise belongs to the prompt, see `bank/sampling.py`), as far as drafts
have proved right so far; finished rows leave the batch at once.

Shapes: `b` rows, `t` tokens, `v` vocabulary, `h` key-value heads.
"""
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from prime.bank.bank import AdapterBank
from prime.bank.cache import ROOM, RoomyCache
from prime.bank.encoding import EncodedPrompt, EncodedRecord, Tokens
from prime.bank.sampling import Sampler

Pair = tuple[int, int]  # (adapter, prompt or record)
Progress = Callable[[int], object]

MIN_PREFIX = 16  # tokens that prompts must share before computing them apart pays
WAITING_BUDGETS = 4  # cached tokens of waiting rows, in batch budgets, before they are decoded together
# On a CPU a step of few rows is bound by reading the weights, so more rows wait as long as their caches stay small.
CPU_WAITING_BUDGETS, CPU_WAITING_BYTES = 16, 2**29
WORTH = 4  # tokens fed beside others that cost as much as a step of one token (a CPU at 30m: 4 to 5)
TRUSTED = 8  # drafts that count as right before any was tried
CPU_BATCH_TOKENS = 1536  # about 1,500 beat 4,000 and 8,000 on a CPU: larger batches fall out of its cache


@dataclass
class Counts:
    """What decoding cost: rows answered, rows answered wholly from a draft, forward passes, tokens fed."""

    rows: int = 0
    from_draft: int = 0
    passes: int = 0
    tokens: int = 0


@dataclass
class _Row:
    adapter: int
    index: int  # of the prompt (or record)
    suffix: Tokens  # what follows the shared prefix
    key: int  # of the prompt's noise
    answer: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Batch:
    """Rows in flight with their key-value cache; knows how to feed tokens and to drop rows.

    Each feed is laid out [left padding | pending tokens | guessed tokens, right padded], so that the positions
    whose logits are wanted are the last columns of every row.
    """

    bank: AdapterBank
    rows: list[_Row]
    cache: RoomyCache
    mask: Tensor  # [b, cached tokens], 0 where a row has a hole
    seen: Tensor  # [b, 1] true length of each row so far

    @classmethod
    def begun(cls, bank: AdapterBank, rows: list[_Row], prefix: "_Prefix | None") -> "_Batch":
        """Rows that were fed nothing yet but their prefix."""
        length = prefix.length if prefix else 0
        mask = torch.ones(len(rows), length, dtype=torch.long, device=bank.device)
        seen = torch.full((len(rows), 1), length, device=bank.device)
        return cls(bank, rows, prefix.expand(rows) if prefix else RoomyCache(), mask, seen)

    @classmethod
    def regrouped(cls, batches: "list[_Batch]", wanted: Callable[[_Row], bool]) -> "dict[bool, _Batch]":
        """The rows that are wanted (True) and those that are not (False), a batch of each where there are any. Shorter
        caches get masked columns in front; the old batches are used up.
        """
        sides = {
            side: [[place for place, row in enumerate(batch.rows) if wanted(row) is side] for batch in batches]
            for side in (False, True)
        }
        filled = {side: chosen for side, chosen in sides.items() if any(chosen)}
        if len(batches) == len(filled) == 1:
            return dict.fromkeys(filled, batches[0])
        caches = RoomyCache.joined([batch.cache for batch in batches], [*filled.values()], ROOM)
        return {side: cls._of(batches, filled[side], cache) for side, cache in zip(filled, caches, strict=True)}

    @classmethod
    def join(cls, batches: "list[_Batch]") -> "_Batch":
        """One batch of all rows."""
        return cls.regrouped(batches, lambda _: True)[True]

    @classmethod
    def _of(cls, batches: "list[_Batch]", chosen: list[list[int]], cache: RoomyCache) -> "_Batch":
        """The chosen rows of each batch, whose keys and values are in this cache."""
        rows = [batch.rows[i] for batch, own in zip(batches, chosen, strict=True) for i in own]
        parts = [(batch.mask[own], batch.seen[own]) for batch, own in zip(batches, chosen, strict=True) if own]
        columns = max(mask.shape[1] for mask, _ in parts)
        mask = torch.cat([pad(mask, (columns - mask.shape[1], 0)) for mask, _ in parts])
        return cls(batches[0].bank, rows, cache, mask, torch.cat([seen for _, seen in parts]))

    def feed(self, pending: list[Tokens], guesses: list[Tokens]) -> Tensor:
        """Logits `[b, 1 + D, v]` after the pending tokens and after each of at most D guessed ones."""
        width, depth = max(map(len, pending)), max(map(len, guesses))
        if width > 1 and math.isinf(sliding_window(self.bank.config)):  # steps stay narrow, and a window counts padding
            width = self.bank.width(width + depth) - depth
        ids = torch.tensor(
            [[0] * (width - len(p)) + [*p, *g] + [0] * (depth - len(g)) for p, g in zip(pending, guesses, strict=True)]
        ).to(self.bank.device)
        left = torch.tensor([[width - len(p)] for p in pending], device=self.bank.device)
        columns = torch.arange(width + depth, device=self.bank.device)[None]
        new = (columns >= left).long()
        positions = (self.seen + columns - left).clamp(min=0)
        self.mask = torch.cat([self.mask, new], 1)
        self.seen = self.seen + (width - left)
        with self.bank.routed([row.adapter for row in self.rows]):
            return self.bank.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                logits_to_keep=depth + 1,
                use_cache=True,
            ).logits

    def room(self, width: int, limit: int) -> float:
        """Guessed tokens that may be fed beside `width` pending ones when up to `limit` more are to come.

        A refused guess leaves a hole in the cache. A sliding window counts holes, so there must be none that
        reaches it.
        """
        return sliding_window(self.bank.config) - self.mask.shape[1] - width - limit

    def accept(self, counts: Tensor, depth: int) -> None:
        """Of the last `depth` fed columns keep the first counts `[b]` per row; mask the others for good."""
        self.seen = self.seen + counts[:, None]
        if depth:
            self.mask[:, -depth:] = (torch.arange(depth, device=self.mask.device)[None] < counts[:, None]).long()

    def keep(self, indices: list[int]) -> None:
        """Drop all rows but these."""
        if len(indices) == len(self.rows):
            return
        if not indices:
            self.rows = []
            return
        order = self.cache.keep(indices, len(self.rows))
        self.rows = [self.rows[i] for i in order]
        chosen = torch.tensor(order, device=self.bank.device)
        self.mask, self.seen = self.mask[chosen], self.seen[chosen]


class _Prefix:
    """Keys and values of a prefix under each adapter, computed once: `[adapters, h, length, width]` per layer."""

    def __init__(self, bank: AdapterBank, ids: Tokens, adapters: list[int]):
        self.length = len(ids)
        self.place = {adapter: place for place, adapter in enumerate(adapters)}
        cache = RoomyCache()
        tokens = torch.tensor([ids] * len(adapters), device=bank.device)
        with bank.routed(adapters):
            bank.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.layers = cache.pairs()

    def expand(self, rows: list[_Row]) -> RoomyCache:
        """The prefix under each row's adapter, with room for what the row is fed first."""
        places = torch.tensor([self.place[row.adapter] for row in rows], device=self.layers[0][0].device)
        chosen = (
            (keys.index_select(0, places.to(keys.device)), values.index_select(0, places.to(values.device)))
            for keys, values in self.layers
        )
        return RoomyCache.holding(chosen, max(len(row.suffix) for row in rows) + ROOM)


# -- answering ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decode(
    bank: AdapterBank,
    prompts: Sequence[EncodedPrompt],
    pairs: Iterable[Pair],
    sampler: Sampler,
    max_new_tokens: int,
    eos: Sequence[int],
    drafts: Sequence[Sequence[Tokens]] | None = None,
    max_batch_tokens: int = 0,
    counts: Counts | None = None,
    progress: Progress | None = None,
) -> dict[Pair, Tokens]:
    """Answers of adapters to prompts.

    Args:
        bank: holds the adapters; index -1 stands for the plain base.
        prompts: the prompts that `pairs` count from 0.
        pairs: (adapter, prompt) indices to answer; see `every_pair`.
        sampler: how the next token is chosen.
        max_new_tokens: at most this many tokens per answer (published: 100).
        eos: ids that end an answer; not part of it.
        drafts: per prompt, known answers (any length); they change the time taken, never the answer.
        max_batch_tokens: tokens per forward pass; 0 = chosen for the device.
        counts: added to, if given.
        progress: called with the number of rows just finished.

    Returns:
        Token ids without EOS, by pair.
    """
    counts = counts if counts is not None else Counts()
    found: dict[Pair, Tokens] = {}
    known = _Drafts(len(prompts), drafts, eos)
    texts = [prompt.ids for prompt in prompts]
    keys = [sampler.key(prompt.id) for prompt in prompts]
    budget = max_batch_tokens or auto_batch_tokens(bank)
    batches = _batches(bank, texts, pairs, known, max_new_tokens, budget, keys)
    most = waiting_tokens(bank.config, budget, bank.device.type == "cpu")
    for row in _Decoder(sampler, max_new_tokens, known, counts, budget, most).answer(batches):
        found[row.adapter, row.index] = tuple(row.answer)
        if progress:
            progress(1)
    return found


class _Depth:
    """How many tokens of a draft are worth feeding, told by how far earlier drafts agreed with the model.

    A token that agrees saves a step, and each one that is fed costs a part of one.
    """

    def __init__(self) -> None:
        self.fed, self.agreed = Counter[int](), Counter[int]()  # drafts by place, which reached it

    def note(self, fed: int, agreed: int) -> None:
        self.fed.update(range(fed))
        self.agreed.update(range(agreed))

    @property
    def most(self) -> float:
        return next((at for at in self.fed if self.fed[at] + TRUSTED > WORTH * (self.agreed[at] + TRUSTED)), math.inf)


class _Drafts:
    """Known answers per prompt, most frequent first; a draft must begin with what the row has answered so far."""

    def __init__(self, n: int, drafts: Sequence[Sequence[Tokens]] | None, eos: Sequence[int] = ()):
        lists = drafts if drafts is not None else [()] * n
        self.ends = frozenset(eos)
        cut = [[tuple(takewhile(lambda t: t not in self.ends, answer)) for answer in known] for known in lists]
        self.ranked = [[answer for answer, _ in Counter(known).most_common()] for known in cut]
        self.first, self.later = _Depth(), _Depth()  # of drafts fed behind prompts, and of those that match an answer

    def longest(self, index: int) -> int:
        """Tokens that are fed behind a prompt at most."""
        return int(min(max(map(len, self.ranked[index]), default=0), self.first.most))

    def guess(self, row: _Row, limit: float) -> Tokens:
        """Continuation of the row's answer by the most frequent known answer that agrees with it so far."""
        done = tuple(row.answer)
        for answer in self.ranked[row.index]:
            if limit > 0 and len(answer) > len(done) and answer[: len(done)] == done:
                return answer[len(done) : int(min(len(done) + limit, len(answer)))]
        return ()


@dataclass
class _Decoder:
    """Decodes batches to their end.

    Most rows of short answers end in the first pass, with a draft. The others wait until `most` cached tokens have
    gathered. Of these, rows whose answer begins as a known one are fed its rest, among themselves; an answer that
    agrees with no known one never will again, and such rows go on together, a token at a time.
    """

    sampler: Sampler
    limit: int  # new tokens of an answer
    known: _Drafts
    counts: Counts
    budget: int  # tokens of a pass
    most: int  # cached tokens of waiting rows

    def answer(self, batches: Iterable[_Batch]) -> Iterator[_Row]:
        """Rows as they finish."""
        waiting: list[_Batch] = []
        for batch in batches:
            self.counts.rows += len(batch.rows)
            yield from self._advance(batch, [row.suffix for row in batch.rows], self.known.first)
            waiting += [batch] if batch.rows else []
            if sum(len(one.rows) * one.mask.shape[1] for one in waiting) > self.most:
                yield from self._finish(waiting)
        yield from self._finish(waiting, last=True)

    def _finish(self, waiting: list[_Batch], last: bool = False) -> Iterator[_Row]:
        """Rows that end; those whose guess was refused wait on, so that the others' caches need no second copy."""
        apart: list[_Batch] = []
        while waiting:
            groups = _Batch.regrouped(waiting, self._follows)
            waiting.clear()
            apart += [groups[False]] if False in groups else []
            if True in groups:
                yield from self._step(groups[True], self.known.later)
                waiting += [groups[True]] if groups[True].rows else []
            if not last:
                break
        if apart:
            batch = _Batch.join(apart)
            apart.clear()
            while batch.rows:
                yield from self._step(batch, None)

    def _follows(self, row: _Row) -> bool:
        """Whether a known answer begins as the row's does, and guesses are worth it."""
        return bool(self._guess(row, self.known.later.most))

    def _step(self, batch: _Batch, depth: _Depth | None) -> Iterator[_Row]:
        return self._advance(batch, [(row.answer[-1],) for row in batch.rows], depth)

    def _advance(self, batch: _Batch, pending: list[Tokens], depth: _Depth | None) -> Iterator[_Row]:
        """One forward pass over pending and guessed tokens; rows that end are yielded and leave the batch."""
        guesses = self._guesses(batch, pending, depth)
        logits = batch.feed(pending, guesses)
        self.counts.passes += 1
        self.counts.tokens += sum(map(len, pending)) + sum(map(len, guesses))
        accepted, open_rows = [], []
        own = _choose(logits, batch.rows, guesses, self.sampler)
        for i, (row, guess, chosen) in enumerate(zip(batch.rows, guesses, own, strict=True)):
            agreed = _agreement(guess, chosen)
            accepted.append(agreed)
            if depth:
                depth.note(len(guess), agreed)
            row.answer.extend([*guess[:agreed], chosen[agreed]])
            ended = row.answer[-1] in self.known.ends
            if ended or len(row.answer) >= self.limit:
                if ended:
                    row.answer.pop()
                self.counts.from_draft += depth is self.known.first and agreed > 0
                yield row
            else:
                open_rows.append(i)
        batch.accept(torch.tensor(accepted, device=batch.mask.device), max(map(len, guesses)))
        batch.keep(open_rows)

    def _guesses(self, batch: _Batch, pending: list[Tokens], depth: _Depth | None) -> list[Tokens]:
        if depth is None:
            return [()] * len(batch.rows)
        width = max(map(len, pending))
        most = min(depth.most, batch.room(width, self.limit - min(len(row.answer) for row in batch.rows)))
        if depth is self.known.later:  # first passes were cut to the budget
            most = min(most, max(1, self.budget // len(batch.rows) - width))
        return [self._guess(row, most) for row in batch.rows]

    def _guess(self, row: _Row, most: float) -> Tokens:
        """One token always comes from the model after the guess, so the guess leaves room for it."""
        return self.known.guess(row, min(self.limit - len(row.answer) - 1, most))


def _choose(logits: Tensor, rows: list[_Row], guesses: list[Tokens], sampler: Sampler) -> list[list[int]]:
    """The model's own token after the pending tokens and after each guessed one, per row."""
    wanted = [(i, depth) for i, guess in enumerate(guesses) for depth in range(len(guess) + 1)]
    index = torch.tensor(wanted, device=logits.device)
    keys = torch.tensor([rows[i].key for i, _ in wanted], device=logits.device)
    positions = torch.tensor([len(rows[i].answer) + depth for i, depth in wanted], device=logits.device)
    chosen = iter(sampler.choose(logits[index[:, 0], index[:, 1]], keys, positions).tolist())
    return [[next(chosen) for _ in range(len(guess) + 1)] for guess in guesses]


def _agreement(guess: Tokens, chosen: list[int]) -> int:
    """Number of leading guessed tokens that the model would have written too."""
    for place, token in enumerate(guess):
        if token != chosen[place]:
            return place
    return len(guess)


# -- scoring --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def score(
    bank: AdapterBank,
    records: Sequence[EncodedRecord],
    pairs: Iterable[Pair],
    max_batch_tokens: int = 0,
    progress: Progress | None = None,
    moments: dict[Pair, Tensor] | None = None,
) -> dict[Pair, Tensor]:
    """Log-probabilities of the target tokens of records under adapters.

    Args: as for `decode`; adapter -1 is the plain base.
        moments: added to, if given: `[2, target tokens]`, mean and standard deviation of the log-probability of a
            token drawn from the model in the target token's place.

    Returns:
        fp32 CPU tensors `[target tokens, EOS included]`, by pair.
    """
    found: dict[Pair, Tensor] = {}
    texts = [record.ids for record in records]
    targets = _Drafts(len(records), [[record.target[:-1]] for record in records])
    budget = max_batch_tokens or auto_batch_tokens(bank)
    for batch in _batches(bank, texts, pairs, targets, 0, budget, [0] * len(texts)):
        guesses = [records[row.index].target[:-1] for row in batch.rows]
        logits = batch.feed([row.suffix for row in batch.rows], guesses)
        for row, own in zip(batch.rows, logits, strict=True):
            target = torch.tensor(records[row.index].target, device=own.device)
            own = own[: len(target)].float()
            found[row.adapter, row.index] = (own.gather(1, target[:, None])[:, 0] - own.logsumexp(1)).cpu()
            if moments is not None:
                moments[row.adapter, row.index] = _moments(own).cpu()
        if progress:
            progress(len(batch.rows))
    return found


def _moments(logits: Tensor) -> Tensor:
    """`[2, t]` mean and standard deviation of log p(token) for a token drawn from p, of logits `[t, v]`."""
    logprobs = logits.log_softmax(1)
    p = logprobs.exp()
    mean = (p * logprobs).sum(1)
    return torch.stack([mean, (p * (logprobs - mean[:, None]).square()).sum(1).sqrt()])


# -- batches --------------------------------------------------------------------------------------------------------


def auto_batch_tokens(bank: AdapterBank) -> int:
    """Tokens per forward pass that suit the bank's devices together; see `batch_tokens`."""
    gpus = {wrapper.place for wrapper in bank.wrappers.values()} if bank.device.type == "cuda" else ()
    memory = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus) or None
    return batch_tokens(bank.config, weight_bytes(bank.model), memory)


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def batch_tokens(config: Any, weights: int, memory: int | None) -> int:
    """Tokens per forward pass: a constant on a CPU (`memory` None), a tenth of the memory beside the weights on a GPU
    (the waiting rows' caches take several times as much). A function of model and device alone, so that batches do
    not depend on what ran before.
    """
    if memory is None:
        return CPU_BATCH_TOKENS
    width = config.hidden_size * 12 + getattr(config, "intermediate_size", 4 * config.hidden_size) * 3
    per_token = 2 * (width + 2 * config.hidden_size * config.num_hidden_layers) + 4 * config.vocab_size
    return max(CPU_BATCH_TOKENS, min(16_384, int((memory - weights) / 10 / per_token)))


def waiting_tokens(config: Any, budget: int, on_cpu: bool) -> int:
    """Cached tokens of rows that wait to be decoded together; a function of model, device and budget alone."""
    if not on_cpu:
        return WAITING_BUDGETS * budget
    per_token = cache_bytes(config, 4)
    return budget * max(WAITING_BUDGETS, min(CPU_WAITING_BUDGETS, CPU_WAITING_BYTES // (per_token * budget)))


def cache_bytes(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_width * itemsize


def sliding_window(config: Any) -> float:
    """Tokens that the model's narrowest attention layer looks back; infinite without a sliding window."""
    window = getattr(config, "sliding_window", None)
    return window if window and getattr(config, "use_sliding_window", True) else math.inf


def _batches(
    bank: AdapterBank,
    texts: list[Tokens],
    pairs: Iterable[Pair],
    known: _Drafts,
    limit: int,
    budget: int,
    keys: Sequence[int],
) -> Iterator[_Batch]:
    """Rows (adapter, text) in batches of at most `budget` fed tokens, alike in length, a shared prefix apart.

    A prefix is shared only where prompt, draft and `limit` new tokens fit a sliding window, since padding behind the
    prefix would count in it.
    """
    wanted: dict[int, list[int]] = {}
    for adapter, index in pairs:
        wanted.setdefault(index, []).append(adapter)
    for indices, length in prefix_groups({index: texts[index] for index in wanted}):
        longest = max(len(texts[index]) + known.longest(index) for index in indices)
        length = length if longest + limit <= sliding_window(bank.config) else 0
        adapters = sorted({adapter for index in indices for adapter in wanted[index]})
        prefix = _Prefix(bank, texts[indices[0]][:length], adapters) if length else None
        rows = [
            _Row(adapter, index, texts[index][length:], keys[index]) for index in indices for adapter in wanted[index]
        ]
        rows.sort(key=lambda row: (-len(row.suffix) - known.longest(row.index), row.index, row.adapter))
        for part in _cut(rows, known, budget, length):
            yield _Batch.begun(bank, part, prefix)


def every_pair(adapters: Iterable[int], prompts: int) -> list[Pair]:
    """All (adapter, prompt) pairs of these adapters and the first `prompts` prompts."""
    return [(adapter, index) for adapter in adapters for index in range(prompts)]


def _cut(rows: list[_Row], known: _Drafts, budget: int, prefix: int) -> Iterator[list[_Row]]:
    """Consecutive rows whose padded size stays within the budget, and whose caches do; at least one row each."""
    part: list[_Row] = []
    width = depth = 0
    for row in rows:
        new_width, new_depth = max(width, len(row.suffix)), max(depth, known.longest(row.index))
        fed, count = new_width + new_depth, len(part) + 1
        if part and (count * fed > budget or count * (prefix + fed) > WAITING_BUDGETS * budget):
            yield part
            part, new_width, new_depth = [], len(row.suffix), known.longest(row.index)
        part.append(row)
        width, depth = new_width, new_depth
    if part:
        yield part


def prefix_groups(texts: Mapping[int, Tokens]) -> list[tuple[list[int], int]]:
    """Texts grouped by a common beginning: (indices, length of the shared prefix), 0 where sharing does not pay.

    At least the last token of each text stays outside the prefix, since its logits are wanted.
    """
    order = sorted(texts, key=lambda i: texts[i])
    groups: list[tuple[list[int], int]] = []
    for index in order:
        if groups:
            members, length = groups[-1]
            common = min(length, _common(texts[members[-1]], texts[index]))
            if common >= MIN_PREFIX:
                groups[-1] = ([*members, index], common)
                continue
        groups.append(([index], len(texts[index]) - 1))
    shared = [(members, length if len(members) > 1 else 0) for members, length in groups]
    alone = [members[0] for members, length in shared if length == 0]
    return [group for group in shared if group[1]] + ([(alone, 0)] if alone else [])


def _common(a: Tokens, b: Tokens) -> int:
    limit = min(len(a), len(b)) - 1
    return next((place for place in range(limit) if a[place] != b[place]), max(limit, 0))
