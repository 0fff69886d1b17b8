"""Drafts of an answer's next tokens, from what prompt and answer have said before.

Where the last tokens stood once already, what followed them there is proposed; one step then runs
all proposed tokens, and those that the model would have chosen itself are kept. A step over
several tokens takes longer than one over one, so a row drafts only while enough of it is kept.
While it does not, its drafts are compared with the tokens that come anyway, which costs nothing.
Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

import numpy as np

from mlx_vlm_pipes.engine.drafts import LEAST_KEPT, Drafts

LONGEST = 3  # last tokens that are looked for, then fewer


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


class Lookup(Drafts):
    """One row's drafts, looked up, and whether they are worth their time."""

    def __init__(self, most: int | None = None) -> None:
        super().__init__(most)
        self._guess: list[int] = []  # what is compared with the tokens that come
        self._right = 0  # how many have come as guessed

    def draft(self, tokens: np.ndarray, most: int) -> list[int]:
        """Up to `most` tokens to run behind those of prompt and answer, int64 [n]."""
        drafted = propose(tokens, min(most, self.most)) if most > 0 else []
        if not drafted:
            self.note(0, 1)
        return drafted

    def note(self, kept: int, count: int) -> None:
        super().note(kept, count)
        self._guess = []

    def watch(self, tokens: np.ndarray) -> None:
        if self._guess:
            if self._guess[self._right] == tokens[-1]:
                self._right += 1
                guessed = self._right / len(self._guess)
                is_enough = not self.is_on and self._with(guessed) >= LEAST_KEPT
                if self._right < len(self._guess) and not is_enough:
                    return
            self.note(self._right, len(self._guess))
        self._guess, self._right = propose(tokens, self.most), 0
