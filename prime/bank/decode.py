"""Population decoding: rows are (adapter, prompt) pairs, answered in wide batches.

Four things make it fast, none of which changes an answer: prompts that begin alike share that prefix, computed
once per adapter; rows are sorted by length and batched by a token budget (`batching.py`); answers already known for a
prompt are drafts, and one forward pass over prompt and draft accepts the longest start that the model would have
written itself (Leviathan et al. 2023, exact here because noise belongs to the prompt, see `sampling.py`), as far as
drafts have proved right so far (`drafts.py`); finished rows leave the batch at once (`rows.py`).

Shapes: `b` rows, `t` tokens, `v` vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from prime.bank.bank import AdapterBank
from prime.bank.batching import Pair, batches_of
from prime.bank.budgets import auto_batch_tokens, waiting_tokens
from prime.bank.drafts import Depth, Drafts, agreement
from prime.bank.encoding import EncodedPrompt, Tokens
from prime.bank.rows import Batch, Row, check_finite
from prime.bank.sampling import Sampler

Progress = Callable[[int], object]


@dataclass
class Counts:
    """What decoding cost: rows answered, rows answered wholly from a draft, forward passes, tokens fed."""

    rows: int = 0
    from_draft: int = 0
    passes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Request:
    """What is to be answered, and how."""

    prompts: Sequence[EncodedPrompt]
    pairs: Iterable[Pair]  # (adapter, prompt) to answer, see `every_pair`; adapter -1 is the plain base
    sampler: Sampler
    max_new_tokens: int  # of an answer (published: 100)
    drafts: Sequence[Sequence[Tokens]] | None = None  # per prompt, known answers: they change the time taken only

    def rows(self) -> list[Row]:
        """A row per pair, nothing answered yet."""
        keys = [self.sampler.key(prompt.id) for prompt in self.prompts]
        rows = []
        for adapter, index in self.pairs:
            prompt = self.prompts[index]
            rows.append(Row(adapter, index, prompt.ids, prompt.id, keys[index]))
        return rows


@torch.inference_mode()
def decode(
    bank: AdapterBank,
    request: Request,
    eos: Sequence[int],
    max_batch_tokens: int = 0,
    counts: Counts | None = None,
    progress: Progress | None = None,
) -> dict[Pair, Tokens]:
    """Answers of adapters to prompts.

    Args:
        bank: holds the adapters.
        eos: ids that end an answer; not part of it.
        max_batch_tokens: tokens per forward pass; 0 = chosen for the device.
        counts: added to, if given.
        progress: called with the number of rows just finished.

    Returns:
        Token ids without EOS, by pair.

    Raises:
        InputError: a prompt with its answer has more tokens than the model has positions, or logits are not finite.
    """
    drafts = Drafts([()] * len(request.prompts) if request.drafts is None else request.drafts, eos)
    budget = max_batch_tokens or auto_batch_tokens(bank)
    waiting = waiting_tokens(bank.config, budget, bank.device.type == "cpu")
    decoder = _Decoder(request.sampler, request.max_new_tokens, drafts, counts or Counts(), budget, waiting)
    answers: dict[Pair, Tokens] = {}
    for row in decoder.answer(batches_of(bank, request.rows(), drafts, request.max_new_tokens, budget)):
        answers[row.adapter, row.index] = tuple(row.answer)
        if progress:
            progress(1)
    return answers


@dataclass
class _Decoder:
    """Decodes batches to their end.

    Most rows of short answers end in the first pass, with a draft. The others wait until `waiting_budget` cached tokens
    have gathered. Of these, rows whose answer begins as a known one are fed its rest, among themselves; an answer that
    agrees with no known one never will again, and such rows go on together, a token at a time.
    """

    sampler: Sampler
    max_new_tokens: int
    drafts: Drafts
    counts: Counts
    budget: int  # tokens of a pass
    waiting_budget: int  # cached tokens of waiting rows

    def answer(self, batches: Iterable[Batch]) -> Iterator[Row]:
        """Rows as they finish."""
        waiting: list[Batch] = []
        for batch in batches:
            self.counts.rows += len(batch.rows)
            yield from self._advance(batch, [row.text for row in batch.rows], self.drafts.first)
            if batch.rows:
                waiting.append(batch)
            if sum(other.cached_tokens() for other in waiting) > self.waiting_budget:
                yield from self._finish(waiting)
        yield from self._finish(waiting, last=True)

    def _finish(self, waiting: list[Batch], last: bool = False) -> Iterator[Row]:
        """Feed the waiting rows, and yield those that end.

        Unless these are the last, rows that may still follow a draft wait on, so that their caches need no second copy.
        """
        without_draft: list[Batch] = []
        while waiting:
            following, others = Batch.split(waiting, self._follows)
            waiting.clear()
            if others:
                without_draft.append(others)
            if following:
                yield from self._step(following, self.drafts.later)
                if following.rows:
                    waiting.append(following)
            if not last:
                break
        if without_draft:
            batch = Batch.join(without_draft)
            without_draft.clear()
            while batch.rows:
                yield from self._step(batch, None)

    def _follows(self, row: Row) -> bool:
        """Whether a known answer begins as the row's does, and guesses are worth it."""
        return bool(self._guess(row, self.drafts.later.most))

    def _step(self, batch: Batch, depth: Depth | None) -> list[Row]:
        """A pass over the token that each row was answered last, and what is guessed to follow it."""
        return self._advance(batch, [(row.answer[-1],) for row in batch.rows], depth)

    def _advance(self, batch: Batch, pending: list[Tokens], depth: Depth | None) -> list[Row]:
        """One forward pass over pending and guessed tokens; the rows that end leave the batch and are returned.

        Args:
            depth: how far guesses of this kind have proved right; None: nothing is guessed.
        """
        guesses = self._guesses(batch, pending, depth)
        logits = batch.feed(pending, guesses)
        self.counts.passes += 1
        self.counts.tokens += sum(map(len, pending)) + sum(map(len, guesses))
        accepted: list[int] = []  # guessed tokens of each row
        ended: list[Row] = []
        open_rows: list[int] = []
        written = _choose(logits, batch.rows, guesses, self.sampler)
        for place, (row, guess, chosen) in enumerate(zip(batch.rows, guesses, written, strict=True)):
            agreed = agreement(guess, chosen)
            accepted.append(agreed)
            if depth:
                depth.note(len(guess), agreed)
            if self._ends(row, chosen[: agreed + 1]):
                self.counts.from_draft += depth is self.drafts.first and agreed > 0
                ended.append(row)
            else:
                open_rows.append(place)
        batch.accept(torch.tensor(accepted, device=batch.mask.device), max(map(len, guesses)))
        batch.keep(open_rows)
        return ended

    def _ends(self, row: Row, tokens: list[int]) -> bool:
        """Append tokens to the row's answer; whether the last one ends it, by its meaning or by the answer's length."""
        row.answer += tokens
        if row.answer[-1] in self.drafts.ends:
            row.answer.pop()
            return True
        return len(row.answer) >= self.max_new_tokens

    def _guesses(self, batch: Batch, pending: list[Tokens], depth: Depth | None) -> list[Tokens]:
        if depth is None:
            return [()] * len(batch.rows)
        width = max(map(len, pending))
        to_come = self.max_new_tokens - min(len(row.answer) for row in batch.rows)
        most = min(depth.most, batch.room(width, to_come))
        if depth is self.drafts.later:  # first passes were cut to the budget
            most = min(most, max(1, self.budget // len(batch.rows) - width))
        return [self._guess(row, most) for row in batch.rows]

    def _guess(self, row: Row, most: float) -> Tokens:
        """One token always comes from the model after the guess, so the guess leaves room for it."""
        return self.drafts.guess(row, min(self.max_new_tokens - len(row.answer) - 1, most))


def _choose(logits: Tensor, rows: list[Row], guesses: list[Tokens], sampler: Sampler) -> list[list[int]]:
    """The model's own token after the pending tokens and after each guessed one, per row."""
    places: list[tuple[int, int]] = []  # (row, guessed tokens before), where logits are wanted
    for place, guess in enumerate(guesses):
        places += [(place, depth) for depth in range(len(guess) + 1)]
    index = torch.tensor(places, device=logits.device)
    keys = torch.tensor([rows[place].key for place, _ in places], device=logits.device)
    positions = torch.tensor([len(rows[place].answer) + depth for place, depth in places], device=logits.device)
    wanted = logits[index[:, 0], index[:, 1]]
    check_finite(wanted.amax(1), [rows[place].name for place, _ in places], wanted.dtype)
    chosen = iter(sampler.choose(wanted, keys, positions).tolist())
    return [list(islice(chosen, len(guess) + 1)) for guess in guesses]
