"""Rotary position embeddings: plain, scaled (see rope_scaling) and three-axis (M-RoPE).

A `Rope` makes `Rotation`s: functions from [B, heads, T, D] to the same shape that already know
their positions, made once per step and used by every layer.
Source: transformers modeling_rope_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.nn.rope_scaling import (
    DynamicRope,
    Llama3RopeScalingParams,
    LongRoPEScalingParams,
    RopeScaling,
    YarnRope,
)

__all__ = [
    "Llama3RopeScalingParams",
    "LongRoPEScalingParams",
    "Rope",
    "RopeSpec",
    "Rotation",
    "frequency_axes",
    "inverse_frequencies",
]

Rotation = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class RopeSpec:
    """Everything that decides the rotation. dims: rotary elements of a head, from the front.

    recomputes: rows that outgrow LongRoPE's short factors are prefilled again (Phi-3).
    """

    dims: int
    theta: float
    interleaved: bool = False
    scaling: RopeScaling | None = None
    recomputes: bool = False
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False  # the axes take turns, instead of a run of frequencies each

    def __post_init__(self) -> None:
        half = self.dims // 2
        if self.dims < 2 or self.dims % 2:
            raise ConfigError(
                f"head_dim times partial_rotary_factor is {self.dims}; rotary embeddings turn "
                "pairs, expected an even number from 2"
            )
        if self.mrope_section is not None and sum(self.mrope_section) != half:
            raise ConfigError(
                f"mrope_section {list(self.mrope_section)} sums to {sum(self.mrope_section)}, "
                f"expected half of the head, {half}"
            )
        if isinstance(self.scaling, DynamicRope) and half < 2:
            raise ConfigError("rope_type 'dynamic' with 2 rotary elements a head, expected 4 or up")
        if isinstance(self.scaling, LongRoPEScalingParams):
            lists = (
                ("short_factor", self.scaling.short_factor),
                ("long_factor", self.scaling.long_factor),
            )
            for name, factors in lists:
                if len(factors) != half:
                    raise ConfigError(
                        f"rope_scaling.{name} has {len(factors)} entries, expected {half}"
                    )


def inverse_frequencies(dims: int, theta: float) -> np.ndarray:
    """theta^(-2i/dims), float32 [dims / 2]."""
    exponent = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return (1.0 / np.float32(theta) ** exponent).astype(np.float32)


def frequency_axes(section: tuple[int, ...], *, interleaved: bool) -> np.ndarray:
    """Which position axis turns each rotary pair, int32 [sum of section].

    Consecutive: section[0] pairs of the first axis, then those of the next. Interleaved: axis i
    takes every n-th pair from the i-th on, section[i] of them; the first axis has what is left.
    Source: transformers modeling_qwen2_5_vl.py; modeling_qwen3_vl.py, recomposition_frequencies.
    """
    count = len(section)
    if not interleaved:
        return np.repeat(np.arange(count), section).astype(np.int32)
    axes = np.zeros(sum(section), np.int32)
    for axis in range(1, count):
        axes[axis : section[axis] * count : count] = axis
    return axes


class Rope:
    """Rotations for one decoder.

    LongRoPE and dynamic scaling turn a token by the reach of its sequence, 1 + the largest
    position: of the whole prompt for the prompt's tokens, up to itself for a generated one.
    """

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        base = inverse_frequencies(spec.dims, spec.theta)
        self._magnitude, self._freqs, self._long = 1.0, None, None
        self._edge: int | None = None
        scaling = spec.scaling
        if isinstance(scaling, LongRoPEScalingParams):
            self._edge, self._magnitude = scaling.edge, scaling.magnitude()
            short, long = (
                np.asarray(f, np.float32) for f in (scaling.short_factor, scaling.long_factor)
            )
            self._long = mx.array(base / long)
            base = base / short
        elif isinstance(scaling, DynamicRope):
            self._edge = scaling.edge
        elif scaling is not None:
            base = scaling.frequencies(base, spec.theta)
            self._freqs = mx.array(1.0 / base)
            if isinstance(scaling, YarnRope):
                self._magnitude = scaling.magnitude
        self._inv_freq = mx.array(base)
        if spec.mrope_section is not None:
            axes = frequency_axes(spec.mrope_section, interleaved=spec.mrope_interleaved)
            self._axes = mx.array(axes)

    @property
    def break_length(self) -> int | None:
        """Rows that grow past this length are prefilled again (Phi-3's LongRoPE), or None."""
        return self._edge if self.spec.recomputes and self._long is not None else None

    def table(self, reach: int) -> int:
        """Keys of two prompts can be equal only if their reaches have the same number here."""
        if self._edge is None or reach <= self._edge:
            return 0
        return 1 if self._long is not None else reach

    def table_end(self, reach: int) -> int | None:
        """A row of a prompt of this reach has that table up to this position; None: everywhere."""
        if self._edge is None:
            return None
        if reach <= self._edge:
            return self._edge
        return None if self._long is not None else reach

    def prefill(
        self, start: int, stop: int, reach: int | None, positions: mx.array | None = None
    ) -> Rotation:
        """For one row's tokens start..stop-1; positions [axes, T] replaces them (M-RoPE).

        reach: of the whole prompt; None if these tokens are all of it, or its end.
        """
        if positions is None or self.spec.mrope_section is None:
            if self._is_fast:
                return self._fast(start)
            where = mx.arange(start, stop, dtype=mx.int32)
            angles = where.astype(mx.float32)[:, None] * self._frequencies(where, reach)
            return self._by_angles(angles)
        freqs = self._frequencies(mx.max(positions, axis=0), reach)
        angles = positions.astype(mx.float32)[:, :, None] * freqs  # [axes, T, D/2]
        angles = mx.take_along_axis(angles, self._axes[None, None, :], axis=0)[0]
        return self._by_angles(angles)

    def decode(self, positions: mx.array) -> Rotation:
        """For one token of each row: positions int32 [B]."""
        if self._is_fast:
            return self._fast(positions)
        angles = positions.astype(mx.float32)[:, None] * self._frequencies(positions, 0)
        return self._by_angles(angles[:, None, None, :])

    def decode_joined(self, positions: mx.array, turned: int, heads: int) -> Rotation | None:
        """`decode` for [B, heads, D] of which the first `turned` heads turn, the others stay.

        One call of MLX's own rope with a position for each head, since angle 0 leaves every bit.
        None where that rope cannot do it.
        """
        if not self._is_fast:
            return None
        where = mx.where(mx.arange(heads) < turned, positions[:, None], 0).reshape(-1)
        rotate = self._fast(where)
        return lambda x: rotate(x.reshape(-1, 1, 1, x.shape[-1])).reshape(x.shape)

    @property
    def _is_fast(self) -> bool:
        """Whether MLX's own rope does it: the same frequencies for all, and no magnitude."""
        return self._edge is None and self._magnitude == 1.0

    def _frequencies(self, positions: mx.array, reach: int | None) -> mx.array:
        """Of tokens at these positions [T]: float32 [T, dims / 2], or [dims / 2] for all."""
        if self._edge is None:
            return self._inv_freq
        own = positions.astype(mx.int32) + 1
        least = mx.max(own) if reach is None else mx.array(reach, mx.int32)
        reaches = mx.maximum(own, least)[:, None]
        beyond = self._stretched(reaches) if self._long is None else self._long
        return mx.where(reaches > self._edge, beyond, self._inv_freq)

    def _stretched(self, reaches: mx.array) -> mx.array:
        """Dynamic scaling: frequencies [T, dims / 2] of sequences that reach so far, [T, 1]."""
        spec = self.spec
        assert isinstance(spec.scaling, DynamicRope)
        factor, dims = spec.scaling.factor, spec.dims
        growth = factor * reaches.astype(mx.float32) / spec.scaling.edge - (factor - 1)
        base = spec.theta * mx.maximum(growth, 1.0) ** (dims / (dims - 2))
        exponent = mx.arange(0, dims, 2, dtype=mx.float32) / dims
        return 1.0 / base**exponent

    def _fast(self, offset: int | mx.array) -> Rotation:
        spec, freqs = self.spec, self._freqs

        def rotate(x: mx.array) -> mx.array:
            return mx.fast.rope(
                x,
                spec.dims,
                traditional=spec.interleaved,
                base=spec.theta if freqs is None else None,
                scale=1.0,
                offset=offset,
                freqs=freqs,
            )

        return rotate

    def _by_angles(self, angles: mx.array) -> Rotation:
        """angles [T, dims/2] or [B, 1, 1, dims/2], float32."""
        cos, sin = mx.cos(angles) * self._magnitude, mx.sin(angles) * self._magnitude
        dims, half = self.spec.dims, self.spec.dims // 2

        def rotate(x: mx.array) -> mx.array:
            wide = x.astype(mx.float32)
            a, b = wide[..., :half], wide[..., half:dims]
            turned = mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
            turned = turned.astype(x.dtype)
            if dims == x.shape[-1]:
                return turned
            return mx.concatenate([turned, x[..., dims:]], axis=-1)

        return rotate
