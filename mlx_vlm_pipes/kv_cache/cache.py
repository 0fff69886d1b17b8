"""The KV cache: rows that prefill alone and decode together.

A `CacheRow` holds one sequence. While it is prefilled it is *staged*: it owns its arrays. To
decode, rows are *placed* side by side in the batch arrays of the `KVCache`, whose sizes grow in
buckets so that the compiled step sees few shapes. A single row is placed without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.kv_cache.storage import (
    CacheFormat,
    Layer,
    cache_format,
    resize,
    write_prefill,
)

_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


def capacity_bucket(tokens: int) -> int:
    """Smallest capacity that holds `tokens`: steps of 64 to 256, 128 to 1024, then 256."""
    step = 64 if tokens <= 256 else 128 if tokens <= 1024 else 256
    return max(64, -(-tokens // step) * step)


def row_bucket(rows: int) -> int:
    """Smallest batch size that the compiled step is traced for: powers of two, then 64s."""
    return next((b for b in _ROW_BUCKETS if b >= rows), -(-rows // 64) * 64)


Span = tuple[int, int]  # begin and end of positions in a sequence


class CacheRow:
    """One sequence's keys and values. `length` counts the cached tokens."""

    def __init__(self, format: CacheFormat, params: KVCacheParams) -> None:
        self.length = 0
        self.uncounted = 0  # tokens that a step has written behind `length`, not counted yet
        self.planned_length = 0  # tokens that prefill will reach in all, where it is chunked
        self.position_delta = 0  # a planned row's last position less its last index (M-RoPE)
        # positions whose tokens see each other both ways: all of a span in one step
        self.whole_spans: Sequence[Span] = ()
        self.slot: int | None = None  # index in the batch arrays; None while staged
        self.format = format
        self._params = params
        self._layers: list[Layer] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the staged arrays; a placed row owns none."""
        return sum(a.nbytes for layer in self._layers for a in layer)

    @property
    def planned_reach(self) -> int | None:
        """1 + the largest position of the planned tokens; None where nothing is planned."""
        return self.planned_length + self.position_delta if self.planned_length else None

    @property
    def filled(self) -> int:
        """Tokens that lie in the arrays, counted or not."""
        return self.length + self.uncounted

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all. The row must be staged."""
        if not self._layers:
            capacity = capacity_bucket(tokens)
            self._layers = [
                self.format.empty(self._params, 1, capacity) for _ in range(self._params.num_layers)
            ]
        elif self._layers[0][0].shape[2] < tokens:
            capacity = capacity_bucket(tokens)
            self._layers = [resize(layer, capacity) for layer in self._layers]

    def append(self, layer: int, keys: mx.array, values: mx.array, start: int) -> Layer:
        """Write keys and values [1, K, T, D] from `start` on; returns the layer's arrays."""
        new = self.format.encode(keys, values)
        self._layers[layer] = write_prefill(self._layers[layer], new, start)
        return self._layers[layer]

    def write(self, tokens: mx.array, start: int) -> None:
        """Write tokens [2, layers, K, T, D] from `start` on. The row must be staged."""
        self.reserve(start + tokens.shape[3] + 1)
        for i in range(self._params.num_layers):
            self.append(i, tokens[0, i : i + 1], tokens[1, i : i + 1], start)

    def take(self) -> list[Layer]:
        """Hand the staged arrays over; the row keeps no reference."""
        layers, self._layers = self._layers, []
        return layers

    def stage(self, layers: list[Layer]) -> None:
        self._layers, self.slot = layers, None

    def copy(self, length: int, capacity: int) -> CacheRow:
        """A staged copy of the first `length` tokens, with room for `capacity`."""
        twin = CacheRow(self.format, self._params)
        twin.length = length
        twin._layers = [
            resize(tuple(a[:, :, :length] for a in layer), max(capacity, length))
            for layer in self._layers
        ]
        return twin

    @property
    def layers(self) -> Sequence[Layer]:
        """The staged arrays by layer; none before the first token and in a placed row."""
        return self._layers

    def arrays(self) -> list[mx.array]:
        """The staged arrays, to be evaluated together with a step."""
        return [a for layer in self._layers for a in layer]


