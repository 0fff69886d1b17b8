"""The processes that run one model together, and the sums between them (mx.distributed)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx


@dataclass(frozen=True)
class Ranks:
    """This process among those of a model: `rank` of `size`. Alone, everything below is a no-op.

    Every rank must ask for the same sums in the same order, and an order is only what depends on
    each other: sums in another order give garbage, a sum that a rank leaves out hangs the others.
    """

    rank: int = 0
    size: int = 1
    group: mx.distributed.Group | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that people talk to: it samples, and it owns the tower."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        return self.size > 1

    def sum(self, x: mx.array) -> mx.array:
        """The ranks' x added up, lazily; any shape, the same on all ranks."""
        return mx.distributed.all_sum(x, group=self.group) if self.are_many else x

    def total(self, number: int) -> int:
        """The ranks' numbers added up, at once; below 2**31."""
        return cast("int", self.sum(mx.array(number, dtype=mx.int32)).item())

    def from_first(self, x: mx.array) -> mx.array:
        """Rank 0's x on every rank, lazily: what the others give only says its shape and dtype.

        What comes back depends on everybody's x, so it cannot overtake the sums that x is made of.
        """
        if not self.are_many:
            return x
        return self.sum(mx.where(mx.array(self.is_first), x, mx.zeros_like(x)))

    def joined(self, x: mx.array, widths: Sequence[int]) -> mx.array:
        """The ranks' columns side by side: x [..., widths[rank]] -> [..., sum(widths)], lazily."""
        if not self.are_many:
            return x
        missing = max(widths) - x.shape[-1]
        padded = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
        parts = mx.split(mx.distributed.all_gather(padded[None], group=self.group), self.size)
        cut = [part[0, ..., :width] for part, width in zip(parts, widths, strict=True)]
        return mx.concatenate(cut, axis=-1)


ALONE = Ranks()


def shares(units: int, size: int) -> list[tuple[int, int]]:
    """`units` whole things over `size` ranks, as evenly as they go: (begin, end) of each rank."""
    bounds = [units * rank // size for rank in range(size + 1)]
    return list(itertools.pairwise(bounds))
