"""Attention against a cache: windows, and quantised keys and values in tiles."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.kv_cache import CacheRow, QuantizedFormat, cache_format
from mlx_vlm_pipes.nn import attention
from mlx_vlm_pipes.nn.attention import decode_attention, decode_mask, prefill_attention
from tests.device import bar

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 64, 0.11


def params(bits: int | None) -> KVCacheParams:
    return KVCacheParams(
        dtype=DType.float32, n_kv_heads=KV_HEADS, head_dim=DIM, num_layers=1,
        devices=[DeviceRef.CPU()], bits=bits,
    )  # fmt: skip


def normal(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32))


def reference(q: mx.array, k: mx.array, v: mx.array, start: int, window: int | None) -> np.ndarray:
    """Attention written out in float64: q [1, H, T, D], k and v [1, K, S, D]."""
    keys, values = (
        np.repeat(np.array(x, np.float64)[0], HEADS // KV_HEADS, axis=0) for x in (k, v)
    )
    scores = np.array(q, np.float64)[0] @ keys.swapaxes(-1, -2) * SCALE
    row, column = np.arange(start, start + q.shape[2])[:, None], np.arange(k.shape[2])[None]
    seen = column <= row
    if window is not None:
        seen &= column > row - window
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return (weights / weights.sum(-1, keepdims=True) @ values)[None]


def as_cached(x: mx.array, y: mx.array, bits: int | None) -> tuple[mx.array, mx.array]:
    """Keys and values as the cache gives them back."""
    format = cache_format(params(bits))
    if isinstance(format, QuantizedFormat):
        return format.decode(format.encode(mx.stack([x, y])), 0, x.shape[2])
    return x, y


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("window", [None, 5, 40, 300])
@pytest.mark.parametrize(("start", "count"), [(0, 70), (33, 40), (60, 1)])
def test_prefill(
    bits: int | None, window: int | None, start: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "TILE", 16)
    total = start + count
    k, v, q = (
        normal(1, 1, KV_HEADS, total, DIM),
        normal(2, 1, KV_HEADS, total, DIM),
        normal(3, 1, HEADS, count, DIM),
    )
    row = CacheRow(cache_format(params(bits)), params(bits))
    row.reserve(total + 1)
    if start:
        row.append(0, k[:, :, :start], v[:, :, :start], 0)
    fresh = k[:, :, start:], v[:, :, start:]
    cached = row.append(0, *fresh, start)
    out = prefill_attention(q, fresh, cached, row.format, start, SCALE, window)
    expected = reference(q, *as_cached(k, v, bits), start, window)
    np.testing.assert_allclose(np.array(out), expected, atol=bar(2e-5))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("window", [None, 5])
def test_decode(bits: int | None, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DECODE_TILE", 32)
    lengths = [0, 31, 70]
    k, v, q = (
        normal(i, 3, h, n, DIM)
        for i, h, n in ((4, KV_HEADS, 128), (5, KV_HEADS, 128), (6, HEADS, 1))
    )
    format = cache_format(params(bits))
    mask = decode_mask(mx.array(lengths), 128, window)
    out = decode_attention(q, format.encode(mx.stack([k, v])), format, mask, SCALE)
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        keys, values = as_cached(k[one, :, : length + 1], v[one, :, : length + 1], bits)
        expected = reference(q[one], keys, values, length, window)
        np.testing.assert_allclose(np.array(out[one]), expected, atol=bar(2e-5))


def test_eight_bits_are_close_and_four_bits_less_so() -> None:
    k, v, q = (
        normal(7, 1, KV_HEADS, 200, DIM),
        normal(8, 1, KV_HEADS, 200, DIM),
        normal(9, 1, HEADS, 200, DIM),
    )
    exact = reference(q, k, v, 0, None)
    errors = [
        np.abs(reference(q, *as_cached(k, v, bits), 0, None) - exact).max() for bits in (8, 4)
    ]
    assert errors[0] < 0.02 < errors[1] < 0.4