class KVCache:
    """The batch arrays that placed rows decode in, and the rows' book-keeping.

    Rows are placed at slots 0..n-1; the arrays have `row_bucket(n)` rows. Slots behind the last
    row are idle: the step writes their position 0, which nobody reads.
    """

    def __init__(self, params: KVCacheParams) -> None:
        self.params = params
        self.format = cache_format(params)
        self.placed: list[CacheRow] = []
        self._layers: list[Layer] = []

    def new_row(self) -> CacheRow:
        return CacheRow(self.format, self.params)

    @property
    def capacity(self) -> int:
        """Tokens that each slot can hold; 0 before the first row is placed."""
        return self._layers[0][0].shape[2] if self._layers else 0

    @property
    def slots(self) -> int:
        return self._layers[0][0].shape[0] if self._layers else 0

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for layer in self._layers for a in layer)

    def can_place(self, rows: Sequence[CacheRow]) -> bool:
        """Whether placing exactly these rows would push out none that is placed now."""
        wanted = {id(row) for row in rows}
        return all(id(row) in wanted for row in self.placed)

    def require_own(self, rows: Sequence[CacheRow]) -> None:
        """Raises: InputError for a row given twice, and for one placed in another cache."""
        if len({id(row) for row in rows}) != len(rows):
            raise InputError("a row of the cache is given twice; make one for each context")
        for i, row in enumerate(rows):
            if row.slot is not None and row is not next(iter(self.placed[row.slot :]), None):
                raise InputError(
                    f"row {i} lies in another KVCache; give the rows of one cache in a step"
                )

    def place(self, rows: Sequence[CacheRow], extra: int = 1) -> None:
        """Put these rows, in this order, into slots 0..n-1, with room for `extra` more tokens.

        Other rows that are placed now are staged again.
        """
        wanted = {id(row) for row in rows}
        for row in [row for row in self.placed if id(row) not in wanted]:
            self.release(row, keep=True)
        need = max(row.length for row in rows) + extra
        in_order = all(row.slot in (None, i) for i, row in enumerate(rows))
        new = [row for row in rows if row.slot is None]
        for row in new:
            row.reserve(row.length + 1)  # a row without tokens has no arrays yet
        if in_order and row_bucket(len(rows)) == self.slots and len(rows) >= len(self.placed):
            self._grow(need)
            for i, row in enumerate(rows):
                if row.slot is None:
                    self._insert(i, row)
        elif len(rows) == 1 and new:
            self._adopt(new[0], need)
        else:
            self._rebuild(rows, need)
        for i, row in enumerate(rows):
            row.slot = i
        self.placed = list(rows)

    def release(self, row: CacheRow, *, keep: bool = False) -> None:
        """Take a row out of the batch; with keep it is staged again, holding its tokens.

        The row in the last slot moves into the gap. Raises nothing for a staged row.
        """
        if row.slot is None:
            return
        slot, last = row.slot, len(self.placed) - 1
        if keep:
            row.stage(self._cut(slot, row.filled))
        row.slot = None
        moved = self.placed.pop()
        if slot != last:
            self._move(last, slot)
            moved.slot = slot
            self.placed[slot] = moved
        if not self.placed:
            self._layers = []
        else:
            self._shrink()

    def copy_row(self, row: CacheRow, length: int) -> CacheRow:
        """A staged copy of a row's first `length` tokens, wherever the row lies."""
        if row.slot is None:
            return row.copy(length, length)
        twin = self.new_row()
        twin.length = length
        twin.stage(self._cut(row.slot, length))
        return twin

    def read(self, row: CacheRow, start: int, stop: int) -> mx.array:
        """A row's tokens start..stop-1, wherever the row lies; the row holds that many. Lazy.

        [2, layers, KV heads, stop - start, head_dim] in the cache dtype: keys, then values.
        """
        params = self.params
        if start == stop:  # a row without tokens has no arrays yet
            shape = (2, params.num_layers, params.n_kv_heads, 0, params.head_dim)
            return mx.zeros(shape, self.format.dtype)
        layers, slot = (row.layers, 0) if row.slot is None else (self._layers, row.slot)
        own = [tuple(a[slot : slot + 1] for a in layer) for layer in layers]
        parts = [self.format.decode(layer, start, stop) for layer in own]
        return mx.stack([mx.concatenate([part[i] for part in parts]) for i in (0, 1)])

    def lengths(self) -> mx.array:
        """int32 [slots]: cached tokens of each slot, 0 for idle ones."""
        known = [row.length for row in self.placed]
        return mx.array(known + [0] * (self.slots - len(known)), dtype=mx.int32)

    def take(self) -> list[mx.array]:
        """The batch arrays, flat; the cache drops them so that the step may write in place."""
        flat = [a for layer in self._layers for a in layer]
        self._layers = []
        return flat

    def give(self, arrays: Sequence[mx.array]) -> None:
        """The step's new batch arrays, in the order of `take`."""
        width = len(arrays) // self.params.num_layers
        self._layers = [tuple(arrays[i : i + width]) for i in range(0, len(arrays), width)]

    def _shrink(self) -> None:
        """Give up idle rows, and capacity where less than half of it is needed."""
        rows = row_bucket(len(self.placed))
        capacity = capacity_bucket(max(row.filled for row in self.placed) + 1)
        if 2 * capacity > self.capacity:
            capacity = self.capacity
        if rows < self.slots or capacity < self.capacity:
            self._layers = [
                tuple(mx.contiguous(a[:rows, :, :capacity]) for a in x) for x in self._layers
            ]

    def _grow(self, tokens: int) -> None:
        if self.capacity < tokens:
            capacity = capacity_bucket(tokens)
            self._layers = [resize(layer, capacity) for layer in self._layers]

    def _adopt(self, row: CacheRow, tokens: int) -> None:
        """A lone row's own arrays become the batch arrays."""
        row.reserve(tokens)
        self._layers = row.take()

    def _insert(self, slot: int, row: CacheRow) -> None:
        """Copy a staged row into a free slot, in place."""
        start = mx.array([slot])
        for i, parts in enumerate(row.take()):
            width = min(parts[0].shape[2], self.capacity)
            self._layers[i] = tuple(
                mx.slice_update(old, new[:, :, :width], start, axes=(0,))
                for old, new in zip(self._layers[i], parts, strict=True)
            )

    def _move(self, source: int, target: int) -> None:
        start = mx.array([target])
        for i, layer in enumerate(self._layers):
            self._layers[i] = tuple(
                mx.slice_update(a, mx.contiguous(a[source : source + 1]), start, axes=(0,))
                for a in layer
            )

    def _cut(self, slot: int, length: int) -> list[Layer]:
        return [
            tuple(mx.contiguous(a[slot : slot + 1, :, :length]) for a in layer)
            for layer in self._layers
        ]

    def _rebuild(self, rows: Sequence[CacheRow], tokens: int) -> None:
        """New batch arrays with these rows in this order."""
        capacity, idle = capacity_bucket(tokens), row_bucket(len(rows)) - len(rows)
        parts = [
            self._cut(row.slot, row.length) if row.slot is not None else row.take() for row in rows
        ]
        if idle:
            blank = self.format.empty(self.params, idle, capacity)
            parts.append([blank] * self.params.num_layers)
        self._layers = [
            tuple(mx.concatenate(list(column), axis=0) for column in zip(*layer, strict=True))
            for layer in zip(
                *[[resize(layer, capacity) for layer in row] for row in parts], strict=True
            )
        ]
