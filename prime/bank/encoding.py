"""Texts as token ids: prompts, and records with their targets."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from prime.bank.chat import Chat, common
from prime.errors import InputError

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt to answer: `ids` as the model was taught to begin, and the id that its noise is derived from."""

    id: str
    ids: Tokens


@dataclass(frozen=True)
class EncodedRecord:
    """A text to score: prompt ids, target ids with their end (EOS, or that of a turn); only the target counts."""

    id: str
    ids: Tokens
    target: Tokens


class Encoder:
    """Texts to ids: in front what the tokenizer itself puts there, EOS behind targets, long inputs cut at the left.

    With a chat template a prompt is the user's turn and a target the assistant's, see `prime.bank.chat`. Names of
    special tokens in a text are text.

    Args:
        tokenizer: any Hugging Face tokenizer.
        max_length: tokens of prompt and target together (published: 3000).
        embeddings: rows of the model's embedding; 0 = as many as the tokenizer needs.
        chat: on, off, or auto: on where the tokenizer has a template.

    Raises:
        InputError: a template that cannot be used or is missing; a text holds a token that the model has no embedding
            for, such as an added token's name.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int = 3000, embeddings: int = 0, chat: str = "auto"
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.embeddings = embeddings or len(tokenizer)
        if chat == "on" and not tokenizer.chat_template:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no chat template (--chat on)")
        self.chat = Chat(tokenizer) if tokenizer.chat_template and chat != "off" else None
        self.prefix = self.chat.head if self.chat else self._prefix()  # ids that every prompt begins with
        self.end = self.chat.end if self.chat and self.chat.end is not None else tokenizer.eos_token_id

    def _prefix(self) -> list[int]:
        """What the tokenizer puts in front of a text: for many models BOS, for some nothing or several tokens."""
        plain, whole = self._plain("a"), list(self.tokenizer("a")["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        raise InputError(f"{self.tokenizer.name_or_path}: the tokenizer's special tokens change the text beside them")

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if ids and max(ids) >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise InputError(
                f"the tokenizer writes {token!r} as id {max(ids)}, the model's embedding has {self.embeddings} rows; "
                f"do they belong together (--tokenizer_path)? The text: {text[:200]!r}"
            )
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt, however long."""
        return self._checked(self.chat.prompt(text) if self.chat else self.prefix + self._plain(text), text)

    def _whole_ids(self, text: str, target: str) -> list[int]:
        """Ids of a prompt and its answer up to its end."""
        if self.chat is None:
            return self._checked(self.prefix + self._plain(text + target), text + target) + [self.end]
        ids = self._checked(self.chat.answered(text, target.strip()), text + target)
        ids = ids[: len(ids) - self.chat.behind]
        return ids if self.chat.end is not None else [*ids, self.end]

    def prompt(self, prompt_id: str, text: str) -> EncodedPrompt:
        """A prompt of at most max_length tokens; the end is kept, it holds the question."""
        return EncodedPrompt(prompt_id, self._cut(self.prompt_ids(text), self.max_length))

    def record(self, record_id: str, text: str, target: str) -> EncodedRecord:
        """Prompt and target, tokenized as one text and parted where the prompt's own ids end.

        Where a token reaches over the boundary, it belongs to the target.
        """
        prompt, whole = self.prompt_ids(text), self._whole_ids(text, target)
        shared = min(common(prompt, whole), len(whole) - 1)
        answer = whole[shared:-1][: self.max_length - len(self.prefix) - 2] + whole[-1:]
        return EncodedRecord(record_id, self._cut(prompt[:shared], self.max_length - len(answer)), tuple(answer))

    def _cut(self, ids: list[int], limit: int) -> tuple[int, ...]:
        """The prefix, and of the other ids as many of the last as there is room for."""
        start = len(self.prefix)
        room = limit - start
        return tuple(self.prefix + ids[max(start, len(ids) - room) :])

    def label_tokens(self, labels: Sequence[str]) -> int:
        """Tokens that hold any label, and some more that show whether an answer goes on: several for numbers (4.75),
        else one.
        """
        more = 8 if all(label.isdigit() for label in labels) else 1
        space = "" if self.chat else " "
        return more + max(len(self._plain(space + label)) for label in labels)

    def text(self, ids: Sequence[int]) -> str:
        """The answer as text, without surrounding space."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
