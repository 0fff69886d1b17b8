"""A step over flat arrays: what `Llama3Inputs.buffers` lists, without a cache object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import ModelOutputs
from mlx_vlm_pipes.kv_cache import (
    CacheRow,
    KVCache,
    KVCacheInputs,
    Pages,
    RowCacheInputs,
    from_pages,
    pages_for,
    write_pages,
)

BUFFERS = (
    "(tokens, input_row_offsets, return_n_logits, *signal_buffers or data_parallel_splits, "
    "kv_blocks, cache_lengths, lookup_table, max_lengths)"
)


class BufferStep:
    """A language model, callable with cache inputs or with the documented flat arrays.

    Over arrays, each row's keys and values are copied out of its pages, and the step's new ones are
    written into `kv_blocks`: the array object that the caller holds. If `kv_blocks` was read from
    the rows of a cache, they get the new tokens as well, so that `increment_cache_lengths` and the
    next `prepare_*` go on from there. cache_lengths, lookup_table and the offsets are read on the
    host. For speed, hand `kv_cache_inputs` to `execute` instead.
    """

    def __init__(self, language: Callable[..., ModelOutputs], params: KVCacheParams) -> None:
        self.language, self.params = language, params

    def __call__(
        self,
        tokens: mx.array,
        input_row_offsets: mx.array,
        return_n_logits: mx.array,
        *cache: Any,
    ) -> ModelOutputs:
        """One step; cache is a KVCacheInputs (and what the language model takes behind it), or
        the other arrays of BUFFERS.

        Raises: TypeError for other arrays; InputError for arrays that contradict each other or
        the model, and for a quantised cache.
        """
        first = (tokens, input_row_offsets, return_n_logits)
        if cache and isinstance(cache[0], KVCacheInputs):
            return self.language(*first, *cache)
        counts: list[int] = np.diff(np.array(input_row_offsets).astype(np.int64)).tolist()
        step = _PagedStep(self.params, _cache_arrays(cache, len(counts)), counts)
        outputs = self.language(*first, KVCacheInputs([step.inputs]))
        step.write_back()
        return outputs


def _cache_arrays(arrays: Sequence[Any], rows: int) -> Sequence[mx.array]:
    """The four cache arrays, behind signal buffers (uint8) or data_parallel_splits (int64).

    The splits say where each replica's rows end; all rows are run on the one device.
    """
    middle, cache = arrays[:-4], arrays[-4:]
    is_flat = len(cache) == 4 and all(isinstance(a, mx.array) for a in arrays)
    if not is_flat or cache[0].ndim != 6 or any(a.ndim != 1 for a in middle):
        raise TypeError(f"the model takes {BUFFERS}, all of them arrays, or a KVCacheInputs")
    for array in middle:
        if array.dtype != mx.uint8 and int(array[-1].item()) != rows:
            raise InputError(f"data_parallel_splits end at {array[-1].item()} for {rows} rows")
    return cache


class _PagedStep:
    """Rows made from pages for one step, and the way of its new tokens back."""

    def __init__(
        self, params: KVCacheParams, arrays: Sequence[mx.array], counts: list[int]
    ) -> None:
        self.blocks, self.counts = arrays[0], counts
        lengths, table, longest = (np.array(a).astype(np.int64) for a in arrays[1:])
        self.starts: list[int] = lengths.tolist()
        self.source = self._source()
        _check(params, self.blocks, lengths, table, counts)
        wanted = (max(counts, default=0), max(self.starts, default=0))
        if longest.shape[-1:] != (2,) or (longest.reshape(-1, 2)[0] < wanted).any():
            raise InputError(f"max_lengths {longest.tolist()}, expected at least [{[*wanted]}]")
        self.pages: list[list[int]] = []
        cache, rows = KVCache(params), []
        for i, (start, count) in enumerate(zip(self.starts, counts, strict=True)):
            pages = table[i, : pages_for(start + count, params.page_size)].tolist()
            rows.append(self._row(cache, pages, start))
            self.pages.append(pages)
        if self.source is not None:
            for row, own in zip(rows, self.source.rows, strict=True):
                row.planned_length, row.adapter = own.planned_length, own.adapter
        self.inputs = RowCacheInputs(cache, rows)

    def _row(self, cache: KVCache, pages: list[int], length: int) -> CacheRow:
        row = cache.new_row()
        if length:
            row.write(from_pages(self.blocks, pages, length), 0)
        row.length = length
        return row

    def _source(self) -> RowCacheInputs | None:
        """The rows that kv_blocks was read from, if any.

        Raises: InputError if they are not as they were then.
        """
        if not isinstance(self.blocks, Pages):
            return None
        source = self.blocks.source
        source.require_counted()
        lengths = [row.length for row in source.rows]
        if lengths != self.starts:
            raise InputError(
                f"kv_blocks is of rows with {lengths} cached tokens, cache_lengths are "
                f"{self.starts}; read `buffers` again, or pass a copy, mx.array(kv_blocks)"
            )
        return source

    def write_back(self) -> None:
        """Write the step's keys and values into kv_blocks, and into the rows it was read from."""
        for i, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            tokens = self.inputs.cache.read(self.inputs.rows[i], start, start + count)
            write_pages(self.blocks, self.pages[i], tokens, start)
            if self.source is not None:
                row = self.source.rows[i]
                self.source.cache.release(row, keep=True)
                row.write(tokens, start)
        if self.source is not None:
            self.source.wrote(self.counts)


def _check(
    params: KVCacheParams,
    blocks: mx.array,
    lengths: np.ndarray,
    table: np.ndarray,
    counts: list[int],
) -> None:
    """Raises: InputError for arrays that contradict each other or the model."""
    if params.bits is not None:
        raise InputError(
            f"kv_blocks of a cache of {params.bits} bits are a dequantised copy and cannot be "
            "stepped over; use execute(inputs)"
        )
    if list(blocks.shape[1:]) != params.shape_per_block:
        raise InputError(
            f"kv_blocks {list(blocks.shape)}, expected [pages, *{params.shape_per_block}]"
        )
    if lengths.shape != (len(counts),) or table.ndim != 2 or len(table) != len(counts):
        raise InputError(
            f"cache_lengths {list(lengths.shape)} and lookup_table {list(table.shape)} for "
            f"{len(counts)} rows in input_row_offsets; expected [B] and [B, max_pages]"
        )
    for i, (length, count) in enumerate(zip(lengths.tolist(), counts, strict=True)):
        need = pages_for(length + count, params.page_size)
        pages = table[i, :need].tolist()
        if len(pages) < need or max(pages, default=-1) >= blocks.shape[0]:
            raise InputError(
                f"row {i} needs {need} pages of {params.page_size} tokens for {length} cached and "
                f"{count} new ones; lookup_table names {pages} of {blocks.shape[0]}"
            )
