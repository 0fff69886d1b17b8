"""How one layer's keys and values lie in memory, plain or quantised.

A layer is a tuple of arrays, each [rows, KV heads, capacity, X]: the token axis is always 2, so
growing, moving and writing rows need not know the format.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.config import KVCacheParams, kv_group_size
from mlx_vlm_pipes.rounding import packed_product

Layer = tuple[mx.array, ...]


@dataclass(frozen=True)
class PlainFormat:
    """(keys, values), each [rows, K, capacity, D] in the cache dtype."""

    dtype: mx.Dtype

    def encode(self, keys: mx.array, values: mx.array) -> Layer:
        return keys.astype(self.dtype), values.astype(self.dtype)

    def decode(self, layer: Layer, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """Keys and values of tokens start..stop-1, each [rows, K, stop - start, D]."""
        keys, values = layer
        return keys[:, :, start:stop], values[:, :, start:stop]

    def empty(self, params: KVCacheParams, rows: int, capacity: int) -> Layer:
        shape = (rows, params.n_kv_heads, capacity, params.head_dim)
        return mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype)


@dataclass(frozen=True)
class QuantizedFormat:
    """Keys then values, each as (packed uint32, scales, biases) in groups along D."""

    dtype: mx.Dtype
    bits: int
    group_size: int

    def encode(self, keys: mx.array, values: mx.array) -> Layer:
        return (
            *mx.quantize(keys.astype(self.dtype), self.group_size, self.bits),
            *mx.quantize(values.astype(self.dtype), self.group_size, self.bits),
        )

    def empty(self, params: KVCacheParams, rows: int, capacity: int) -> Layer:
        shape = (rows, params.n_kv_heads, capacity)
        packed, groups = params.head_dim * self.bits // 32, params.head_dim // self.group_size
        one = (
            mx.zeros((*shape, packed), mx.uint32),
            mx.zeros((*shape, groups), self.dtype),
            mx.zeros((*shape, groups), self.dtype),
        )
        return (*one, *(mx.array(a) for a in one))

    def decode(self, layer: Layer, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """Keys and values of tokens start..stop-1, each [rows, K, stop - start, D]."""
        parts = [a[:, :, start:stop] for a in layer]
        keys = mx.dequantize(*parts[:3], group_size=self.group_size, bits=self.bits)
        values = mx.dequantize(*parts[3:], group_size=self.group_size, bits=self.bits)
        return keys, values

    def scores(self, q: mx.array, layer: Layer) -> mx.array:
        """q [B, K, R, D] times the packed keys of a layer -> [B, K, R, S]."""
        return packed_product(
            q.astype(self.dtype), *layer[:3], group_size=self.group_size, bits=self.bits
        )

    def mix(self, weights: mx.array, layer: Layer) -> mx.array:
        """weights [B, K, R, S] times the packed values of a layer -> [B, K, R, D]."""
        return packed_product(
            weights.astype(self.dtype),
            *layer[3:],
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
        )


CacheFormat = PlainFormat | QuantizedFormat


def cache_format(params: KVCacheParams) -> CacheFormat:
    """The format that the parameters ask for."""
    dtype = params.dtype.to_mx()
    if params.bits is None:
        return PlainFormat(dtype)
    return QuantizedFormat(dtype, params.bits, kv_group_size(params.head_dim, params.group_size))


def write_prefill(layer: Layer, new: Layer, start: int) -> Layer:
    """Write new tokens [1, K, T, X] of a single row from position `start` on."""
    return tuple(
        mx.slice_update(old, fresh, mx.array([start]), axes=(2,))
        for old, fresh in zip(layer, new, strict=True)
    )


def write_decode(layer: Layer, new: Layer, lengths: mx.array) -> Layer:
    """Write one token of each row, [rows, K, 1, X], at that row's length (int32 [rows]).

    In place once the caller holds no other reference: a slice update for one row, a scatter for
    several. `mx.where` over the cache would copy all of it.
    """
    if lengths.shape[0] == 1:
        return tuple(
            mx.slice_update(old, fresh, lengths, axes=(2,))
            for old, fresh in zip(layer, new, strict=True)
        )
    rows = mx.arange(lengths.shape[0])[:, None]
    heads = mx.arange(layer[0].shape[1])[None, :]
    written = []
    for old, fresh in zip(layer, new, strict=True):
        old = old[...]  # a new array object: assignment must not reach the caller's
        old[rows, heads, lengths[:, None]] = fresh[:, :, 0]
        written.append(old)
    return tuple(written)


def resize(layer: Layer, capacity: int) -> Layer:
    """The same tokens in arrays of another capacity (a copy)."""
    resized = []
    for old in layer:
        have = old.shape[2]
        if have >= capacity:
            resized.append(mx.contiguous(old[:, :, :capacity]))
            continue
        pad = mx.zeros((*old.shape[:2], capacity - have, old.shape[3]), old.dtype)
        resized.append(mx.concatenate([old, pad], axis=2))
    return tuple(resized)
