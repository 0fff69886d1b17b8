"""A step over flat arrays: what `Llama3Inputs.buffers` lists, without a cache object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import ModelOutputs, Phase, StepMode
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
    "kv_blocks, cache_lengths, lookup_table, max_lengths[, lora_ids, lora_grouped_offsets])"
)


class BufferStep:
    """A language model, callable with cache inputs or with flat arrays (docs/api.md#steps).

    Over arrays, each row's keys and values are copied out of its pages, and the step's new ones are
    written into `kv_blocks`: the array object that the caller holds. If `kv_blocks` was read from
    the rows of a cache, they get the new tokens as well, so that `increment_cache_lengths` and the
    next `prepare_*` go on from there. cache_lengths, lookup_table and the offsets are read on the
    host. For speed, hand `kv_cache_inputs` to `execute` instead.

    `buffers` holds no LoRA inputs: where adapters are loaded, lora_ids and lora_grouped_offsets
    follow behind it.
    """

    def __init__(
        self,
        language: Callable[..., ModelOutputs],
        params: KVCacheParams,
        adapters: Sequence[str] = (),
    ) -> None:
        self.language, self.params, self.adapters = language, params, adapters

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
        the model, for a quantised cache, and without LoRA inputs where adapters are loaded.
        """
        first = (tokens, input_row_offsets, return_n_logits)
        if cache and isinstance(cache[0], KVCacheInputs):
            return self.language(*first, *cache)
        counts: list[int] = np.diff(np.array(input_row_offsets).astype(np.int64)).tolist()
        arrays, groups = _cache_arrays(cache, len(counts))
        if self.adapters and not groups:
            raise InputError(
                f"buffers of a model with adapters ({', '.join(self.adapters)}) need lora_ids and "
                "lora_grouped_offsets behind them; append these, or use execute(inputs)"
            )
        step = _PagedStep(self.params, arrays, counts)
        mode = StepMode(Phase.PREFILL, *groups)
        outputs = self.language(*first, KVCacheInputs([step.inputs]), None, None, None, mode)
        step.write_back()
        return outputs


def _cache_arrays(
    arrays: Sequence[Any], rows: int
) -> tuple[Sequence[mx.array], Sequence[mx.array]]:
    """The four cache arrays, behind signal buffers (uint8) or data_parallel_splits (int64), and
    the LoRA inputs behind them, if any.

    The splits say where each replica's rows end; all rows are run on the one device.
    """
    is_flat = all(isinstance(a, mx.array) for a in arrays)
    pages = [i for i, a in enumerate(arrays) if is_flat and a.ndim == 6]
    begin = pages[0] if len(pages) == 1 else 0
    middle, cache, groups = arrays[:begin], arrays[begin : begin + 4], arrays[begin + 4 :]
    fits = len(pages) == 1 and len(cache) == 4 and len(groups) in (0, 2)
    if not fits or any(a.ndim != 1 for a in (*middle, *groups)):
        raise TypeError(f"the model takes {BUFFERS}, all of them arrays, or a KVCacheInputs")
    for array in middle:
        if array.dtype != mx.uint8 and int(array[-1].item()) != rows:
            raise InputError(f"data_parallel_splits end at {array[-1].item()} for {rows} rows")
    return cache, groups


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
                row.planned_length = own.planned_length
                row.position_delta = own.position_delta
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
