"""Limits on the values of a config.json, far beyond any model: what exceeds them is damage.

Checked before anything is built from them, so that no number makes us loop or allocate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mlx_vlm_pipes.errors import ConfigError

# whole numbers from 1; lists of them where a size has two sides
_SIZES = {
    "hidden_size": 2**18, "out_hidden_size": 2**18, "intermediate_size": 2**22,
    "vocab_size": 2**24, "num_hidden_layers": 2**10, "depth": 2**10, "num_attention_heads": 2**14,
    "num_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14, "image_size": 2**14,
    "force_image_size": 2**14, "patch_size": 2**10, "num_channels": 2**6, "in_channels": 2**6,
    "in_chans": 2**6, "temporal_patch_size": 2**6, "spatial_merge_size": 2**6,
    "scale_factor": 2**6, "max_position_embeddings": 2**40, "window_size": 2**16,
    "image_seq_length": 2**20, "max_dynamic_patch": 2**12, "min_dynamic_patch": 2**12,
    "original_max_position_embeddings": 2**40, "tokens_per_second": 2**20,
    "num_position_embeddings": 2**24,
}  # fmt: skip
_SIDES = ("image_size", "patch_size", "force_image_size")
_NUMBERS = {
    # exclusive lower and inclusive upper bound
    "rope_theta": (0, 1e15), "rms_norm_eps": (0, 1), "layer_norm_eps": (0, 1),
    "partial_rotary_factor": (0, 1), "downsample_ratio": (0.01, 1), "factor": (0, 1e9),
    "low_freq_factor": (0, 1e9), "high_freq_factor": (0, 1e9), "attention_factor": (0, 1e9),
    "embedding_multiplier": (0, 1e9), "logits_scaling": (0, 1e9), "residual_multiplier": (0, 1e9),
    "attention_multiplier": (0, 1e9), "clip_qkv": (0, 1e9), "sliding_window": (-2, 2**40),
    "short_mscale": (0, 1e9), "long_mscale": (0, 1e9), "mscale": (0, 1e9),
    "layer_scale_init_value": (0, 1e9),
}  # fmt: skip
_TEXTS = (
    "hidden_act", "projector_hidden_act", "hidden_activation", "model_type", "rope_type",
    "norm_type", "ps_version", "vision_feature_select_strategy",
)  # fmt: skip
_FLAGS = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_qk_norm", "qk_normalization",
    "qkv_bias", "use_mean_pooling", "multimodal_projector_bias", "use_sliding_window",
)  # fmt: skip
_LISTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    # what each member has to be
    "mrope_section": ("ints from 0", lambda v: type(v) is int and 0 <= v < 2**14),
    "deepstack_visual_indexes": ("ints from 0", lambda v: type(v) is int and 0 <= v < 2**14),
    "fullatt_block_indexes": ("ints from 0", lambda v: type(v) is int and 0 <= v < 2**14),
    "short_factor": ("numbers above 0", lambda v: _is_number(v, 1e-9, 1e9)),
    "long_factor": ("numbers above 0", lambda v: _is_number(v, 1e-9, 1e9)),
    "architectures": ("names", lambda v: isinstance(v, str) and len(v) < 200),
    "layer_types": ("names", lambda v: isinstance(v, str) and len(v) < 200),
}
MAX_MEMBERS = 2**14
_OBJECTS = ("text_config", "vision_config", "llm_config", "rope_scaling", "rope_parameters")
MAX_DEPTH = 32
MAX_GRID = 4096  # patches along a side


def check_limits(values: Mapping[str, Any], where: str = "config.json", depth: int = 0) -> None:
    """Check the known keys of a parsed config.json and of the objects in it; null is absent.

    Raises: ConfigError naming the key, its value and what was expected.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where} nests objects deeper than {MAX_DEPTH}")
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_limits(value, f"{where}: {key[:40]}", depth + 1)
        if value is not None:
            _check(key, value, where)
    image, patch = _first(values.get("image_size")), _first(values.get("patch_size"))
    if image is not None and patch is not None and image // patch > MAX_GRID:
        raise ConfigError(f"{where}: image_size {image} by patch_size {patch} is no picture grid")


def _check(key: str, value: Any, where: str) -> None:
    expected = ""
    if key in _SIZES and not _is_size(value, _SIZES[key], sides=key in _SIDES):
        expected = f"an int from 1 to {_SIZES[key]}"
    elif key in _NUMBERS and not _is_number(value, *_NUMBERS[key]):
        low, high = _NUMBERS[key]
        expected = f"a number above {low:g}, up to {high:g}"
    elif key in _TEXTS and not (isinstance(value, str) and len(value) < 200):
        expected = "a name"
    elif key in _FLAGS and not isinstance(value, bool):
        expected = "true or false"
    elif key in _LISTS and not _is_list(value, _LISTS[key][1]):
        expected = f"a list of {_LISTS[key][0]}"
    elif key in _OBJECTS and not isinstance(value, Mapping):
        expected = "an object"
    if expected:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ConfigError(f"{where}: {key!r} is {shown}, expected {expected}")


def _is_size(value: Any, limit: int, *, sides: bool) -> bool:
    """An int within the limit; with `sides`, or a short list of such (height and width)."""
    if sides and isinstance(value, (list, tuple)):
        return 0 < len(value) <= 3 and all(type(v) is int and 1 <= v <= limit for v in value)
    return type(value) is int and 1 <= value <= limit


def _is_list(value: Any, is_member: Callable[[Any], bool]) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) <= MAX_MEMBERS
    return is_list and all(is_member(v) for v in value)


def _is_number(value: Any, low: float, high: float) -> bool:
    if type(value) is int:
        return low < value <= high
    return type(value) is float and math.isfinite(value) and low < value <= high


def _first(value: Any) -> int | None:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if type(value) is int else None
