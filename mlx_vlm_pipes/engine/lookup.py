"""Drafts of an answer's next tokens, from what prompt and answer have said before.

Where the last tokens stood once already, what followed them there is proposed; one step then runs
all proposed tokens, and those that the model would have chosen itself are kept. A step over
several tokens takes longer than one over one, so a row drafts only while enough of it is kept.
While it does not, its drafts are compared with the tokens that come anyway, which costs nothing.
Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

import numpy as np

LONGEST = 3  # last tokens that are looked for, then fewer
DRAFT = 7  # tokens of a draft: with the one before it, a step over eight
LEAST_KEPT = 0.2  # share of drafted tokens that must be kept: below, a step over eight loses
RECENT = 0.5  # the last draft's weight in that share


def propose(tokens: np.ndarray, count: int) -> list[int]:
    """The `count` tokens that followed the last ones of int64 [n] where these stood before.

    Of the places where most of them stood, the latest. What repeats itself goes on so. Empty where
    the last token is new.
    """
    for size in range(min(LONGEST, len(tokens) - 1), 0, -1):
        ends = tokens[size - 1 : -1] == tokens[-1]
        for back in range(1, size):
            ends &= tokens[size - 1 - back : -1 - back] == tokens[-1 - back]
        found = np.flatnonzero(ends)
        if len(found):
            begin = int(found[-1]) + size
            return tokens[begin + np.arange(count) % (len(tokens) - begin)].tolist()
    return []


class Lookup:
    """One row's drafts, and whether they are worth their time.

    drafted, kept: tokens that were run as drafts, and those of them that the answer has.
    """

    def __init__(self) -> None:
        self.drafted = self.kept = 0
        self._share = 0.0  # of the last drafts that was right
        self._guess: list[int] = []  # what is compared with the tokens that come
        self._right = 0  # how many have come as guessed

    @property
    def is_on(self) -> bool:
        """Whether drafts are run."""
        return self._share >= LEAST_KEPT

    def draft(self, tokens: np.ndarray, most: int) -> list[int]:
        """Up to `most` tokens to run behind those of prompt and answer, int64 [n]."""
        drafted = propose(tokens, min(most, DRAFT)) if most > 0 else []
        if not drafted:
            self.note(0.0)
        return drafted

    def expected(self, count: int) -> float:
        """How many of so many drafted tokens will be kept, by those before."""
        return self._share * count

    def note(self, share: float) -> None:
        """This share of a draft was right."""
        self._share = self._with(share)
        self._guess = []

    def watch(self, tokens: np.ndarray) -> None:
        """A token has come that was not drafted, the last of int64 [n]."""
        if self._guess:
            if self._guess[self._right] == tokens[-1]:
                self._right += 1
                is_enough = not self.is_on and self._with(self._guessed) >= LEAST_KEPT
                if self._right < len(self._guess) and not is_enough:
                    return
            self.note(self._guessed)
        self._guess, self._right = propose(tokens, DRAFT), 0

    @property
    def _guessed(self) -> float:
        """The share of the guess that has come."""
        return self._right / len(self._guess)

    def _with(self, share: float) -> float:
        """The share kept, once this one of a draft is counted."""
        return self._share + RECENT * (share - self._share)
