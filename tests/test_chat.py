"""Chat templates of strangers: as transformers renders them, or one error; none takes time or memory for itself."""

import pytest

from prime.checkpoints import chat
from prime.checkpoints.chat import render_chats
from prime.errors import InputError
from tests import tiny

CHATS = [[{"role": "user", "content": text}] for text in ("Which tag?", "  {{ 7 * 7 }} <s>\n", "\u00e9")]
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
WITH_PROMPT = PLAIN + "{% if add_generation_prompt %}[assistant] {% endif %}{{ messages | tojson }}"


@pytest.mark.parametrize("template", [PLAIN, WITH_PROMPT])
@pytest.mark.parametrize("asked", [False, True])
def test_chats_are_worded_as_transformers_does(template: str, asked: bool) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    expected = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=asked) for c in CHATS]
    assert render_chats(tokenizer, CHATS, "model", add_generation_prompt=asked) == expected


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}", "Unexpected end of template"), ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages[0].content.x.y }}", "has no attribute"), ("{{ messages.__class__.__mro__ }}", "unsafe|undefined"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"), ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"), ("{{ '%0999999999999d' % 1 }}", "too|Memory|cannot|takes more"),
        ("{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
         "Memory|takes more than"),
        ("{% set r = range(999) | list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}"
         "{% endfor %}", "takes more than"),
        ("{{ 7 ** (7 ** 9) }}", "takes more than|Memory"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_never_ends_is_one_error(
    template: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.1)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"some/model: the chat template .*({told})"):
        render_chats(tokenizer, CHATS, "some/model")
