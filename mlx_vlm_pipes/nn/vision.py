"""What several vision towers share: attention within segments, rotation, pixel shuffle.

Towers keep their projections apart where checkpoints do: at thousands of patches, one matrix for
several products would save no time, and hold all their results at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_pipes.rounding import attend


def pixel_array(values: np.ndarray) -> mx.array:
    """Pixels for the device, in their own dtype; uint16 are bit patterns of bfloat16."""
    array = mx.array(values)
    return array.view(mx.bfloat16) if array.dtype == mx.uint16 else array


def segment_attention(
    q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int], scale: float
) -> mx.array:
    """Bidirectional attention inside each of consecutive segments.

    Segments of equal length are attended together, so that the work is linear in their number
    and no mask of all patches squared is ever made.

    Args: q, k, v [P, H, D]; lengths of the segments in order, summing to P. Returns: [P, H, D].
    """
    sizes = np.asarray(lengths)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    changes = np.flatnonzero(np.diff(sizes)) + 1
    runs = list(itertools.pairwise([0, *changes.tolist(), len(sizes)]))
    if len(runs) == len(np.unique(sizes)):  # equal ones lie side by side: nothing to gather
        cuts = [slice(starts[first], ends[last - 1]) for first, last in runs]
        outs = [
            _equal_segments(q[cut], k[cut], v[cut], last - first, scale)
            for cut, (first, last) in zip(cuts, runs, strict=True)
        ]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)
    order, outs = [], []
    for length in np.unique(sizes):
        own = starts[sizes == length]
        index = (own[:, None] + np.arange(length)).reshape(-1)
        place = mx.array(index.astype(np.int32))
        outs.append(_equal_segments(q[place], k[place], v[place], len(own), scale))
        order.append(index)
    inverse = np.argsort(np.concatenate(order))
    return mx.concatenate(outs)[mx.array(inverse.astype(np.int32))]


def _equal_segments(q: mx.array, k: mx.array, v: mx.array, count: int, scale: float) -> mx.array:
    """q, k, v [count * L, H, D] -> [count * L, H, D]."""
    q, k, v = (x.reshape(count, -1, *x.shape[1:]).transpose(0, 2, 1, 3) for x in (q, k, v))
    out = attend(q, k, v, scale=scale)  # [count, H, L, D]
    return out.transpose(0, 2, 1, 3).reshape(-1, out.shape[1], out.shape[3])


Turn = tuple[mx.array, mx.array]


def turn_of(angles: mx.array) -> Turn:
    """What `rotate_half_split` multiplies a pair's first and second number by, for angles float32
    [P, D/2]: float32 [P, 2, D/2] each, for both places of the result."""
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.stack([cos, sin], axis=1), mx.stack([-sin, cos], axis=1)


def rotate_half_split(x: mx.array, turn: Turn) -> mx.array:
    """Rotate pairs (i, i + D/2) in float32: x [P, ..., D], same shape and dtype out.

    The halves are broadcast over the result's halves, so that one kernel writes both.
    """
    halves = x.reshape(*x.shape[:-1], 2, -1)  # [P, ..., 2, D/2]
    first, second = (a.reshape(len(a), *([1] * (x.ndim - 2)), 2, -1) for a in turn)
    return _turned(halves[..., :1, :], halves[..., 1:, :], first, second).reshape(x.shape)


@partial(mx.compile, shapeless=True)
def _turned(a: mx.array, b: mx.array, first: mx.array, second: mx.array) -> mx.array:
    return (a.astype(mx.float32) * first + b.astype(mx.float32) * second).astype(a.dtype)


@dataclass(frozen=True)
class Segments:
    """Which patches see each other, for patches in one particular order.

    lengths: of consecutive segments, in patches; turn: of the same patches.
    """

    lengths: list[int]
    turn: Turn


def frame_segments(positions: mx.array, cu_seqlens: mx.array, inv_freq: mx.array) -> Segments:
    """Whole frames, their patches turned by row and column.

    Args: positions int [P, 2], row and column; cu_seqlens, the frames' boundaries in patches, made
    on the host and read here; inv_freq float32 [D/4], as each axis takes half of the pairs.
    """
    angles = positions.astype(mx.float32)[:, :, None] * inv_freq
    frames = np.diff(np.array(cu_seqlens).astype(np.int64)).tolist()
    return Segments(frames, turn_of(angles.reshape(angles.shape[0], -1)))  # rows, then columns


class SegmentAttention(nn.Module):
    """Bidirectional attention within segments: [P, E] -> [P, E]."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, size // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)

    def __call__(self, x: mx.array, segments: Segments) -> mx.array:
        qkv = self.qkv(x).reshape(x.shape[0], 3, self.num_heads, self.head_dim)
        qk = rotate_half_split(qkv[:, :2], segments.turn)  # [P, 2, H, D]
        out = segment_attention(qk[:, 0], qk[:, 1], qkv[:, 2], segments.lengths, self.scale)
        return self.proj(out.reshape(x.shape))


class PatchEmbed(nn.Module):
    """A convolution with kernel = stride, as a matrix: [P, C*tp*p*p] -> [P, E]."""

    def __init__(self, elements: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(elements, size, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x)


class PatchMerger(nn.Module):
    """`unit` patches, one behind the other, to one row for the decoder: [P, E] -> [P/unit, out].

    norm: over each patch.
    """

    def __init__(self, norm: nn.Module, size: int, unit: int, out: int) -> None:
        super().__init__()
        self.width = size * unit
        self.ln_q = norm
        self.mlp = [nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, out)]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.ln_q(x).reshape(-1, self.width)  # [P/unit, unit * E]
        for layer in self.mlp:
            x = layer(x)
        return x


class SegmentBlock(nn.Module):
    """One layer: [P, E] -> [P, E]; the segments decide how far it sees. Norms come first."""

    def __init__(
        self, attention: SegmentAttention, mlp: nn.Module, norm1: nn.Module, norm2: nn.Module
    ) -> None:
        super().__init__()
        self.norm1, self.attn = norm1, attention
        self.norm2, self.mlp = norm2, mlp

    def __call__(self, h: mx.array, segments: Segments) -> mx.array:
        h = h + self.attn(self.norm1(h), segments)
        return h + self.mlp(self.norm2(h))


def pixel_shuffle(x: mx.array, rows: int, columns: int, factor: int) -> mx.array:
    """Fold blocks of factor x factor patches into channels.

    Args: x [N, rows * columns, E], patches row-major. Returns: [N, rows * columns / factor^2,
    factor^2 * E], channel index (row in block, column in block, feature), tokens row-major.
    Source: transformers modeling_idefics3.py, pixel_shuffle; InternVL's ps_version v2.
    """
    n, _, size = x.shape
    x = x.reshape(n, rows // factor, factor, columns // factor, factor, size)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [N, R/f, C/f, f, f, E]
    return x.reshape(n, rows * columns // factor**2, factor**2 * size)
