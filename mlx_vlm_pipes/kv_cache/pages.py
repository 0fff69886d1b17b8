"""Pages of the cache view (docs/api.md#kv-cache): how rows lie in them, there and back.

`kv_blocks` is [pages, 2, layers, page_size, KV heads, head_dim], 0 for keys and 1 for values; token
t of row i lies in page `lookup_table[i, t // page_size]` at place `t % page_size`. Between pages
and rows, the tokens of a row are one array [2, layers, KV heads, tokens, head_dim].
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


def pages_for(tokens: int, page_size: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // page_size)


def page_table(tokens: Sequence[int], page_size: int) -> np.ndarray:
    """uint32 [B, max_pages]: pages numbered row by row, for rows of so many tokens.

    Behind a row's last page stands the number of pages in all, which is no page.
    """
    counts = [pages_for(n, page_size) for n in tokens]
    table = np.full((len(counts), max(counts, default=0)), sum(counts), np.uint32)
    first = 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = np.arange(first, first + count)
        first += count
    return table


def to_pages(tokens: mx.array, pages: int, page_size: int) -> mx.array:
    """[2, L, K, n, D] -> [pages, 2, L, page_size, K, D], zeros behind the last token."""
    two, layers, heads, have, dim = tokens.shape
    pad = mx.zeros((two, layers, heads, pages * page_size - have, dim), tokens.dtype)
    whole = mx.concatenate([tokens, pad], axis=3)
    return whole.reshape(two, layers, heads, pages, page_size, dim).transpose(3, 0, 1, 4, 2, 5)


def from_pages(blocks: mx.array, pages: list[int], tokens: int) -> mx.array:
    """The first `tokens` tokens of a row that lies in these pages, [2, L, K, tokens, D]."""
    _, two, layers, size, heads, dim = blocks.shape
    own = mx.take(blocks, mx.array(pages, dtype=mx.uint32), axis=0)
    whole = own.transpose(1, 2, 4, 0, 3, 5).reshape(two, layers, heads, len(pages) * size, dim)
    return whole[:, :, :, :tokens]


def write_pages(blocks: mx.array, pages: list[int], tokens: mx.array, start: int) -> None:
    """Write tokens [2, L, K, n, D] of a row that lies in these pages from place `start` on.

    The array object that the caller holds is changed.
    """
    size = blocks.shape[3]
    places = np.arange(start, start + tokens.shape[3])
    page = mx.array(np.asarray(pages, np.uint32)[places // size])
    place = mx.array((places % size).astype(np.uint32))
    blocks[page, :, :, place] = tokens.transpose(3, 0, 1, 2, 4).astype(blocks.dtype)
