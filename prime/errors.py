"""The one exception for wrong input: scripts print it and exit with code 2, without a traceback."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LINES = 20


class InputError(Exception):
    """A mistake in a file or an option; `str(error)` is the whole message for the user."""

    @classmethod
    def many(cls, problems: Sequence[str], limit: int = MAX_LINES) -> InputError:
        """One error for a list of problems, a line each; beyond `limit` lines only their number is told."""
        lines = list(problems[:limit])
        if len(problems) > limit:
            lines.append(f"... and {len(problems) - limit} more")
        return cls("\n".join(lines))
