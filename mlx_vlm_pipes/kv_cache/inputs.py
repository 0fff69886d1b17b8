"""Cache inputs of one step: rows, seen as arrays where somebody looks (docs/api.md#kv-cache)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import mlx.core as mx

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.kv_cache.cache import KVCache
from mlx_vlm_pipes.kv_cache.pages import page_table, pages_for, to_pages
from mlx_vlm_pipes.kv_cache.rows import CacheRow, Span

A = TypeVar("A")
B = TypeVar("B")


class KVCacheInputsPerDevice(Generic[A, B]):
    """A cache's arrays for one step, given by hand; they stay as they are (docs/api.md#kv-cache).

    kv_blocks [pages, 2, layers, page_size, KV heads, head_dim]; cache_lengths uint32 [B];
    lookup_table uint32 [B, max_pages]; max_lengths uint32 [steps, 2], longest active and longest
    cached length. kv_cache.pages says how the tokens lie.
    """

    def __init__(
        self,
        kv_blocks: A,
        cache_lengths: A,
        lookup_table: A,
        max_lengths: B,
        kv_scales: A | None = None,
    ) -> None:
        self._kv_blocks, self._cache_lengths = kv_blocks, cache_lengths
        self._lookup_table, self._max_lengths = lookup_table, max_lengths
        self._kv_scales = kv_scales

    @property
    def kv_blocks(self) -> A:
        return self._kv_blocks

    @property
    def cache_lengths(self) -> A:
        return self._cache_lengths

    @property
    def lookup_table(self) -> A:
        return self._lookup_table

    @property
    def max_lengths(self) -> B:
        return self._max_lengths

    @property
    def kv_scales(self) -> A | None:
        return self._kv_scales

    def expect(
        self, active_lengths: Sequence[int], whole_spans: Sequence[Sequence[Span]] = ()
    ) -> None:
        """Announce the coming step's active tokens of each row. Given arrays say it themselves."""

    def flatten(self) -> list[A | B]:
        """The arrays in order, None left out."""
        arrays = [self.kv_blocks, self.cache_lengths, self.lookup_table, self.max_lengths]
        return [a for a in (*arrays, self.kv_scales) if a is not None]


class RowCacheInputs(KVCacheInputsPerDevice[mx.array, mx.array]):
    """Rows of a `KVCache` that one step reads and extends. The step itself goes by rows.

    The arrays are made when somebody reads them, lazily, and are of the step to come.
    prepare_* announces its lengths by `expect`; before that, and once the step has run, there is
    no room behind the stored tokens and the longest active length is 0.

    kv_blocks is a copy in the cache dtype, pages numbered row by row (a quantised cache is
    dequantised; tokens of a step that is not counted yet are in it). kv_scales is None.
    """

    def __init__(self, cache: KVCache, rows: Sequence[CacheRow]) -> None:
        self.cache, self.rows = cache, list(rows)
        cache.require_own(self.rows)
        self._expected = [0] * len(self.rows)

    @property
    def kv_blocks(self) -> Pages:
        self.cache.require_own(self.rows)
        params = self.cache.params
        parts = [mx.zeros((0, *params.shape_per_block), params.dtype.to_mx())]
        for row, room in zip(self.rows, self._room(), strict=True):
            pages = pages_for(room, params.page_size)
            tokens = self.cache.read(row, 0, row.filled)
            parts.append(to_pages(tokens, pages, params.page_size))
        return Pages(mx.concatenate(parts), self)

    @property
    def cache_lengths(self) -> mx.array:
        return mx.array([row.length for row in self.rows], dtype=mx.uint32)

    @property
    def lookup_table(self) -> mx.array:
        return mx.array(page_table(self._room(), self.cache.params.page_size))

    @property
    def max_lengths(self) -> mx.array:
        longest = max((row.length for row in self.rows), default=0)
        return mx.array([[max(self._expected, default=0), longest]], dtype=mx.uint32)

    @property
    def kv_scales(self) -> None:
        return None

    def expect(
        self, active_lengths: Sequence[int], whole_spans: Sequence[Sequence[Span]] = ()
    ) -> None:
        """Announce the coming step: row i has active_lengths[i] tokens.

        Raises: InputError for another number of rows.
        """
        self._require_rows(len(active_lengths))
        self._expected = list(active_lengths)
        for row, spans in zip(self.rows, whole_spans, strict=bool(whole_spans)):
            row.whole_spans = spans

    def count(self, active_lengths: Sequence[int]) -> None:
        """Count what the step has written: all rows, or none where one raises InputError."""
        self._require_rows(len(active_lengths))
        for i, (row, count) in enumerate(zip(self.rows, active_lengths, strict=True)):
            if not isinstance(count, int) or not 0 <= count <= row.uncounted:
                raise InputError(
                    f"{count} tokens to count in row {i} where {row.uncounted} were written; "
                    "execute the step first, and call increment_cache_lengths once after it"
                )
        for row, count in zip(self.rows, active_lengths, strict=True):
            row.length, row.uncounted = row.length + count, 0

    def require_counted(self) -> None:
        """Raises: InputError if the step before wrote tokens that were never counted.

        And for rows that have been placed in another cache since.
        """
        self.cache.require_own(self.rows)
        for i, row in enumerate(self.rows):
            if row.uncounted:
                raise InputError(
                    f"row {i} holds {row.uncounted} tokens of the step before that are not "
                    "counted; call increment_cache_lengths once after each step"
                )

    def wrote(self, active_lengths: Sequence[int]) -> None:
        """A step has put so many tokens of each row behind its counted ones."""
        for row, count in zip(self.rows, active_lengths, strict=True):
            row.uncounted = count
        self._expected = [0] * len(self.rows)

    def _require_rows(self, rows: int) -> None:
        if rows != len(self.rows):
            raise InputError(
                f"kv_cache_inputs of {len(self.rows)} rows for a batch of {rows}; make them with "
                "a row for each context"
            )

    def _room(self) -> list[int]:
        """Tokens that the pages of each row have to hold."""
        pairs = zip(self.rows, self._expected, strict=True)
        return [max(row.filled, row.length + count) for row, count in pairs]


