"""Strides of arrays that are never made: which views stay views, and who has to copy."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


def row_strides(shape: Shape) -> Shape:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Layout:
    """shape and strides in elements; held: how many elements of memory the array spans."""

    shape: Shape
    strides: Shape
    held: int

    @classmethod
    def rows(cls, shape: Shape) -> Layout:
        return cls(shape, row_strides(shape), math.prod(shape))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Every element of its memory once, in some order of the axes."""
        return self.held == self.size and 0 not in self._proper()

    @property
    def is_row_contiguous(self) -> bool:
        wanted = row_strides(self.shape)
        pairs = zip(self.shape, self.strides, wanted, strict=True)
        return self.held == self.size and all(a == b for n, a, b in pairs if n > 1)

    def _proper(self) -> list[int]:
        return [step for n, step in zip(self.shape, self.strides, strict=True) if n > 1]

    def transposed(self, axes: list[int]) -> Layout:
        shape = tuple(self.shape[a] for a in axes)
        return Layout(shape, tuple(self.strides[a] for a in axes), self.held)

    def broadcast(self, shape: Shape) -> Layout:
        lead = len(shape) - len(self.shape)
        strides = [0] * lead
        for have, want, step in zip(self.shape, shape[lead:], self.strides, strict=True):
            strides.append(step if have == want else 0)
        return Layout(shape, tuple(strides), self.held)

    def sliced(self, shape: Shape, steps: Shape) -> Layout:
        strides = tuple(a * b for a, b in zip(self.strides, steps, strict=True))
        held = (
            self.size
            if self.shape == shape
            else 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))
        )
        return Layout(shape, strides, held)

    def reshaped(self, shape: Shape) -> Layout | None:
        """The same memory as another shape, or None where that needs a copy."""
        if self.is_row_contiguous:
            return Layout.rows(shape)
        if 0 in self.shape:
            return Layout.rows(shape)
        runs = self._runs()
        strides: list[int] = []
        wanted = list(shape)
        for count, step in runs:
            left, sizes = count, []
            while wanted and left % wanted[0] == 0 and (left > 1 or wanted[0] == 1):
                sizes.append(wanted[0])
                left //= wanted.pop(0)
            if left != 1:
                return None
            strides += [step * inner for inner in row_strides(tuple(sizes))]
        strides += [1] * len(wanted)
        return Layout(shape, tuple(strides), self.held) if set(wanted) <= {1} else None

    def _runs(self) -> list[tuple[int, int]]:
        """Axes joined where one steps over exactly the next: sizes and strides."""
        runs: list[tuple[int, int]] = []
        for n, step in zip(self.shape, self.strides, strict=True):
            if n == 1:
                continue
            if runs and runs[-1][1] == n * step:
                runs[-1] = (runs[-1][0] * n, step)
            else:
                runs.append((n, step))
        return runs
