"""Chat templates of strangers: one error for all that they may do; none takes time or memory for itself."""

import resource
import signal

import pytest

from prime.bank import bounded
from prime.bank.bounded import ends_in_time, limited
from prime.bank.chat import Chat
from prime.errors import InputError
from tests import tiny

PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
LOOP = "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
FAILING = [
    ("{% for m in messages %}", "Unexpected end of template"), ("{{ raise_exception('no system') }}", "no system"),
    ("{{ messages[0].content.x.y }}", "has no attribute"), ("{{ messages.__class__.__mro__ }}", "unsafe|undefined"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"), ("{{ 1 / 0 }}", "division by zero"),
    ("{{ 'a' * 10 ** 10 }}", "MemoryError"), ("{{ '%0999999999999d' % 1 }}", "too|Memory|cannot|takes more"),
    ("{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
     "Memory|more than|more time"),
    ("{% set r = range(999) | list %}" + LOOP, "more time or memory"), ("{{ 7 ** (7 ** 9) }}", "more time or memory"),
    # only where the text is another one than at the trial
    (PLAIN + "{% if messages[0].content == 'b' %}{% set r = range(999) | list %}" + LOOP + "{% endif %}",
     "more than 1 s"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("template", "told"), FAILING)
def test_a_template_that_fails_or_never_ends_is_one_error(template: str, told: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"its chat template .*({told}).*--chat off"):
        Chat(tokenizer)


def test_limits_are_lifted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    with limited():
        pass
    with pytest.raises(TimeoutError, match="more than 0.01 s"), limited(0.01):
        while True:
            pass
    with pytest.raises(MemoryError), limited():
        bytearray(10**12)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_what_no_signal_interrupts_is_tried_elsewhere() -> None:
    """Python looks at signals between its operations: this one takes hours."""
    assert not ends_in_time(lambda: 7 ** (7**9), 0.05)
    assert ends_in_time(lambda: None) and ends_in_time(lambda: 1 / 0) and bounded.SECONDS >= 1
