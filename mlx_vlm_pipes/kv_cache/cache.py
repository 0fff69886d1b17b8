"""The KV cache: rows that prefill alone and decode together.

A `CacheRow` holds one sequence. While it is prefilled it is *staged*: it owns its arrays. To
decode, rows are *placed* side by side in the batch arrays of the `KVCache`: a few groups of rows of
like lengths, whose sizes grow in buckets so that the compiled step sees few shapes. A single row is
placed without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.kv_cache.buckets import capacity_bucket, most_kept, partition
from mlx_vlm_pipes.kv_cache.groups import Move, RowGroup
from mlx_vlm_pipes.kv_cache.rows import CacheRow
from mlx_vlm_pipes.kv_cache.storage import Layer, by_group, cache_format


class KVCache:
    """The batch arrays that placed rows decode in, and the rows' book-keeping.

    What is held follows the sum of the rows' lengths (`most_kept`). A row's slot is its index in
    `placed`: the groups' rows one after the other.
    """

    def __init__(self, params: KVCacheParams) -> None:
        self.params = params
        self.format = cache_format(params)
        self.placed: list[CacheRow] = []
        self._groups: list[RowGroup] = []
        self._is_settled = True  # no row has left since rows were last placed

    def new_row(self) -> CacheRow:
        return CacheRow(self.format, self.params)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Slots and capacity of each group: what a step is compiled for."""
        return tuple((group.slots, group.capacity) for group in self._groups)

    @property
    def capacity(self) -> int:
        """Tokens that the slots of the largest group can hold; 0 before a row is placed."""
        return max((group.capacity for group in self._groups), default=0)

    @property
    def slots(self) -> int:
        """Places for rows in all groups, idle ones included."""
        return sum(group.slots for group in self._groups)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for group in self._groups for layer in group.layers for a in layer)

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
        """Put these rows into slots, with room for `extra` more tokens each.

        Other rows that are placed now are staged again. `slot_rows` says where the rows lie; one
        group alone has them in the given order, where it is made anew.
        """
        wanted = {id(row) for row in rows}
        for row in [row for row in self.placed if id(row) not in wanted]:
            self.release(row, keep=True)
        new = [row for row in rows if row.slot is None]
        if not new and self._is_settled and all(self._has_room(g, extra) for g in self._groups):
            return
        for row in new:
            row.reserve(row.length + 1)  # a row without tokens has no arrays yet
        needs = [row.length + extra for row in rows]
        moves, shares = self._as_they_lie(new, extra), partition(needs)
        held = sum(move.slots * move.capacity for move in moves)
        if len(moves) > len(shares) or held > most_kept(needs):
            moves = [Move([rows[i] for i in s.rows], s.slots, s.capacity) for s in shares]
        self._apply(moves)

    def release(self, row: CacheRow, *, keep: bool = False) -> None:
        """Take a row out of the batch; with keep it is staged again, holding its tokens.

        The row in the last slot of its group moves into the gap. Raises nothing for a staged row.
        """
        if row.slot is None:
            return
        group, index = self._find(row)
        if keep:
            row.stage(group.cut(index, row.filled))
        row.slot, self._is_settled = None, False
        group.remove(index)
        self._groups = [group for group in self._groups if group.rows]
        self._number()

    def copy_row(self, row: CacheRow, length: int) -> CacheRow:
        """A staged copy of a row's first `length` tokens, wherever the row lies."""
        if row.slot is None:
            return row.copy(length, length)
        group, index = self._find(row)
        twin = self.new_row()
        twin.length = length
        twin.stage(group.cut(index, length))
        return twin

    def read(self, row: CacheRow, start: int, stop: int) -> mx.array:
        """A row's tokens start..stop-1, wherever the row lies; the row holds that many. Lazy.

        [2, layers, KV heads, stop - start, head_dim] in the cache dtype: keys, then values.
        """
        params = self.params
        if start == stop:  # a row without tokens has no arrays yet
            shape = (2, params.num_layers, params.n_kv_heads_per_device, 0, params.head_dim)
            return mx.zeros(shape, self.format.dtype)
        place, index = (row, 0) if row.slot is None else self._find(row)
        own = [tuple(a[:, index : index + 1] for a in layer) for layer in place.layers]
        parts = [self.format.decode(layer, start, stop) for layer in own]
        return mx.stack([mx.concatenate([part[i] for part in parts]) for i in (0, 1)])

    def lengths(self) -> mx.array:
        """int32 [slots]: cached tokens of each slot, 0 for idle ones."""
        known = [[row.length for row in g.rows] + _idle(g) * [0] for g in self._groups]
        return mx.array([length for group in known for length in group], dtype=mx.int32)

    def slot_rows(self, rows: Sequence[CacheRow]) -> list[int | None]:
        """Which of these rows lies in each slot of the arrays; None for idle ones."""
        number = {id(row): i for i, row in enumerate(rows)}
        found: list[int | None] = []
        for group in self._groups:
            found += [number[id(row)] for row in group.rows]
            found += _idle(group) * [None]
        return found

    def take(self) -> list[mx.array]:
        """The batch arrays, flat: group by group, layer by layer.

        The cache drops them so that the step may write in place.
        """
        flat = [a for group in self._groups for layer in group.layers for a in layer]
        for group in self._groups:
            group.layers = []
        return flat

    def give(self, arrays: Sequence[mx.array]) -> None:
        """The step's new batch arrays, in the order of `take`."""
        given = by_group(arrays, self.format.width, self.params.num_layers)
        for group, layers in zip(self._groups, given, strict=True):
            group.layers = layers

    def _find(self, row: CacheRow) -> tuple[RowGroup, int]:
        """The group of a placed row, and its index there."""
        index = row.slot
        assert index is not None
        for group in self._groups:
            if index < len(group.rows):
                return group, index
            index -= len(group.rows)
        raise AssertionError("a placed row is in no group")

    def _has_room(self, group: RowGroup, extra: int) -> bool:
        return max(row.length for row in group.rows) + extra <= group.capacity

    def _as_they_lie(self, new: Sequence[CacheRow], extra: int) -> list[Move]:
        """The groups grown where they must, new rows in idle slots or in groups of their own."""
        members = [list(group.rows) for group in self._groups]
        sizes = [
            group.capacity
            if self._has_room(group, extra)
            else capacity_bucket(max(row.length for row in group.rows) + extra)
            for group in self._groups
        ]
        alone = []
        for row in new:
            need = row.length + extra
            fitting = [
                (size, i)
                for i, (group, size) in enumerate(zip(self._groups, sizes, strict=True))
                if len(members[i]) < group.slots and need <= size
            ]
            if fitting:
                members[min(fitting)[1]].append(row)
            else:
                alone.append(Move([row], 1, capacity_bucket(need)))
        moves = [
            Move(own, group.slots, size)
            for group, own, size in zip(self._groups, members, sizes, strict=True)
        ]
        return moves + alone

    def _apply(self, moves: Sequence[Move]) -> None:
        """Make these groups. Layer by layer, so that no more than one is there twice."""
        for move in moves:
            move.settle(self._groups)
        self._is_settled = True
        if all(move.is_there for move in moves):
            return
        made: list[list[Layer]] = [[] for _ in moves]
        for i in range(self.params.num_layers):
            for own, move in zip(made, moves, strict=True):
                own.append(move.layer(i, self.format, self.params))
            for group in self._groups:
                group.layers[i] = ()
            for move in moves:
                for row in move.rows:
                    row.drop(i)
            mx.eval([own[i] for own in made])
        for move in moves:
            for row in move.rows:
                row.take()
        self._groups = [
            RowGroup(list(move.rows), move.slots, move.capacity, layers)
            for move, layers in zip(moves, made, strict=True)
        ]
        self._number()

    def _number(self) -> None:
        self.placed = [row for group in self._groups for row in group.rows]
        for i, row in enumerate(self.placed):
            row.slot = i


def _idle(group: RowGroup) -> int:
    return group.slots - len(group.rows)
