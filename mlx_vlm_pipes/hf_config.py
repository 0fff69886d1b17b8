"""config.json as an object with attributes, in the spellings of transformers 4 and 5.

Objects of transformers' own config classes work in every look-up here as well: only attributes
are read. Source: transformers 5.23 configuration files of each model type (spec, section 1.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.config_limits import check_limits
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.json_files import require_json

_LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_QWEN = {
    **_LLAMA, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936,
    "max_position_embeddings": 32768, "use_sliding_window": False,
}  # fmt: skip
# What a saved configuration may leave out, because it equals the class default.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "granite": {
        **_LLAMA, "attention_multiplier": 1.0, "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0, "logits_scaling": 1.0, "tie_word_embeddings": False,
    },
    "olmo": {k: v for k, v in {**_LLAMA, "vocab_size": 50304}.items() if k != "rms_norm_eps"},
    "phi3": {
        **_LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 32064,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
    },
    "qwen2_5_vl_text": {
        **_QWEN, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
    },
    "idefics3_vision": {
        "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "initializer_range": 0.02,
    },
    "pixtral": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
        "num_channels": 3, "rope_theta": 10000.0,
    },
    "internvl_vision": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
        "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "use_qk_norm": False,
        "attention_bias": False, "hidden_act": "gelu", "use_mean_pooling": True,
    },
    "qwen2_5_vl_vision": {
        "hidden_size": 3584, "intermediate_size": 3420, "depth": 32, "num_heads": 16,
        "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "tokens_per_second": 4, "window_size": 112, "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu",
    },
}  # fmt: skip
CLASS_DEFAULTS["idefics3"] = CLASS_DEFAULTS["idefics3_vision"]  # older files: vision_config says so
CLASS_DEFAULTS["smolvlm_vision"] = CLASS_DEFAULTS["idefics3_vision"]
CLASS_DEFAULTS["qwen2_5_vl"] = CLASS_DEFAULTS["qwen2_5_vl_vision"]
_PARTS = {
    # outer model_type: (text model_type, vision model_type) where a part does not say its own
    "idefics3": ("llama", "idefics3_vision"),
    "smolvlm": ("llama", "smolvlm_vision"),
    "llava": ("mistral", "pixtral"),
    "pixtral": ("mistral", "pixtral"),
    "internvl": ("qwen2", "internvl_vision"),
    "qwen2_5_vl": ("qwen2_5_vl_text", "qwen2_5_vl_vision"),
}


class HuggingFaceConfig:
    """Attribute access over a parsed config.json; nested objects become nested configs.

    Keys that the file leaves out are answered with the class default of its `model_type`, as
    transformers does. A key known to neither raises AttributeError.
    Raises: ConfigError for values beyond any model, of the keys that models are built from.
    """

    def __init__(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        if defaults is None:
            check_limits(values)
        outer = values.get("model_type")
        text_type, vision_type = _PARTS.get(outer if isinstance(outer, str) else "", ("", ""))
        self._values: dict[str, Any] = {}
        self._defaults = dict(defaults or {})
        for key, value in values.items():
            if isinstance(value, Mapping) and key.endswith("_config") and "quant" not in key:
                fallback = {"text_config": text_type, "vision_config": vision_type}.get(key, "")
                value = HuggingFaceConfig(value, _class_defaults(value, fallback))
            self._values[key] = value
        if not self._defaults and "text_config" not in values and "llm_config" not in values:
            self._defaults = _class_defaults(values, "")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for source in (self.__dict__.get("_values", {}), self.__dict__.get("_defaults", {})):
            if name in source:
                return source[name]
        raise AttributeError(f"config.json has no {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """The file's own content, defaults left out."""
        return {
            k: v.to_dict() if isinstance(v, HuggingFaceConfig) else v
            for k, v in self._values.items()
        }


AutoConfig = HuggingFaceConfig  # the name that the documented signatures use


def _class_defaults(values: Mapping[str, Any], fallback: str) -> dict[str, Any]:
    kind = values.get("model_type") or fallback
    if fallback == "qwen2_5_vl_vision" or fallback == "qwen2_5_vl_text":
        kind = fallback  # released files name the outer type in both parts
    if kind == "qwen2_5_vl":  # a flat file: its own keys are the text's
        kind = "qwen2_5_vl_text"
    return dict(CLASS_DEFAULTS.get(kind if isinstance(kind, str) else "", {}))


def read_config(folder: Path) -> HuggingFaceConfig:
    """config.json of a model folder. Code named by `auto_map` or `model_file` is never run."""
    return HuggingFaceConfig(require_json(folder / "config.json"))


def lookup(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the named attributes that exists and is not None."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default


def require(config: Any, *names: str) -> Any:
    """As lookup. Raises: ConfigError naming the key when none is there."""
    value = lookup(config, *names)
    if value is None:
        kind = lookup(config, "model_type", default="the configuration")
        raise ConfigError(f"{kind}: config.json lacks {names[0]!r}")
    return value


def require_int(config: Any, *names: str, minimum: int = 1) -> int:
    """As require, for whole numbers of at least `minimum`."""
    value = require(config, *names)
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"config.json: {names[0]!r} is {value!r}, expected an int >= {minimum}")
    return value


def optional_int(config: Any, *names: str, default: int, minimum: int = 1) -> int:
    """As require_int, with a default where none of the names is there."""
    if lookup(config, *names) is None:
        return default
    return require_int(config, *names, minimum=minimum)


def text_config(config: Any) -> Any:
    """The part that describes the decoder: `llm_config`, `text_config`, or the config itself."""
    return lookup(config, "llm_config", "text_config", default=config)


def rope_dictionary(config: Any) -> dict[str, Any]:
    """`rope_parameters` if it is a non-empty dict, else `rope_scaling`, else {}."""
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, Mapping) and value:
            return dict(value)
    return {}


def rope_theta(config: Any, default: float = 10000.0) -> float:
    """Base of the rotary frequencies, from either spelling."""
    value = rope_dictionary(config).get("rope_theta")
    return float(value if value is not None else lookup(config, "rope_theta", default=default))


def axial_theta(vision_config: Any) -> float:
    """Base of a tower's row and column angles. Raises: ConfigError for another type of rope."""
    kind = rope_dictionary(vision_config).get("rope_type", "axial")
    if kind not in ("axial", "default"):
        raise ConfigError(f"vision rope_type {kind!r} is not supported; supported: axial")
    return rope_theta(vision_config)


def head_dim(config: Any) -> int:
    """`head_dim`, else hidden_size / num_attention_heads. Raises: ConfigError if that is none."""
    explicit = lookup(config, "head_dim")
    if explicit is not None:
        return require_int(config, "head_dim")
    hidden, heads = require_int(config, "hidden_size"), require_int(config, "num_attention_heads")
    if hidden < heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden} for {heads} attention heads; expected at least one "
            "number for each head"
        )
    return hidden // heads


def tie_flag(outer: Any, text: Any) -> bool | None:
    """True if one of them says so, False if one denies it and none says so, else None."""
    values = [_own(config, "tie_word_embeddings") for config in (outer, text)]
    if True in values:
        return True
    return False if False in values else None


def _own(config: Any, name: str) -> Any:
    """A key that the file itself carries (class defaults do not count)."""
    if isinstance(config, HuggingFaceConfig):
        return config._values.get(name)
    return getattr(config, name, None)
