"""Prompts and answers as turns of a chat, in the tokenizer's own template."""

from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from prime.bank.bounded import ends_in_time, limited
from prime.errors import InputError

# Some templates write today's date, which would make a result depend on the day it is computed. They get this one, the
# default of Llama 3's; transformers hands templates no functions, so it is a macro in front of them.
DATE = date(2024, 7, 26)
_REPLACED = "".join(f" | replace('%{code}', '{DATE.strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY")
FIXED_DATE = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}"
OFF = "give --chat off to write prompts without it"


class Chat:
    """The template: a prompt is the user's turn, an answer the assistant's.

    What users wrote is text: names of control tokens in it stay text (transformers' `sanitize_control_tokens`).

    Raises:
        InputError: the template fails, an answered prompt does not begin as the prompt alone, or answers begin with
            thinking that cannot be turned off.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        try:
            template = tokenizer.get_chat_template()
        except ValueError:  # transformers' message is a page long
            raise InputError(f"{self._name}: of its chat templates none is the default; {OFF}") from None
        self.template = FIXED_DATE + template if "strftime_now" in template else template
        if not ends_in_time(lambda: self._apply([{"role": "user", "content": "a"}], tokenize=False)):
            raise InputError(f"{self._name}: its chat template takes more time or memory than one may; {OFF}")
        prompt, other = self.prompt("a"), self.prompt("b")
        self.head = prompt[: common(prompt, other)]  # ids in front of every prompt's own text
        written = str(tokenizer.decode(prompt[len(self.head) :]))
        if written.rpartition("<think>")[1] and "</think>" not in written.rpartition("<think>")[2]:
            raise InputError(f"{self._name}: its chat template makes every answer begin with <think>; {OFF}")
        one, two = self.answered("a", "a"), self.answered("a", "b")
        if common(prompt, one) < len(prompt) - 1:  # a last token may reach into the answer
            raise InputError(f"{self._name}: its chat template writes an answered prompt unlike a prompt; {OFF}")
        tail = one[len(one) - common(one[::-1], two[::-1]) :]
        control = tokenizer.added_tokens_decoder
        ends = [token in control and not control[token].content.isspace() for token in tail]
        place = ends.index(True) if any(ends) else None
        self.end: int | None = None if place is None else tail[place]
        # Ids of an answered prompt that nothing learns: behind the token that ends a turn, or all where none does.
        self.behind = len(tail) if place is None else len(tail) - place - 1

    @property
    def _name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt, up to where the answer begins."""
        return self._ids([{"role": "user", "content": text}], add_generation_prompt=True)

    def answered(self, text: str, answer: str) -> list[int]:
        """Ids of a prompt and its answer, with all that the template writes behind it."""
        return self._ids([{"role": "user", "content": text}, {"role": "assistant", "content": answer}])

    def _ids(self, turns: list[dict[str, str]], **more: Any) -> list[int]:
        try:
            with limited():
                return list(self._apply(turns, return_dict=False, sanitize_control_tokens=True, **more))
        except Exception as error:  # a template can make jinja raise whatever it likes
            reason = str(error)[:200] or type(error).__name__
            raise InputError(f"{self._name}: its chat template fails ({reason}); {OFF}") from None

    def _apply(self, turns: list[dict[str, str]], **more: Any) -> Any:
        return self.tokenizer.apply_chat_template(turns, chat_template=self.template, enable_thinking=False, **more)


def common(one: list[int], other: list[int]) -> int:
    """How many ids two texts have in common at their beginnings."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
