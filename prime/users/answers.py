"""Which answers a task knows: labels, numbers on a scale, or any text."""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = 1e6  # a larger "score" is no answer but a text of digits that did not end


@dataclass(frozen=True)
class Choices:
    """The answers that are possible; neither labels nor a scale: any text.

    Args:
        scale: its ends, lowest first.
        ignore_case: whether `Rock` is the label `rock`.
    """

    labels: tuple[str, ...] | None = None
    scale: tuple[float, float] | None = None
    ignore_case: bool = False

    @property
    def limited(self) -> bool:
        """Whether an answer can be outside."""
        return self.labels is not None or self.scale is not None

    def plain(self, text: str) -> str:
        """A text as answers are compared: without surrounding white space, and without case where it does not count."""
        return text.strip().casefold() if self.ignore_case else text.strip()

    def label(self, text: str) -> str | None:
        """The label that a text is, if it is one."""
        known = self.plain(text)
        return next((label for label in self.labels or () if self.plain(label) == known), None)

    def written(self, text: str) -> str:
        """An answer as the task writes it: its own spelling of the label, and `8` for `8.0`."""
        if self.scale is not None and (value := number(text)) is not None:
            return f"{value:.10g}"
        return self.label(text) or text

    def outside(self, text: str) -> bool:
        """Whether a text is no number on the scale or, without a scale, none of the labels."""
        if self.scale is not None:
            value = number(text)
            return value is None or not self.scale[0] <= value <= self.scale[1]
        return self.labels is not None and self.label(text) is None


ANY_TEXT = Choices()


def number(text: str) -> float | None:
    """The number that a text is; None: no number, or none that could be a rating."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= LIMIT else None  # also refuses nan and inf
