"""Rows of the batch that share arrays, and how arrays are made of others, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.kv_cache.buckets import capacity_bucket, row_bucket
from mlx_vlm_pipes.kv_cache.rows import CacheRow
from mlx_vlm_pipes.kv_cache.storage import ROWS, TOKENS, CacheFormat, Layer, resize

IDLE_SHARE = 1.5  # a group that holds more than this of what its rows would be given is cut


@dataclass
class RowGroup:
    """Rows 0..n-1 of arrays with `slots` rows; the slots behind the last row are idle.

    The step writes position 0 of idle slots, which nobody reads.
    """

    rows: list[CacheRow]
    slots: int
    capacity: int
    layers: list[Layer]

    @property
    def held(self) -> int:
        """Tokens that the arrays have room for."""
        return self.slots * self.capacity

    def cut(self, index: int, length: int) -> list[Layer]:
        """A copy of a row's first tokens."""
        return [
            tuple(mx.contiguous(a[:, index : index + 1, :, :length]) for a in layer)
            for layer in self.layers
        ]

    def remove(self, index: int) -> None:
        """Take a row out; the last row moves into the gap, and idle space may be given up."""
        last = self.rows.pop()
        if index < len(self.rows):
            self.rows[index] = last
            source, start = len(self.rows), mx.array([index])
            for i, layer in enumerate(self.layers):
                self.layers[i] = tuple(
                    mx.slice_update(
                        a, mx.contiguous(a[:, source : source + 1]), start, axes=(ROWS,)
                    )
                    for a in layer
                )
        if self.rows:
            self._shrink()

    def _shrink(self) -> None:
        slots = row_bucket(len(self.rows))
        capacity = capacity_bucket(max(row.filled for row in self.rows) + 1)
        if self.held <= IDLE_SHARE * slots * capacity:
            return
        self.slots, self.capacity = min(slots, self.slots), min(capacity, self.capacity)
        for i, layer in enumerate(self.layers):
            self.layers[i] = tuple(
                mx.contiguous(a[:, : self.slots, :, : self.capacity]) for a in layer
            )


Source = tuple[RowGroup | CacheRow, int]  # where a row lies, and its index there


class Move:
    """One group to be, and what it is made of."""

    def __init__(self, rows: Sequence[CacheRow], slots: int, capacity: int) -> None:
        self.rows, self.slots, self.capacity = list(rows), slots, capacity
        self._base: RowGroup | None = None  # whose arrays it goes on with
        self._copied: list[tuple[int, CacheRow, Source]] = []  # slot, row, where it lies

    def settle(self, groups: Sequence[RowGroup]) -> None:
        """Find out where the rows lie, and whether a group's arrays can be gone on with."""
        where = {id(row): (group, i) for group in groups for i, row in enumerate(group.rows)}
        for group in groups:
            count = len(group.rows)
            if self.slots == group.slots and same_rows(self.rows[:count], group.rows):
                self._base = group
        for i, row in enumerate(self.rows):
            source = where.get(id(row), (row, 0))
            if self._base is None or source[0] is not self._base:
                self._copied.append((i, row, source))

    @property
    def is_there(self) -> bool:
        """Whether the group is already as it is to be."""
        return self._base is not None and self._base.capacity == self.capacity and not self._copied

    def layer(self, i: int, format: CacheFormat, params: KVCacheParams) -> Layer:
        """The arrays of one layer. Only what the rows hold is copied; nothing, if nothing moves."""
        if self._base is not None:
            made = self._base.layers[i]
        elif self.slots == 1 and isinstance(self._copied[0][2][0], CacheRow):
            return self._resized(self._copied[0][1].layers[i])
        else:
            made = format.empty(params, self.slots, self.capacity)
        made = self._resized(made)
        for slot, row, (place, index) in self._copied:
            parts = place.layers[i]
            written = []
            for old, new in zip(made, parts, strict=True):
                whole = old[...]  # a new array object: assignment must not reach another's
                whole[:, slot : slot + 1, :, : row.filled] = new[
                    :, index : index + 1, :, : row.filled
                ]
                written.append(whole)
            made = tuple(written)
        return made

    def _resized(self, layer: Layer) -> Layer:
        return layer if layer[0].shape[TOKENS] == self.capacity else resize(layer, self.capacity)


def same_rows(a: Sequence[CacheRow], b: Sequence[CacheRow]) -> bool:
    """Whether these are the same rows in the same order."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
