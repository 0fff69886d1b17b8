"""What a row drafts, wherever the drafts come from, and whether enough of it is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

WIDEST = 8  # tokens of a row in a step over drafts
MOST = WIDEST - 1  # of a draft: the row's last token comes before it
LEAST_KEPT = 0.2  # share of drafted tokens that must be kept: below, a step over eight loses
RECENT = 0.5  # the last draft's weight in that share


class Drafts(ABC):
    """One row's drafts. most: tokens of each."""

    def __init__(self, most: int | None = None, share: float = 0.0) -> None:
        self.most = MOST if most is None else most
        self._share = share  # of the last drafts that was right

    @property
    def is_on(self) -> bool:
        """Whether drafts are run."""
        return self._share >= LEAST_KEPT

    def expected(self, count: int) -> float:
        """How many of so many drafted tokens will be kept, by those before."""
        return self._share * min(count, self.most)

    def note(self, kept: int, count: int) -> None:
        """So many of a draft's tokens were right."""
        self._share = self._with(kept / count)

    @abstractmethod
    def watch(self, tokens: np.ndarray) -> None:
        """A token has come that was not drafted, the last of int64 [n]."""

    def end(self, *, is_kept: bool) -> None:
        """The row's request has ended. is_kept: what is cached for it may serve later ones."""
        del is_kept

    def _with(self, share: float) -> float:
        """The share kept, once this one of a draft is counted."""
        return self._share + RECENT * (share - self._share)
