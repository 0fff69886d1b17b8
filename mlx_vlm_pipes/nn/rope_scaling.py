"""What config.json may do to the rotary frequencies, and how its rope dictionary is read.

Source: transformers 5.23 modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_vlm_pipes.errors import ConfigError, shown


@dataclass(frozen=True)
class LinearRope:
    """Positions `factor` times closer together."""

    factor: float

    def frequencies(self, base: np.ndarray, theta: float) -> np.ndarray:
        """The scaled frequencies, float32 like `base` [dims / 2]."""
        del theta
        return base / np.float32(self.factor)


@dataclass(frozen=True)
class Llama3RopeScalingParams:
    """Llama 3's scaling by wavelength. orig_max_position in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    orig_max_position: int

    def frequencies(self, base: np.ndarray, theta: float) -> np.ndarray:
        """Long wavelengths divided by `factor`, short ones kept, blended in between."""
        del theta
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / base
        slow, fast = self.orig_max_position / low, self.orig_max_position / high
        share = 0.0 if low == high else (self.orig_max_position / wavelength - low) / (high - low)
        blended = (1 - share) * base / self.factor + share * base
        scaled = np.where(wavelength > slow, base / self.factor, blended)
        return np.where(wavelength < fast, base, scaled).astype(np.float32)


@dataclass(frozen=True)
class YarnRope:
    """YaRN: slow pairs scaled, fast pairs kept, a ramp between `beta_slow` and `beta_fast` turns.

    magnitude: the factor on cos and sin. truncate: the ramp's ends are whole pairs.
    """

    factor: float
    original_max_position: int
    magnitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, base: np.ndarray, theta: float) -> np.ndarray:
        """The scaled frequencies, float32 like `base` [dims / 2]."""
        dims = 2 * len(base)
        low, high = (self._pair(turns, dims, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        width = high - low or 0.001
        ramp = np.clip((np.arange(len(base), dtype=np.float32) - low) / width, 0, 1)
        kept = (1 - ramp).astype(np.float32)
        return (base / np.float32(self.factor) * (1 - kept) + base * kept).astype(np.float32)

    def _pair(self, turns: float, dims: int, theta: float) -> float:
        """The pair that turns so many times within the original length."""
        length = self.original_max_position / (turns * 2 * math.pi)
        return dims * math.log(length) / (2 * math.log(theta))


@dataclass(frozen=True)
class LongRoPEScalingParams:
    """LongRoPE's factor lists, one entry for each rotary frequency. Positions in tokens."""

    short_factor: list[float]
    long_factor: list[float]
    original_max_position: int
    max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    @property
    def edge(self) -> int:
        """The longest sequence that the short factors are for."""
        return self.original_max_position

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
class DynamicRope:
    """NTK-aware: beyond `edge` tokens the base grows with the length of the sequence."""

    factor: float
    edge: int


StaticScaling = LinearRope | Llama3RopeScalingParams | YarnRope
RopeScaling = StaticScaling | LongRoPEScalingParams | DynamicRope


def read_rope_scaling(
    rope: Mapping[str, Any], original_max: int, max_positions: int
) -> RopeScaling | None:
    """The scaling a rope dictionary of config.json asks for; {} means none.

    Raises: ConfigError for a dictionary without a type, an unknown type or missing keys.
    """
    if not set(rope) - {"rope_theta", "partial_rotary_factor"}:
        return None
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None:
        raise ConfigError(f"rope_scaling {sorted(rope)} has no rope_type; expected e.g. 'llama3'")
    if kind not in tuple(_READERS):
        raise ConfigError(
            f"rope_type {shown(kind)} is not supported; supported: {', '.join(sorted(_READERS))}"
        )
    try:
        return _READERS[kind](rope, original_max, max_positions)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"rope_scaling of type {shown(kind)}: bad or missing {error}") from None


def _no_scaling(rope: Mapping[str, Any], original_max: int, max_positions: int) -> None:
    del rope, original_max, max_positions


def _read_linear(rope: Mapping[str, Any], original_max: int, max_positions: int) -> LinearRope:
    del original_max, max_positions
    return LinearRope(float(rope["factor"]))


def _read_dynamic(rope: Mapping[str, Any], original_max: int, max_positions: int) -> DynamicRope:
    del original_max
    return DynamicRope(float(rope["factor"]), max_positions)


def _read_llama3(
    rope: Mapping[str, Any], original_max: int, max_positions: int
) -> Llama3RopeScalingParams:
    del max_positions
    return Llama3RopeScalingParams(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        orig_max_position=int(rope.get("original_max_position_embeddings", original_max)),
    )


def _read_yarn(rope: Mapping[str, Any], original_max: int, max_positions: int) -> YarnRope:
    """With a factor of null: by how much the file's two lengths differ, as transformers does."""
    factor = rope["factor"]
    factor = max_positions / original_max if factor is None else float(factor)
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        magnitude = _yarn_magnitude(factor, rope.get("mscale"), rope.get("mscale_all_dim"))
    truncate = rope.get("truncate")
    return YarnRope(
        factor=factor,
        original_max_position=original_max,
        magnitude=float(magnitude),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=truncate is None or bool(truncate),
    )


def _yarn_magnitude(factor: float, mscale: float | None, mscale_all: float | None) -> float:
    def scaled(share: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0

    return scaled(mscale) / scaled(mscale_all) if mscale and mscale_all else scaled(1.0)


def _read_longrope(
    rope: Mapping[str, Any], original_max: int, max_positions: int
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


_READERS: dict[str, Callable[[Mapping[str, Any], int, int], RopeScaling | None]] = {
    "default": _no_scaling,
    "mrope": _no_scaling,
    "axial": _no_scaling,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "su": _read_longrope,
}
