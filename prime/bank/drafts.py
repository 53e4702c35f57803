"""Drafts: known answers to a prompt, fed with it to see in one pass how far the model would have written the same.

Speculative decoding (Leviathan et al. 2023), with earlier answers in the place of a draft model.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from prime.bank.encoding import Tokens
from prime.bank.rows import Row

WORTH = 4  # tokens fed beside others that cost as much as a step of one token (a CPU at 30m: 4 to 5)
TRUSTED = 8  # drafts that count as right before any was tried


class Depth:
    """How many tokens of a draft are worth feeding, by how far earlier drafts agreed with the model.

    A token that agrees saves a step, and each one that is fed costs a part of one.
    """

    def __init__(self) -> None:
        self.fed, self.agreed = Counter[int](), Counter[int]()  # place in the draft -> drafts that reached it

    def note(self, fed: int, agreed: int) -> None:
        """Count a draft of which so many tokens were fed, and so many of these agreed."""
        self.fed.update(range(fed))
        self.agreed.update(range(agreed))

    @property
    def most(self) -> float:
        """Tokens of a draft that are worth feeding; infinite as long as drafts prove right."""
        return next((at for at in self.fed if self.fed[at] + TRUSTED > WORTH * (self.agreed[at] + TRUSTED)), math.inf)


class Drafts:
    """Known answers per prompt, most frequent first; a draft must begin with what the row has answered so far.

    Args:
        answers: per prompt, known answers of any length; they are cut before the first id that ends an answer.
        eos: ids that end an answer.
    """

    def __init__(self, answers: Sequence[Sequence[Tokens]], eos: Sequence[int] = ()):
        self.ends = frozenset(eos)
        self.ranked = [self._rank(known) for known in answers]
        self.first, self.later = Depth(), Depth()  # of drafts fed behind prompts, and of those that match an answer

    def _rank(self, known: Sequence[Tokens]) -> list[Tokens]:
        counted = Counter(tuple(takewhile(lambda token: token not in self.ends, answer)) for answer in known)
        return [answer for answer, _ in counted.most_common()]

    def longest(self, index: int) -> int:
        """Tokens that are fed behind a prompt at most."""
        return int(min(max(map(len, self.ranked[index]), default=0), self.first.most))

    def guess(self, row: Row, limit: float) -> Tokens:
        """At most `limit` tokens that continue the row's answer by the most frequent known answer that begins with it;
        none where no known answer does.
        """
        done = tuple(row.answer)
        for answer in self.ranked[row.index]:
            if limit > 0 and len(answer) > len(done) and answer[: len(done)] == done:
                return answer[len(done) : int(min(len(done) + limit, len(answer)))]
        return ()


def agreement(guess: Tokens, chosen: Sequence[int]) -> int:
    """Number of leading guessed tokens that the model would have written too."""
    for place, token in enumerate(guess):
        if token != chosen[place]:
            return place
    return len(guess)
