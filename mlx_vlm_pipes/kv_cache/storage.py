"""How one layer's keys and values lie in memory, plain or quantised.

A layer is a tuple of arrays, each [2, rows, KV heads, capacity, X], keys before values: one kernel
writes both. The axes are the same in every format, so growing, moving and writing rows need not
know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.config import KVCacheParams, kv_group_size
from mlx_vlm_pipes.rounding import packed_product

Layer = tuple[mx.array, ...]
ROWS, TOKENS = 1, 3  # axes of a layer's arrays


def sides(array: mx.array) -> tuple[mx.array, mx.array]:
    """Views of the keys and of the values in one array of a layer. Indexing would copy them."""
    return array[:1].squeeze(0), array[1:].squeeze(0)


@dataclass(frozen=True)
class PlainFormat:
    """One array in the cache dtype. on_gpu: which forms of a step are fast there."""

    dtype: mx.Dtype
    on_gpu: bool = False
    width = 1  # arrays in a layer

    def encode(self, x: mx.array) -> Layer:
        """Keys or values [..., D] -> each array's [..., X]."""
        return (x.astype(self.dtype),)

    def decode(self, layer: Layer, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """Keys and values of tokens start..stop-1, each [rows, K, stop - start, D]."""
        keys, values = sides(layer[0])
        return keys[:, :, start:stop], values[:, :, start:stop]

    def empty(self, params: KVCacheParams, rows: int, capacity: int) -> Layer:
        shape = (2, rows, params.n_kv_heads_per_device, capacity, params.head_dim)
        return (mx.zeros(shape, self.dtype),)


@dataclass(frozen=True)
class QuantizedFormat:
    """(packed uint32, scales, biases) in groups along D."""

    dtype: mx.Dtype
    bits: int
    group_size: int
    on_gpu: bool = False
    width = 3

    def encode(self, x: mx.array) -> Layer:
        """Keys or values [..., D] -> each array's [..., X]."""
        packed, scales, biases = mx.quantize(x.astype(self.dtype), self.group_size, self.bits)
        return packed, scales, biases

    def empty(self, params: KVCacheParams, rows: int, capacity: int) -> Layer:
        shape = (2, rows, params.n_kv_heads_per_device, capacity)
        packed, groups = params.head_dim * self.bits // 32, params.head_dim // self.group_size
        return (
            mx.zeros((*shape, packed), mx.uint32),
            mx.zeros((*shape, groups), self.dtype),
            mx.zeros((*shape, groups), self.dtype),
        )

    def decode(self, layer: Layer, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """Keys and values of tokens start..stop-1, each [rows, K, stop - start, D]."""
        parts = [a[:, :, :, start:stop] for a in layer]
        both = mx.dequantize(*parts, group_size=self.group_size, bits=self.bits)
        return sides(both)

    def scores(self, q: mx.array, layer: Layer) -> mx.array:
        """q [B, K, R, D] times the packed keys of a layer -> [B, K, R, S]."""
        return packed_product(
            q.astype(self.dtype),
            *(sides(a)[0] for a in layer),
            group_size=self.group_size,
            bits=self.bits,
        )

    def mix(self, weights: mx.array, layer: Layer) -> mx.array:
        """weights [B, K, R, S] times the packed values of a layer -> [B, K, R, D]."""
        return packed_product(
            weights.astype(self.dtype),
            *(sides(a)[1] for a in layer),
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
        )


CacheFormat = PlainFormat | QuantizedFormat


def cache_format(params: KVCacheParams) -> CacheFormat:
    """The format that the parameters ask for, on their device."""
    dtype, on_gpu = params.dtype.to_mx(), params.devices[0].is_gpu()
    if params.bits is None:
        return PlainFormat(dtype, on_gpu)
    group_size = kv_group_size(params.head_dim, params.group_size)
    return QuantizedFormat(dtype, params.bits, group_size, on_gpu)


def by_group(flat: Sequence[mx.array], width: int, num_layers: int) -> list[list[Layer]]:
    """The arrays of `KVCache.take`, one after the other, by group and layer.

    width: arrays in a layer.
    """
    layers = [tuple(flat[i : i + width]) for i in range(0, len(flat), width)]
    return [layers[i : i + num_layers] for i in range(0, len(layers), num_layers)]


def write_prefill(layer: Layer, new: Sequence[Layer], start: int) -> Layer:
    """Write a single row's new keys and values, each [1, K, T, X], from position `start` on."""
    for side, fresh in enumerate(new):
        where = mx.array([side, start])
        layer = tuple(
            mx.slice_update(old, part[None], where, axes=(0, TOKENS))
            for old, part in zip(layer, fresh, strict=True)
        )
    return layer


def decode_places(lengths: mx.array, kv_heads: int, capacity: int, width: int = 1) -> mx.array:
    """Where a decode step writes in a layer seen as [2 * rows * K * capacity, X].

    lengths int32 [rows]: each row's `width` tokens go there. Returns int32 [rows * width, 2 * K]:
    keys' heads, then values'.
    """
    rows = lengths.shape[0]
    side, head = mx.arange(2)[:, None], mx.arange(kv_heads)
    heads = (side * (rows * kv_heads) + head).reshape(1, -1)
    begin = (heads + mx.arange(rows)[:, None] * kv_heads) * capacity
    if width == 1:
        return begin + lengths[:, None]
    places = begin[:, None] + (lengths[:, None] + mx.arange(width))[..., None]
    return places.reshape(rows * width, -1)


def write_decode(layer: Layer, new: Layer, places: mx.array) -> Layer:
    """Write tokens [T, n, X], by default one of each row, at places int32 [T, n] (`decode_places`).

    In place once the caller holds no other reference. `mx.where` over the cache would copy all of
    it; a slice update from a position that the device computes takes two kernels for each array.
    """
    written = []
    for old, fresh in zip(layer, new, strict=True):
        flat = old.reshape(-1, old.shape[-1])
        flat[places] = fresh
        written.append(flat.reshape(old.shape))
    return tuple(written)


def write_one(layer: Layer, new: Layer, length: mx.array) -> Layer:
    """`write_decode` for a single row, where a slice update is faster than a scatter (the CPU).

    new: each [1, 2 * K, X]; length int32 [1].
    """
    return tuple(
        mx.slice_update(old, fresh.reshape(2, 1, -1, 1, old.shape[-1]), length, axes=(TOKENS,))
        for old, fresh in zip(layer, new, strict=True)
    )


def resize(layer: Layer, capacity: int) -> Layer:
    """The same tokens in arrays of another capacity (a copy)."""
    resized = []
    for old in layer:
        have = old.shape[TOKENS]
        if have >= capacity:
            resized.append(mx.contiguous(old[:, :, :, :capacity]))
            continue
        pad = mx.zeros((*old.shape[:TOKENS], capacity - have, old.shape[-1]), old.dtype)
        resized.append(mx.concatenate([old, pad], axis=TOKENS))
    return tuple(resized)
