"""Messages, and the one exception for wrong input: scripts print it and exit with code 2, without a traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

MAX_LINES = 20

# What steers a terminal or turns the text around it: control characters, and those of writing direction.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """A message as it may be printed: names out of a file (ids, tensors) may hold anything, and what would steer a
    terminal is written as its code.
    """
    return STEERING.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def tell(message: str) -> None:
    """Print a message beside the results."""
    print(harmless(message), file=sys.stderr)


class InputError(Exception):
    """A mistake in a file or an option; `str(error)` is the whole message for the user."""

    def __init__(self, message: str):
        super().__init__(harmless(message))

    @classmethod
    def many(cls, problems: Sequence[str], limit: int = MAX_LINES) -> InputError:
        """One error for a list of problems, a line each; beyond `limit` lines only their number is told."""
        lines = list(problems[:limit])
        if len(problems) > limit:
            lines.append(f"... and {len(problems) - limit} more")
        return cls("\n".join(lines))
