"""Limits on the values of a config.json, far beyond any model: what exceeds them is damage.

Checked before anything is built from them, so that no number makes us loop or allocate. A room
adds the keys that only its architecture has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.errors import ConfigError, shown

MAX_MEMBERS = 2**14
MAX_DEPTH = 32
MAX_GRID = 4096  # patches along a side


@dataclass(frozen=True)
class Limit:
    """What the value of a key has to be; null is absent. expected: in words."""

    expected: str
    holds: Callable[[Any], bool]


def size(limit: int) -> Limit:
    """A whole number from 1."""
    return Limit(f"an int from 1 to {limit}", lambda v: type(v) is int and 1 <= v <= limit)


def sides(limit: int) -> Limit:
    """A size, or a short list of such (height and width)."""
    one = size(limit)

    def holds(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return 0 < len(value) <= 3 and all(map(one.holds, value))
        return one.holds(value)

    return Limit(one.expected, holds)


def number(low: float, high: float) -> Limit:
    """A finite number above `low`, up to `high`."""

    def holds(value: Any) -> bool:
        is_number = type(value) is int or (type(value) is float and math.isfinite(value))
        return is_number and low < value <= high

    return Limit(f"a number above {low:g}, up to {high:g}", holds)


def members(expected: str, holds: Callable[[Any], bool]) -> Limit:
    """A list of bounded length, of such members."""

    def all_hold(value: Any) -> bool:
        is_list = isinstance(value, (list, tuple)) and len(value) <= MAX_MEMBERS
        return is_list and all(holds(v) for v in value)

    return Limit(f"a list of {expected}", all_hold)


TEXT = Limit("a name", lambda v: isinstance(v, str) and len(v) < 200)
FLAG = Limit("true or false", lambda v: isinstance(v, bool))
NAMES = members("names", TEXT.holds)
INDICES = members("ints from 0", lambda v: type(v) is int and 0 <= v < 2**14)
FACTORS = members("numbers above 0", number(1e-9, 1e9).holds)
FACTOR = number(0, 1e9)
SHARE = Limit("a number from 0 to 1e9", lambda v: v == 0 or FACTOR.holds(v))
_OBJECT = Limit("an object", lambda v: isinstance(v, Mapping))

COMMON: Mapping[str, Limit] = {
    "hidden_size": size(2**18), "intermediate_size": size(2**22), "vocab_size": size(2**24),
    "num_hidden_layers": size(2**10), "num_attention_heads": size(2**14),
    "num_key_value_heads": size(2**14), "head_dim": size(2**14),
    "max_position_embeddings": size(2**40), "original_max_position_embeddings": size(2**40),
    "sliding_window": number(-2, 2**40), "image_size": sides(2**14), "patch_size": sides(2**10),
    "num_channels": size(2**6), "image_seq_length": size(2**20),
    "rope_theta": number(0, 1e15), "rms_norm_eps": number(0, 1), "layer_norm_eps": number(0, 1),
    "partial_rotary_factor": number(0, 1), "factor": FACTOR, "low_freq_factor": FACTOR,
    "high_freq_factor": FACTOR, "attention_factor": FACTOR, "short_factor": FACTORS,
    "beta_fast": SHARE, "beta_slow": SHARE, "mscale": SHARE, "mscale_all_dim": SHARE,
    "truncate": FLAG, "long_factor": FACTORS, "mrope_section": INDICES, "mrope_interleaved": FLAG,
    "hidden_act": TEXT, "projector_hidden_act": TEXT, "model_type": TEXT, "rope_type": TEXT,
    "vision_feature_select_strategy": TEXT, "tie_word_embeddings": FLAG, "attention_bias": FLAG,
    "mlp_bias": FLAG, "use_sliding_window": FLAG, "architectures": NAMES, "layer_types": NAMES,
    **dict.fromkeys(
        ("text_config", "vision_config", "llm_config", "rope_scaling", "rope_parameters"), _OBJECT
    ),
}  # fmt: skip


def check_limits(
    values: Mapping[str, Any],
    more: Mapping[str, Limit],
    where: str = "config.json",
    depth: int = 0,
) -> None:
    """Check the known keys of a parsed config.json and of the objects in it; null is absent.

    more: the limits of keys that only this architecture has.
    Raises: ConfigError naming the key, its value and what was expected.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where} nests objects deeper than {MAX_DEPTH}")
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_limits(value, more, f"{where}: {key[:40]}", depth + 1)
        limit = COMMON.get(key) or more.get(key)
        if value is not None and limit is not None and not limit.holds(value):
            raise ConfigError(f"{where}: {key!r} is {shown(value)}, expected {limit.expected}")
    image, patch = _first(values.get("image_size")), _first(values.get("patch_size"))
    if image is not None and patch is not None and image // patch > MAX_GRID:
        raise ConfigError(f"{where}: image_size {image} by patch_size {patch} is no picture grid")


def _first(value: Any) -> int | None:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if type(value) is int else None
