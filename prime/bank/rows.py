"""Rows in flight: (adapter, prompt) pairs in a batch with its key-value cache, fed tokens and dropped when they end.

Shapes: `b` rows, `t` tokens, `v` vocabulary, `h` key-value heads, `d` head width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from prime.bank.bank import AdapterBank
from prime.bank.cache import ROOM, RoomyCache
from prime.bank.encoding import Tokens
from prime.errors import InputError


@dataclass
class Row:
    """One prompt (or record) under one adapter."""

    adapter: int  # -1: the plain base
    index: int  # of the prompt
    text: Tokens  # of the prompt; once the row is in a batch, what follows the shared prefix
    name: str = ""  # of the prompt or record, for messages
    key: int = 0  # of the prompt's noise
    answer: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Batch:
    """Rows with their key-value cache.

    Each feed is laid out [left padding | pending tokens | guessed tokens, right padded], so that the positions
    whose logits are wanted are the last columns of every row.
    """

    bank: AdapterBank
    rows: list[Row]
    cache: RoomyCache
    mask: Tensor  # [b, cached tokens], 0 where a row has a hole
    seen: Tensor  # [b, 1] true length of each row so far

    @classmethod
    def begin(cls, bank: AdapterBank, rows: list[Row], prefix: "Prefix | None") -> "Batch":
        """Rows that were fed nothing yet but their prefix."""
        length = prefix.length if prefix else 0
        mask = torch.ones(len(rows), length, dtype=torch.long, device=bank.device)
        seen = torch.full((len(rows), 1), length, device=bank.device)
        return cls(bank, rows, prefix.expand(rows) if prefix else RoomyCache(), mask, seen)

    @classmethod
    def join(cls, batches: "Sequence[Batch]") -> "Batch":
        """One batch of all rows; the old batches are used up."""
        if len(batches) == 1:
            return batches[0]
        return cls._regroup(batches, [[list(range(len(batch.rows))) for batch in batches]])[0]

    @classmethod
    def split(cls, batches: "Sequence[Batch]", wanted: Callable[[Row], bool]) -> "tuple[Batch | None, Batch | None]":
        """One batch of the rows that are wanted and one of the others, None without such rows; the old batches are
        used up.
        """
        chosen: list[list[int]] = []
        others: list[list[int]] = []
        for batch in batches:
            is_wanted = [wanted(row) for row in batch.rows]
            chosen.append([place for place, yes in enumerate(is_wanted) if yes])
            others.append([place for place, yes in enumerate(is_wanted) if not yes])
        if len(batches) == 1 and not (any(chosen) and any(others)):
            return (batches[0], None) if any(chosen) else (None, batches[0])
        if not any(others):
            return cls._regroup(batches, [chosen])[0], None
        if not any(chosen):
            return None, cls._regroup(batches, [others])[0]
        first, second = cls._regroup(batches, [chosen, others])
        return first, second

    @classmethod
    def _regroup(cls, batches: "Sequence[Batch]", selections: list[list[list[int]]]) -> "list[Batch]":
        """A batch per selection of rows, which lists the places of the chosen ones in each old batch."""
        caches = RoomyCache.joined([batch.cache for batch in batches], selections, ROOM)
        return [cls._select(batches, *pair) for pair in zip(selections, caches, strict=True)]

    @classmethod
    def _select(cls, batches: "Sequence[Batch]", selection: list[list[int]], cache: RoomyCache) -> "Batch":
        """The selected rows of each batch, whose keys and values are in this cache; shorter ones have masked columns
        in front.
        """
        rows: list[Row] = []
        masks: list[Tensor] = []
        seen: list[Tensor] = []
        for batch, places in zip(batches, selection, strict=True):
            if places:
                rows += [batch.rows[place] for place in places]
                masks.append(batch.mask[places])
                seen.append(batch.seen[places])
        columns = max(mask.shape[1] for mask in masks)
        mask = torch.cat([pad(mask, (columns - mask.shape[1], 0)) for mask in masks])
        return cls(batches[0].bank, rows, cache, mask, torch.cat(seen))

    def cached_tokens(self) -> int:
        """Columns of the cache over all rows."""
        return len(self.rows) * self.mask.shape[1]

    def feed(self, pending: list[Tokens], guesses: list[Tokens]) -> Tensor:
        """Logits `[b, 1 + D, v]` after the pending tokens and after each of at most D guessed ones."""
        width, depth = max(map(len, pending)), max(map(len, guesses))
        if width > 1 and math.isinf(self.bank.lookback):  # steps stay narrow, and a window counts padding
            width = self.bank.width(width + depth) - depth
        padded = [_padded(*tokens, width, depth) for tokens in zip(pending, guesses, strict=True)]
        ids = torch.tensor(padded).to(self.bank.device)
        left = torch.tensor([[width - len(tokens)] for tokens in pending], device=self.bank.device)
        columns = torch.arange(width + depth, device=self.bank.device)[None]
        new = (columns >= left).long()
        # Padding needs a position, too, and one that no token has may change those of all tokens.
        positions = (self.seen + columns - left).clamp(min=0, max=self.bank.last_position)
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
        return self.bank.lookback - self.mask.shape[1] - width - limit

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


def _padded(pending: Tokens, guess: Tokens, width: int, depth: int) -> list[int]:
    """Pending tokens in the last of `width` columns, and guessed ones in the first of `depth`."""
    return [0] * (width - len(pending)) + [*pending, *guess] + [0] * (depth - len(guess))


def check_finite(values: Tensor, names: Sequence[str], dtype: torch.dtype) -> None:
    """InputError where values `[b]` of rows with these names are not finite; `dtype` is that of the model's logits."""
    if not values.isfinite().all():
        name = names[int(values.isfinite().int().argmin())]
        narrow = "float16 is too narrow for this model, give --dtype bfloat16"
        reason = narrow if dtype == torch.float16 else "are all weights, and those of the adapters, finite?"
        raise InputError(f"{name}: the model's logits are not finite; {reason}")


class Prefix:
    """Keys and values of a prefix under each adapter, computed once: `[adapters, h, length, d]` per layer."""

    def __init__(self, bank: AdapterBank, ids: Tokens, adapters: list[int]):
        self.length = len(ids)
        self.place = {adapter: place for place, adapter in enumerate(adapters)}
        cache = RoomyCache()
        tokens = torch.tensor([ids] * len(adapters), device=bank.device)
        with bank.routed(adapters):
            bank.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.layers = cache.pairs()

    def expand(self, rows: list[Row]) -> RoomyCache:
        """The prefix under each row's adapter, with room for what the row is fed first."""
        places = torch.tensor([self.place[row.adapter] for row in rows], device=self.layers[0][0].device)
        chosen = (
            (keys.index_select(0, places.to(keys.device)), values.index_select(0, places.to(values.device)))
            for keys, values in self.layers
        )
        return RoomyCache.holding(chosen, max(len(row.text) for row in rows) + ROOM)
