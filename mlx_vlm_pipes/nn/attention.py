"""Attention against a KV cache: exact rows while prefilling, whole capacity while decoding.

Plain caches go through MLX's fused attention. Quantised ones are read in tiles with an online
softmax, so that neither the scores nor the dequantised cache ever exist whole. On a GPU prefill
dequantises one layer instead: tiles would be thousands of kernels, and the fused attention holds no
scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.kv_cache import (
    CacheFormat,
    Layer,
    PlainFormat,
    QuantizedFormat,
    Span,
    sides,
)
from mlx_vlm_pipes.rounding import attend

TILE = 256  # tokens of a quantised cache that prefill dequantises at a time
DECODE_TILE = 2048  # tokens whose scores a decode step holds at a time; nothing is dequantised
WHOLE_SCORES = 1 << 24  # numbers that a decode step on a GPU may hold at once: there kernels count
_HIDDEN = -1e30  # the score of a key that is not seen


def merge_heads(x: mx.array) -> mx.array:
    """[1, heads, T, D] -> [T, heads * D]."""
    return x[0].transpose(1, 0, 2).reshape(x.shape[2], -1)


def causal_mask(
    start: int, stop: int, window: int | None, spans: Sequence[Span] = ()
) -> mx.array | str:
    """For queries start..stop-1 over keys 0..stop-1: "causal", or bool [T, S] where a window hides
    keys, or a span of tokens that see each other both ways shows later ones."""
    is_plain = window is None or stop <= window
    if is_plain and not _meeting(spans, start, stop):
        return "causal"
    return _visible((start, stop), (0, stop), None if is_plain else window, spans)


def _meeting(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The spans with positions among start..stop-1."""
    return [span for span in spans if span[0] < stop and span[1] > start]


def _visible(queries: Span, keys: Span, window: int | None, spans: Sequence[Span]) -> mx.array:
    """bool [T, S]: which keys a query sees; a window hides keys of the query's own span too.

    Source: transformers modeling_gemma3.py, create_masks_for_vision_model.
    """
    query, key = mx.arange(*queries)[:, None], mx.arange(*keys)[None]
    mask = key <= query
    if _meeting(spans, *queries):
        own, other = _span_numbers(spans, queries), _span_numbers(spans, keys)
        mask = mask | mx.array((own[:, None] == other[None]) & (own[:, None] > 0))
    return mask if window is None else mask & (key > query - window)


def _span_numbers(spans: Sequence[Span], positions: Span) -> np.ndarray:
    """int [T]: 1 + the number of the span that each position is in, 0 outside of all."""
    first, last = positions
    numbers = np.zeros(last - first, np.int32)
    for i, (begin, end) in enumerate(spans):
        numbers[max(begin - first, 0) : max(end - first, 0)] = i + 1
    return numbers


def decode_mask(lengths: mx.array, capacity: int, window: int | None, width: int = 1) -> mx.array:
    """bool [B, 1, width, capacity]: the cached tokens of each row, and of the new ones from
    `lengths` on each up to itself."""
    key, last = mx.arange(capacity)[None], lengths[:, None]
    if width > 1:
        key, last = key[None], (last + mx.arange(width))[..., None]
    mask = key <= last
    if window is not None:
        mask = mask & (key > last - window)
    return mask[:, None, None, :] if width == 1 else mask[:, None]


def prefill_attention(
    q: mx.array,
    fresh: tuple[mx.array, mx.array],
    cached: Layer,
    format: CacheFormat,
    start: int,
    scale: float,
    window: int | None,
    spans: Sequence[Span] = (),
) -> mx.array:
    """One row's new queries against all its keys.

    Args: q [1, H, T, D]; fresh keys and values [1, K, T, D]; cached: the layer's arrays with the
    fresh tokens written at start..start+T-1; spans: positions whose tokens see each other both
    ways, none of them reaching beyond the fresh tokens. Returns: [1, H, T, D].
    """
    stop = start + q.shape[2]
    if isinstance(format, QuantizedFormat) and not format.on_gpu:
        return _tiled(q, cached, format, scale, start, window, spans)
    is_fresh = start == 0 and isinstance(format, PlainFormat)
    keys, values = fresh if is_fresh else format.decode(cached, 0, stop)
    mask = causal_mask(start, stop, window, spans)
    return attend(q, keys.astype(q.dtype), values.astype(q.dtype), scale=scale, mask=mask)


