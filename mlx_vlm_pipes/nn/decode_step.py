"""One token of every row, or a few of each: the forms of rope, cache write and attention that take
few kernels.

Projections, norms and MLP take all rows together; only what reads or writes the cache goes group
by group. What depends on the lengths alone is made once and read by all layers.

Metal's kernels (mlx/backend/metal/rope.cpp, scaled_dot_product_attention.cpp, quantized.cpp) copy
what does not lie as they want it: rope a slice of heads, the attention a mask that is broadcast
over the heads, quantising any slice. So heads of queries, keys and values are turned as one, values
by no angle, which leaves their bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.kv_cache import (
    CacheFormat,
    Layer,
    PlainFormat,
    decode_places,
    write_decode,
    write_one,
)
from mlx_vlm_pipes.nn.attention import decode_attention, decode_mask
from mlx_vlm_pipes.nn.lora import TokenSlots
from mlx_vlm_pipes.nn.rope import Rotation


@dataclass(frozen=True)
class HeadCounts:
    """Heads of queries, and of keys; values have as many as keys."""

    queries: int
    keys: int

    @property
    def total(self) -> int:
        return self.queries + 2 * self.keys


@dataclass(frozen=True)
class DecodeGroup:
    """Rows whose keys and values lie in the same arrays."""

    rows: slice  # on the step's token axis
    lengths: mx.array  # int32 [n], tokens cached so far
    places: mx.array | None  # int32 [n * T, 2 * K], where each token goes; None: one slice update
    masks: dict[int | None, mx.array]  # by window: bool [n, 1 or H, T, capacity]

    @classmethod
    def of(
        cls,
        begin: int,
        lengths: mx.array,
        capacity: int,
        heads: HeadCounts,
        windows: set[int | None],
        format: CacheFormat,
        width: int = 1,
    ) -> DecodeGroup:
        """A group's part of the step: its rows from `begin` on, with `lengths` tokens each.

        width: tokens of each row that the step runs.
        """
        count, places = lengths.shape[0], None
        if count > 1 or width > 1 or format.on_gpu:
            places = decode_places(lengths, heads.keys, capacity, width)
        masks = {window: decode_mask(lengths, capacity, window, width) for window in windows}
        if count > 1 and format.on_gpu and isinstance(format, PlainFormat):
            shape = (count, heads.queries, width, capacity)
            masks = {w: mx.contiguous(mx.broadcast_to(m, shape)) for w, m in masks.items()}
        rows = slice(begin * width, (begin + count) * width)
        return cls(rows, lengths, places, masks)

    def write(self, cached: Layer, parts: Sequence[Layer]) -> Layer:
        """parts: arrays [B * T, heads, X] of the step's tokens, keys' heads before values'."""
        if self.places is None:
            (fresh,) = parts
            return write_one(cached, tuple(a[self.rows] for a in fresh), self.lengths)
        begin = 0
        for fresh in parts:
            end = begin + fresh[0].shape[1]
            own = tuple(a[self.rows] for a in fresh)
            cached = write_decode(cached, own, self.places[:, begin:end])
            begin = end
        return cached


@dataclass(frozen=True)
class DecodeStep:
    """What every layer of a decode step reads."""

    groups: Sequence[DecodeGroup]
    heads: HeadCounts
    rotations: dict[int | None, Rotation]  # by window, for [B, heads, 1, D]
    joined: dict[int | None, Rotation | None]  # for [B, H + 2 * K, D]; None: there is none
    format: CacheFormat
    slots: TokenSlots | None  # each token's LoRA adapter; None where none is loaded
    width: int = 1  # T, tokens of each row

    def turn(
        self,
        qkv: mx.array,
        rotation: Rotation,
        joined: Rotation | None,
        norms: tuple[nn.Module, nn.Module] | None,
    ) -> tuple[mx.array, list[Layer]]:
        """Heads [B * T, H + 2 * K, D] -> turned queries [B * T, H, 1, D], and what the cache gets.

        norms: of queries and of keys. The latter is one part, keys and values, or one of each.
        """
        on_gpu = self.format.on_gpu
        first, last = self.heads.queries, self.heads.queries + self.heads.keys
        if joined is not None and (norms is None or not on_gpu):
            if norms is not None:
                q, k = norms[0](qkv[:, :first]), norms[1](qkv[:, first:last])
                qkv = mx.concatenate([q, k, qkv[:, last:]], axis=1)
            turned = joined(qkv)
            return turned[:, :first, None], [self._encoded(turned)]
        v = qkv[:, last:]
        if joined is not None and norms is not None:
            q, k = norms[0](qkv[:, :first]), norms[1](qkv[:, first:last])
            q, k = rotation(q[:, :, None]), rotation(k[:, :, None])[:, :, 0]
        else:
            qk = qkv[:, :last]
            if norms is not None:
                q, k = norms[0](qk[:, :first]), norms[1](qk[:, first:])
                qk = mx.concatenate([q, k], axis=1)
            qk = rotation(qk[:, :, None])
            q, k = qk[:, :first], qk[:, first:, 0]
        if on_gpu and isinstance(self.format, PlainFormat):
            return q, [self.format.encode(k), self.format.encode(v)]
        return q, [self.format.encode(mx.concatenate([k, v], axis=1))]

    def _encoded(self, turned: mx.array) -> Layer:
        """Keys and values of all heads, [B, H + 2 * K, D], as the cache stores them."""
        first = self.heads.queries
        if turned.shape[0] > 1 and self.format.on_gpu:  # a slice would be copied first
            return tuple(a[:, first:] for a in self.format.encode(turned))
        return self.format.encode(turned[:, first:])

    def attend(
        self,
        q: mx.array,
        parts: Sequence[Layer],
        caches: Sequence[Layer],
        window: int | None,
        scale: float,
    ) -> tuple[mx.array, list[Layer]]:
        """What the queries read [B * T, H * D], and each group's arrays with the new tokens."""
        outs, written = [], []
        for group, cached in zip(self.groups, caches, strict=True):
            cached = group.write(cached, parts)
            mask = group.masks[window]
            own = self._by_row(q[group.rows])
            out = decode_attention(own, cached, self.format, mask, scale)
            outs.append(out if self.width == 1 else out.transpose(0, 2, 1, 3).flatten(0, 1))
            written.append(cached)
        out = outs[0] if len(outs) == 1 else mx.concatenate(outs)
        return out.reshape(out.shape[0], -1), written

    def _by_row(self, q: mx.array) -> mx.array:
        """A group's queries [n * T, H, 1, D] -> [n, H, T, D]."""
        if self.width == 1:
            return q
        return q.reshape(-1, self.width, *q.shape[1::2]).transpose(0, 2, 1, 3)
