"""Users described by an instruction-tuned model: chat template, decoding by token budget, noise by user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prime.bank.batching import every_pair
from prime.bank.decode import Progress
from prime.bank.encoding import EncodedPrompt
from prime.bank.sampling import Sampler
from prime.engine import load_engine
from prime.errors import InputError
from prime.settings import ModelSettings, PromptSettings, SamplingSettings
from prime.users.data import User
from prime.users.profiles import fit, whole_sentences

BASE = -1  # the bank's row without an adapter


@dataclass(frozen=True)
class Asking:
    """What is asked about a user.

    Args:
        prompts: `profile` and `retrieval_history`, see `prime.users.profiles.load_profile_prompts`.
        item_words: words of an item's field at most.
        settings: how long a question with its answer may be, and whether it is a chat.
    """

    prompts: Mapping[str, str]
    item_words: int
    settings: PromptSettings


class Describer:
    """Writes texts about users."""

    def __init__(self, model: ModelSettings, sampling: SamplingSettings, seed: int, asking: Asking):
        self.asking, self.max_gen_len = asking, sampling.max_gen_len
        self.engine = load_engine(model, asking.settings)
        self.sampler = Sampler(sampling.temperature, sampling.top_p, seed)

    def texts(self, users: Sequence[User], progress: Progress) -> dict[str, dict[str, Any]]:
        """`text`, and `items`, the number of items it is about, by user id; empty for an empty history."""
        questions: list[EncodedPrompt] = []
        texts: dict[str, dict[str, Any]] = {}
        for user in users:
            texts[user.user_id] = {"text": "", "items": 0}
            if user.profile:
                question, texts[user.user_id]["items"] = self._question(user)
                questions.append(self.engine.encoder.prompt(user.user_id, question))
        pairs = every_pair([BASE], len(questions))
        answers = self.engine.answer(questions, pairs, self.sampler, self.max_gen_len, progress=progress)
        for (_, place), ids in answers.items():
            text = self.engine.encoder.text(ids)
            cut = len(ids) >= self.max_gen_len
            texts[questions[place].id]["text"] = whole_sentences(text) if cut else text
        return texts

    def _question(self, user: User) -> tuple[str, int]:
        """The question about as many items as leave room for the answer, and their number."""
        encoder = self.engine.encoder
        room = self.asking.settings.max_length - self.max_gen_len

        def fits(text: str) -> bool:
            return len(encoder.prompt_ids(text)) <= room

        text, number = fit(user.profile, self.asking.prompts, self.asking.item_words, fits)
        if not number:
            raise InputError(f"user {user.user_id}: not one item fits (--max_length {self.asking.settings.max_length})")
        return text, number