def decode_attention(
    q: mx.array, cached: Layer, format: CacheFormat, mask: mx.array, scale: float
) -> mx.array:
    """Queries of each row, [B, H, T, D], against the whole capacity; T is 1 in a decode step.

    mask [B, 1, T, capacity]; a plain cache takes one for each head too.
    """
    if isinstance(format, PlainFormat):
        keys, values = sides(cached[0])
        return attend(q, keys.astype(q.dtype), values.astype(q.dtype), scale=scale, mask=mask)
    grouped = _grouped(q, cached[0].shape[2])  # [B, K, H / K * T, D]
    if q.shape[2] > 1:
        mask = mx.tile(mask, (1, 1, q.shape[1] // cached[0].shape[2], 1))
    capacity = mask.shape[-1]
    whole = WHOLE_SCORES // (q.shape[0] * q.shape[1]) if format.on_gpu else 0
    if capacity <= max(DECODE_TILE, whole):
        scores = format.scores(grouped, cached)
        if math.frexp(scale)[0] != 0.5:  # a power of two leaves the digits of any type
            scores = scores.astype(mx.float32)
        scores = mx.where(mask, scores * scale, mx.finfo(scores.dtype).min)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return format.mix(weights, cached).reshape(q.shape).astype(q.dtype)
    state = None
    for begin in range(0, capacity, DECODE_TILE):
        tile = tuple(a[:, :, :, begin : begin + DECODE_TILE] for a in cached)
        scores = format.scores(grouped, tile).astype(mx.float32) * scale
        state = _merge(state, scores, mask[..., begin : begin + DECODE_TILE], _packed(format, tile))
    assert state is not None
    return (state[0] / state[2]).reshape(q.shape).astype(q.dtype)


def _tiled(
    q: mx.array,
    cached: Layer,
    format: QuantizedFormat,
    scale: float,
    start: int,
    window: int | None,
    spans: Sequence[Span],
) -> mx.array:
    """Prefill over a quantised cache: blocks of queries, tiles of keys up to the diagonal, or to
    the end of a span that a query is in.

    Each tile depends on the one before it: left to itself, MLX may compute the scores and the
    dequantised keys of them all before it adds up the first.
    """
    heads, dim = cached[0].shape[2], q.shape[-1]
    blocks: list[mx.array] = []
    stop = start + q.shape[2]
    for first in range(start, stop, TILE):
        last = min(first + TILE, stop)
        block = q[:, :, first - start : last - start].astype(mx.float32) * scale
        grouped, state = _grouped(block, heads), None  # [1, K, H / K * T, D]
        near = _meeting(spans, first, last)
        newest = max([last, *(end for _, end in near)])
        before = blocks[-1:]
        oldest = 0 if window is None else max(0, first - window + 1) // TILE * TILE
        for begin in range(oldest, newest, TILE):
            end = min(begin + TILE, newest)
            tile = tuple(mx.depends(list(cached), before)) if before else cached
            keys, values = (
                x.astype(mx.float32) for x in format.decode(tile, begin, end)
            )  # [1, K, S, D]
            mask = _tile_mask((first, last), (begin, end), window, near, q.shape[1] // heads)
            scores = grouped @ keys.swapaxes(-1, -2)
            state = _merge(state, scores, mask, _plain(values))
            before = [state[0]]
        assert state is not None
        block = (state[0] / state[2]).reshape(1, q.shape[1], last - first, dim).astype(q.dtype)
        blocks.append(block)
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _grouped(q: mx.array, kv_heads: int) -> mx.array:
    """[B, H, T, D] -> [B, K, H / K * T, D]: the queries that share a key head together."""
    return q.reshape(q.shape[0], kv_heads, -1, q.shape[-1])


def _tile_mask(
    queries: Span, keys: Span, window: int | None, spans: Sequence[Span], group: int
) -> mx.array | None:
    """bool [group * T, S] of a tile; None where every query sees every key."""
    (first, last), (begin, end) = queries, keys
    if end <= first + 1 and (window is None or begin > last - 1 - window):
        return None
    return mx.tile(_visible(queries, keys, window, spans), (group, 1))


def _plain(values: mx.array) -> Callable[[mx.array], mx.array]:
    """Weights [B, K, R, S] -> their mix of values [B, K, S, D]."""
    return lambda weights: weights @ values


def _packed(format: QuantizedFormat, tile: Layer) -> Callable[[mx.array], mx.array]:
    """Weights [B, K, R, S] -> their mix of a tile's packed values, [B, K, R, D]."""
    return lambda weights: format.mix(weights, tile)


State = tuple[mx.array, mx.array, mx.array]  # weighted values, running maximum, running sum


def _merge(
    state: State | None,
    scores: mx.array,
    mask: mx.array | None,
    mix: Callable[[mx.array], mx.array],
) -> State:
    """Add one tile to an online softmax, in float32. Source: Milakov & Gimelshein 2018.

    Args: scores [B, K, R, S] of the tile; mask, broadcast to them; mix, weights [B, K, R, S] to
    weighted values [B, K, R, D].
    """
    scores = scores.astype(mx.float32)
    if mask is not None:
        scores = mx.where(mask, scores, _HIDDEN)
    top = mx.max(scores, axis=-1, keepdims=True)
    if state is not None:
        top = mx.maximum(top, state[1])
    weights = mx.exp(scores - top)
    if mask is not None:  # a tile without any visible key must count nothing
        weights = mx.where(mask, weights, 0.0)
    sums = mx.sum(weights, axis=-1, keepdims=True)
    mixed = mix(weights).astype(mx.float32)
    if state is None:
        return mixed, top, sums
    fade = mx.exp(state[1] - top)
    return state[0] * fade + mixed, top, state[2] * fade + sums
