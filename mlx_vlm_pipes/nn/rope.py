"""Rotary position embeddings: plain, Llama 3, LongRoPE and three-axis (M-RoPE).

A `Rope` makes `Rotation`s: functions from [B, heads, T, D] to the same shape that already know
their positions, made once per step and used by every layer.
Source: transformers modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.errors import ConfigError

Rotation = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Llama3RopeScalingParams:
    """Llama 3's scaling by wavelength. orig_max_position in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    orig_max_position: int


@dataclass(frozen=True)
class LongRoPEScalingParams:
    """LongRoPE's factor lists, one entry for each rotary frequency. Positions in tokens."""

    short_factor: list[float]
    long_factor: list[float]
    original_max_position: int
    max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    def magnitude(self) -> float:
        """The factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.factor or self.max_position_embeddings / self.original_max_position
        if factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(self.original_max_position))

    def compute_scale(self, head_dim: int, user_scale: float | None = None) -> float:
        """The score scale: as given, else 1 / sqrt(head_dim); `magnitude` acts on cos and sin."""
        return user_scale if user_scale is not None else head_dim**-0.5


@dataclass(frozen=True)
class RopeSpec:
    """Everything that decides the rotation. dims: rotary elements of a head, from the front."""

    dims: int
    theta: float
    interleaved: bool = False
    llama3: Llama3RopeScalingParams | None = None
    longrope: LongRoPEScalingParams | None = None
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False  # the axes take turns, instead of a run of frequencies each

    def __post_init__(self) -> None:
        half = self.dims // 2
        if self.mrope_section is not None and sum(self.mrope_section) != half:
            raise ConfigError(
                f"mrope_section {list(self.mrope_section)} sums to {sum(self.mrope_section)}, "
                f"expected half of the head, {half}"
            )
        if self.longrope is None:
            return
        for name in ("short_factor", "long_factor"):
            count = len(getattr(self.longrope, name))
            if count != half:
                raise ConfigError(f"rope_scaling.{name} has {count} entries, expected {half}")


def inverse_frequencies(dims: int, theta: float) -> np.ndarray:
    """theta^(-2i/dims), float32 [dims / 2]."""
    exponent = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return (1.0 / np.float32(theta) ** exponent).astype(np.float32)


def llama3_frequencies(base: np.ndarray, scaling: Llama3RopeScalingParams) -> np.ndarray:
    """Long wavelengths divided by `factor`, short ones kept, blended in between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / base
    slow, fast = scaling.orig_max_position / low, scaling.orig_max_position / high
    share = 0.0 if low == high else (scaling.orig_max_position / wavelength - low) / (high - low)
    blended = (1 - share) * base / scaling.factor + share * base
    scaled = np.where(wavelength > slow, base / scaling.factor, blended)
    return np.where(wavelength < fast, base, scaled).astype(np.float32)


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
    """Rotations for one decoder."""

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        base = inverse_frequencies(spec.dims, spec.theta)
        self._magnitude = 1.0
        if spec.llama3 is not None:
            base = llama3_frequencies(base, spec.llama3)
        self._inv_freq = mx.array(base)
        self._freqs = mx.array(1.0 / base) if spec.llama3 is not None else None
        if spec.longrope is not None:
            self._magnitude = spec.longrope.magnitude()
            short, long = (np.asarray(f, np.float32) for f in _factors(spec.longrope))
            self._short, self._long = mx.array(base / short), mx.array(base / long)
        if spec.mrope_section is not None:
            axes = frequency_axes(spec.mrope_section, interleaved=spec.mrope_interleaved)
            self._axes = mx.array(axes)

    @property
    def break_length(self) -> int | None:
        """Keys made for rows up to this length are wrong for longer rows (LongRoPE), or None."""
        return self.spec.longrope.original_max_position if self.spec.longrope else None

    def prefill(
        self, start: int, stop: int, reach: int, positions: mx.array | None = None
    ) -> Rotation:
        """For one row's tokens start..stop-1; positions [axes, T] replaces them (M-RoPE).

        reach: length of the row after its last chunk, which decides LongRoPE's table.
        """
        if positions is not None and self.spec.mrope_section is not None:
            angles = positions.astype(mx.float32)[:, :, None] * self._inv_freq  # [axes, T, D/2]
            angles = mx.take_along_axis(angles, self._axes[None, None, :], axis=0)[0]
            return self._by_angles(angles)
        if self.spec.longrope is not None:
            is_long = reach > self.spec.longrope.original_max_position
            where = mx.arange(start, stop, dtype=mx.float32)
            return self._by_angles(where[:, None] * (self._long if is_long else self._short))
        return self._fast(start)

    def decode(self, positions: mx.array, lengths: mx.array) -> Rotation:
        """For one token of each row: positions int32 [B], lengths int32 [B] already cached."""
        if self.spec.longrope is not None:
            is_long = (lengths + 1 > self.spec.longrope.original_max_position)[:, None]
            freqs = mx.where(is_long, self._long, self._short)  # [B, D/2]
            angles = positions.astype(mx.float32)[:, None] * freqs
            return self._by_angles(angles[:, None, None, :])
        return self._fast(positions)

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


def _factors(params: LongRoPEScalingParams) -> tuple[list[float], list[float]]:
    return params.short_factor, params.long_factor


def read_rope_scaling(
    rope: dict[str, Any], original_max: int, max_positions: int
) -> tuple[Llama3RopeScalingParams | None, LongRoPEScalingParams | None]:
    """The scaling a rope dictionary of config.json asks for; ({} means none).

    Raises: ConfigError for a dictionary without a type, an unknown type or missing keys.
    """
    if not set(rope) - {"rope_theta", "partial_rotary_factor"}:
        return None, None
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None:
        raise ConfigError(f"rope_scaling {sorted(rope)} has no rope_type; expected e.g. 'llama3'")
    if kind in ("default", "mrope", "dynamic", "axial"):
        return None, None  # dynamic changes nothing up to max_position_embeddings
    try:
        if kind == "llama3":
            return _read_llama3(rope, original_max), None
        if kind in ("longrope", "su"):
            return None, _read_longrope(rope, original_max, max_positions)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"rope_scaling of type {kind!r}: bad or missing {error}") from None
    raise ConfigError(
        f"rope_type {kind!r} is not supported; supported: default, dynamic, llama3, longrope, mrope"
    )


def _read_llama3(rope: dict[str, Any], original_max: int) -> Llama3RopeScalingParams:
    return Llama3RopeScalingParams(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        orig_max_position=int(rope.get("original_max_position_embeddings", original_max)),
    )


def _read_longrope(
    rope: dict[str, Any], original_max: int, max_positions: int
) -> LongRoPEScalingParams:
    factor, attention = rope.get("factor"), rope.get("attention_factor")
    return LongRoPEScalingParams(
        short_factor=[float(f) for f in rope["short_factor"]],
        long_factor=[float(f) for f in rope["long_factor"]],
        original_max_position=original_max,
        max_position_embeddings=max_positions,
        factor=None if factor is None else float(factor),
        attention_factor=None if attention is None else float(attention),
    )
