"""Chat templates: programs of strangers, run in a process of their own that has little time and memory.

transformers runs them in jinja's sandbox, which keeps them from files and attributes, but stops neither loops without
end nor texts that double.
"""

import json
import os
import resource
import signal
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from prime.checkpoints.tensors import first_line, shown
from prime.errors import InputError

SECONDS = 1.0  # of CPU time that a call may take, and
SECONDS_OF_CHAT = 0.01  # so many more for every chat
MEMORY = 128 << 20  # bytes that it may take

Chat = list[dict[str, str]]


def render_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], source: str, **options: Any) -> list[str]:
    """Each chat in the words of the tokenizer's own template: `apply_chat_template` with `tokenize=False`.

    Args:
        chats: lists of `{"role", "content"}`.
        source: directory of the tokenizer, for messages.
        options: further ones of `apply_chat_template`, such as `add_generation_prompt`.

    Raises:
        InputError: the template is broken, refuses a chat, takes more than its time and memory, or gives no text.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # of threads: torch's, which the other process leaves alone
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        _answer(writing, tokenizer, chats, options)
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:
            content = pipe.read(MEMORY)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    try:
        answer = json.loads(content)
    except ValueError:  # cut off, or nothing at all
        allowed = f"{_seconds(chats):g} s and {MEMORY >> 20} MiB"
        raise InputError(f"{source}: the chat template takes more than {allowed} for {len(chats)} chats") from None
    if isinstance(answer, str):
        raise InputError(f"{source}: the chat template cannot be used: {answer}")
    return answer


def _seconds(chats: Sequence[Chat]) -> float:
    return SECONDS + SECONDS_OF_CHAT * len(chats)


def _answer(writing: int, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], options: Mapping) -> None:
    """Write the texts, or the message of an error, as JSON; ends the process."""
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends it, whatever it does
        signal.setitimer(signal.ITIMER_PROF, _seconds(chats))
        with suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, **options) for chat in chats]
        content = json.dumps(texts).encode()
    except BaseException as error:  # the template may make jinja raise whatever it likes
        content = json.dumps(shown(first_line(error))).encode()
    try:
        with open(writing, "wb") as pipe:
            pipe.write(content)
    finally:
        os._exit(0)
