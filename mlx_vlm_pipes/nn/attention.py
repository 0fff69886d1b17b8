"""Attention against a KV cache: exact rows while prefilling, whole capacity while decoding.

Plain caches go through `mx.fast.scaled_dot_product_attention`. Quantised ones are read in tiles
with an online softmax, so that neither the scores nor the dequantised cache ever exist whole.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_vlm_pipes.kv_cache import CacheFormat, Layer, PlainFormat, QuantizedFormat

TILE = 256  # tokens of a quantised cache that are dequantised at a time


def split_heads(x: mx.array, heads: int) -> mx.array:
    """[T, heads * D] -> [1, heads, T, D]."""
    return x.reshape(x.shape[0], heads, -1).transpose(1, 0, 2)[None]


def merge_heads(x: mx.array) -> mx.array:
    """[1, heads, T, D] -> [T, heads * D]."""
    return x[0].transpose(1, 0, 2).reshape(x.shape[2], -1)


def causal_mask(start: int, stop: int, window: int | None) -> mx.array | str:
    """For queries start..stop-1 over keys 0..stop-1: "causal", or bool [T, S] with a window."""
    if window is None or stop <= window:
        return "causal"
    query, key = mx.arange(start, stop)[:, None], mx.arange(stop)[None]
    return (key <= query) & (key > query - window)


def decode_mask(lengths: mx.array, capacity: int, window: int | None) -> mx.array:
    """bool [B, 1, 1, capacity]: the cached tokens of each row and the new one at `lengths`."""
    key, last = mx.arange(capacity)[None], lengths[:, None]
    mask = key <= last
    if window is not None:
        mask = mask & (key > last - window)
    return mask[:, None, None, :]


def prefill_attention(
    q: mx.array,
    fresh: tuple[mx.array, mx.array],
    cached: Layer,
    format: CacheFormat,
    start: int,
    scale: float,
    window: int | None,
) -> mx.array:
    """One row's new queries against all its keys.

    Args: q [1, H, T, D]; fresh keys and values [1, K, T, D]; cached: the layer's arrays with the
    fresh tokens written at start..start+T-1. Returns: [1, H, T, D].
    """
    stop = start + q.shape[2]
    mask = causal_mask(start, stop, window)
    if isinstance(format, QuantizedFormat):
        return _tiled(q, cached, format, stop, scale, start, window)
    keys, values = fresh if start == 0 else (cached[0][:, :, :stop], cached[1][:, :, :stop])
    return mx.fast.scaled_dot_product_attention(
        q, keys.astype(q.dtype), values.astype(q.dtype), scale=scale, mask=mask
    )


def decode_attention(
    q: mx.array, cached: Layer, format: CacheFormat, mask: mx.array, scale: float
) -> mx.array:
    """One query of each row, [B, H, 1, D], against the whole capacity; mask [B, 1, 1, capacity]."""
    if isinstance(format, PlainFormat):
        keys, values = cached
        return mx.fast.scaled_dot_product_attention(
            q, keys.astype(q.dtype), values.astype(q.dtype), scale=scale, mask=mask
        )
    state = None
    for begin in range(0, mask.shape[-1], TILE):
        end = min(begin + TILE, mask.shape[-1])
        state = _merge_tile(state, q, format.decode(cached, begin, end), mask[..., begin:end], scale)
    assert state is not None
    return (state[0] / state[2]).astype(q.dtype)


def _tiled(
    q: mx.array,
    cached: Layer,
    format: QuantizedFormat,
    stop: int,
    scale: float,
    start: int,
    window: int | None,
) -> mx.array:
    """Prefill over a quantised cache: query blocks of TILE rows, key tiles up to the diagonal."""
    blocks = []
    for first in range(start, stop, TILE):
        last = min(first + TILE, stop)
        block, state = q[:, :, first - start : last - start], None
        query = mx.arange(first, last)[:, None]
        oldest = 0 if window is None else max(0, first - window + 1) // TILE * TILE
        for begin in range(oldest, last, TILE):
            end = min(begin + TILE, last)
            key = mx.arange(begin, end)[None]
            mask = key <= query if window is None else (key <= query) & (key > query - window)
            state = _merge_tile(state, block, format.decode(cached, begin, end), mask, scale)
        assert state is not None
        blocks.append((state[0] / state[2]).astype(q.dtype))
    return mx.concatenate(blocks, axis=2)


State = tuple[mx.array, mx.array, mx.array]  # weighted values, running maximum, running sum


def _merge_tile(
    state: State | None,
    q: mx.array,
    tile: tuple[mx.array, mx.array],
    mask: mx.array,
    scale: float,
) -> State:
    """Add one tile of keys to an online softmax; all float32. Source: Milakov & Gimelshein 2018."""
    keys, values = (x.astype(mx.float32) for x in tile)  # [B, K, S, D]
    batch, heads, length, dim = q.shape
    group = heads // keys.shape[1]
    grouped = (q.astype(mx.float32) * scale).reshape(batch, -1, group * length, dim)
    scores = grouped @ keys.swapaxes(-1, -2)  # [B, K, group * T, S]
    scores = scores.reshape(batch, heads, length, -1)
    scores = mx.where(mask, scores, -1e30)
    top = mx.max(scores, axis=-1, keepdims=True)
    if state is not None:
        top = mx.maximum(top, state[1])
    weights = mx.where(mask, mx.exp(scores - top), 0.0)
    sums = mx.sum(weights, axis=-1, keepdims=True)
    mixed = (weights.reshape(batch, -1, group * length, weights.shape[-1]) @ values).reshape(
        batch, heads, length, dim
    )
    if state is None:
        return mixed, top, sums
    fade = mx.exp(state[1] - top)
    return state[0] * fade + mixed, top, state[2] * fade + sums