class Pages(mx.array):
    """`kv_blocks` of rows: an array like any other that knows the inputs it was made from.

    A step over it (nn.buffer_step) can so give its tokens to the rows, too.
    """

    def __init__(self, blocks: mx.array, source: RowCacheInputs) -> None:
        super().__init__(blocks)
        self.source = source


@dataclass
class KVCacheInputs(Generic[A, B]):
    """One entry per device; here always exactly one."""

    inputs: Sequence[KVCacheInputsPerDevice[A, B]] = field(default_factory=list)

    def flatten(self) -> list[A | B]:
        return [array for device in self.inputs for array in device.flatten()]

    def expect(
        self, active_lengths: Sequence[int], whole_spans: Sequence[Sequence[Span]] = ()
    ) -> None:
        """Announce the coming step's active tokens of each row; prepare_* calls it.

        whole_spans: for each row the positions whose tokens see each other both ways.

        Raises: InputError for another number of rows.
        """
        for device in self.inputs:
            device.expect(active_lengths, whole_spans)

    def __iter__(self) -> Iterator[KVCacheInputsPerDevice[A, B]]:
        return iter(self.inputs)


def cache_inputs(cache: KVCache, rows: Sequence[CacheRow]) -> KVCacheInputs[mx.array, mx.array]:
    """The KVCacheInputs of a step over these rows of a cache.

    Raises: InputError for a row given twice, and for one placed in another cache.
    """
    return KVCacheInputs([RowCacheInputs(cache, rows)])


def rows_of(inputs: KVCacheInputs) -> RowCacheInputs:
    """The rows behind cache inputs.

    Raises: TypeError for inputs that `cache_inputs` did not make.
    """
    kinds = [type(device).__name__ for device in inputs]
    if len(kinds) == 1 and isinstance(inputs.inputs[0], RowCacheInputs):
        return inputs.inputs[0]
    raise TypeError(
        f"kv_cache_inputs hold {', '.join(kinds) or 'nothing'}; expected rows of a KVCache: make "
        "them with cache_inputs(cache, rows)"
    )


def increment_cache_lengths(inputs: KVCacheInputs, active_lengths: Sequence[int]) -> None:
    """Count a step's tokens as cached: row i grows by active_lengths[i]. Call it once a step.

    Fewer than the step wrote may be counted; the others are given up (rejected drafts).
    Raises: TypeError for inputs that `cache_inputs` did not make, InputError for more tokens than
    were written and for another number of rows.
    """
    rows_of(inputs).count(active_lengths)
