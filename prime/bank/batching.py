"""Which rows go through the model together: those with a common prefix, alike in length, within a token budget."""

from collections.abc import Iterable, Iterator, Mapping

from prime.bank.bank import AdapterBank
from prime.bank.budgets import WAITING_BUDGETS
from prime.bank.drafts import Drafts
from prime.bank.encoding import Tokens
from prime.bank.rows import Batch, Prefix, Row

Pair = tuple[int, int]  # (adapter, prompt or record)

MIN_PREFIX = 16  # tokens that prompts must share before computing them apart pays


def every_pair(adapters: Iterable[int], prompts: int) -> list[Pair]:
    """All (adapter, prompt) pairs of these adapters and the first `prompts` prompts."""
    pairs: list[Pair] = []
    for adapter in adapters:
        pairs += [(adapter, index) for index in range(prompts)]
    return pairs


def batches_of(bank: AdapterBank, rows: Iterable[Row], drafts: Drafts, limit: int, budget: int) -> Iterator[Batch]:
    """Batches of at most `budget` fed tokens, rows of similar length together, their shared prefix computed before.

    A prefix is shared only where prompt, draft and `limit` new tokens fit what each layer looks back on, since padding
    behind the prefix would count in it.
    """
    by_index: dict[int, list[Row]] = {}
    for row in rows:
        bank.check_length(row.name, len(row.text), limit or drafts.longest(row.index) + 1)
        by_index.setdefault(row.index, []).append(row)
    for indices, shared in prefix_groups({index: alike[0].text for index, alike in by_index.items()}):
        group: list[Row] = []
        for index in indices:
            group += by_index[index]
        longest = max(len(row.text) + drafts.longest(row.index) for row in group)
        length = shared if longest + limit <= bank.lookback else 0
        adapters = sorted({row.adapter for row in group})
        prefix = Prefix(bank, group[0].text[:length], adapters) if length else None
        for row in group:
            row.text = row.text[length:]
        group.sort(key=lambda row: (-len(row.text) - drafts.longest(row.index), row.index, row.adapter))
        for part in _cut(group, drafts, budget, length):
            yield Batch.begin(bank, part, prefix)


def _cut(rows: list[Row], drafts: Drafts, budget: int, prefix: int) -> Iterator[list[Row]]:
    """Consecutive rows whose padded size stays within the budget, and whose caches do; at least one row each."""
    part: list[Row] = []
    width = depth = 0
    for row in rows:
        new_width, new_depth = max(width, len(row.text)), max(depth, drafts.longest(row.index))
        fed, count = new_width + new_depth, len(part) + 1
        if part and (count * fed > budget or count * (prefix + fed) > WAITING_BUDGETS * budget):
            yield part
            part, new_width, new_depth = [], len(row.text), drafts.longest(row.index)
        part.append(row)
        width, depth = new_width, new_depth
    if part:
        yield part


def prefix_groups(texts: Mapping[int, Tokens]) -> list[tuple[list[int], int]]:
    """Texts grouped by a common beginning: (indices, length of the shared prefix), 0 where sharing does not pay.

    At least the last token of each text stays outside the prefix, since its logits are wanted.
    """
    groups: list[tuple[list[int], int]] = []
    for index in sorted(texts, key=lambda i: texts[i]):  # so that texts with a common beginning are neighbours
        if groups:
            members, length = groups[-1]
            common = min(length, _common_length(texts[members[-1]], texts[index]))
            if common >= MIN_PREFIX:
                groups[-1] = ([*members, index], common)
                continue
        groups.append(([index], len(texts[index]) - 1))
    shared = [(members, length if len(members) > 1 else 0) for members, length in groups]
    alone = [members[0] for members, length in shared if length == 0]
    return [group for group in shared if group[1]] + ([(alone, 0)] if alone else [])


def _common_length(a: Tokens, b: Tokens) -> int:
    limit = min(len(a), len(b)) - 1
    return next((place for place in range(limit) if a[place] != b[place]), max(limit, 0))
