"""Texts as token ids: prompts, and records with their targets."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from prime.errors import InputError

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt to answer: `ids` with BOS, and the id that its noise is derived from."""

    id: str
    ids: Tokens


@dataclass(frozen=True)
class EncodedRecord:
    """A text to score: prompt ids with BOS, target ids with EOS; only the target counts."""

    id: str
    ids: Tokens
    target: Tokens


class Encoder:
    """Texts to ids: BOS in front (where the tokenizer has one), EOS behind targets, long inputs cut at the left.

    Args:
        tokenizer: any Hugging Face tokenizer.
        max_length: tokens of prompt and target together (published: 3000).
        embeddings: rows of the model's embedding; 0 = as many as the tokenizer needs.

    Raises:
        InputError: a text holds a token that the model has no embedding for, such as an added padding token's name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 3000, embeddings: int = 0):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.embeddings = embeddings or len(tokenizer)
        # GPT-2 and its kin name their end of text as BOS too, and never begin with it.
        has_bos = tokenizer.bos_token_id not in (None, tokenizer.eos_token_id)
        self.bos = [tokenizer.bos_token_id] if has_bos else []

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if ids and max(ids) >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise InputError(
                f"the tokenizer writes {token!r} as id {max(ids)}, the model's embedding has {self.embeddings} rows; "
                f"do they belong together (--tokenizer_path)? The text: {text[:200]!r}"
            )
        return ids

    def prompt(self, prompt_id: str, text: str) -> EncodedPrompt:
        """A prompt of at most max_length tokens; the end is kept, it holds the question."""
        return EncodedPrompt(prompt_id, self._with_bos(self._ids(text), self.max_length))

    def record(self, record_id: str, text: str, target: str) -> EncodedRecord:
        """Prompt and target, tokenized as one text and parted where the prompt's own ids end.

        Where a token reaches over the boundary, it belongs to the target.
        """
        prompt, whole = self._ids(text), self._ids(text + target)
        shared = next((i for i, (p, w) in enumerate(zip(prompt, whole, strict=False)) if p != w), len(prompt))
        answer = whole[shared:][: self.max_length - len(self.bos) - 2] + [self.tokenizer.eos_token_id]
        return EncodedRecord(record_id, self._with_bos(prompt[:shared], self.max_length - len(answer)), tuple(answer))

    def _with_bos(self, ids: list[int], limit: int) -> tuple[int, ...]:
        room = limit - len(self.bos)
        return tuple(self.bos + ids[max(0, len(ids) - room) :])

    def label_tokens(self, labels: Sequence[str]) -> int:
        """Tokens that hold any label, and some more that show whether an answer goes on: several for numbers (4.75),
        else one.
        """
        more = 8 if all(label.isdigit() for label in labels) else 1
        return more + max(len(self._ids(" " + label)) for label in labels)

    def text(self, ids: Sequence[int]) -> str:
        """The answer as text, without surrounding space."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
