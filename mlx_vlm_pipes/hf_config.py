"""config.json as an object with attributes, in the spellings of transformers 4 and 5.

Objects of transformers' own config classes work in every look-up here as well: only attributes
are read. Source: transformers 5.23 configuration files of each model type.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.config_limits import check_limits
from mlx_vlm_pipes.errors import ConfigError, shown
from mlx_vlm_pipes.facts import NO_FACTS, Composite, RoomFacts
from mlx_vlm_pipes.json_files import require_json
from mlx_vlm_pipes.registry import find_facts

# What nn/activations.py has; the names stand here so that they can be checked without MLX.
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu",
    "prelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu",
)  # fmt: skip

_EVERY_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_LONGROPE_KEYS = (
    "short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings",
)  # fmt: skip
# by type of rope: what its dictionary may say
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (), "axial": (), "mrope": (),
    "linear": ("factor",), "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
        "finetuned",  # in the files of YaRN's authors; changes nothing
    ),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "longrope": _LONGROPE_KEYS, "su": _LONGROPE_KEYS,
}  # fmt: skip


class HuggingFaceConfig:
    """Attribute access over a parsed config.json; nested objects become nested configs.

    Keys that the file leaves out are answered with the class default of its `model_type`, as
    transformers does. A key known to neither raises AttributeError.
    Raises: ConfigError for values beyond any model, of the keys that models are built from.
    """

    def __init__(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        facts, outer = NO_FACTS, None
        if defaults is None:
            listed, kind = values.get("architectures"), values.get("model_type")
            facts = find_facts(listed if isinstance(listed, (list, tuple)) else (), kind)
            check_limits(values, facts.limits)
            outer = facts.composites.get(kind) if isinstance(kind, str) else None
            defaults = _top_defaults(values, outer, facts)
        self._values: dict[str, Any] = {}
        self._defaults = dict(defaults)
        for key, value in values.items():
            if isinstance(value, Mapping) and key.endswith("_config") and "quant" not in key:
                value = HuggingFaceConfig(value, _part_defaults(key, value, outer, facts))
            self._values[key] = value

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

    @property
    def implied(self) -> dict[str, Any]:
        """Keys that the file leaves out, with what its `model_type` says for them."""
        return {k: v for k, v in self._defaults.items() if k not in self._values}

    @property
    def parts(self) -> dict[str, HuggingFaceConfig]:
        """The nested configurations, by key."""
        return {k: v for k, v in self._values.items() if isinstance(v, HuggingFaceConfig)}


AutoConfig = HuggingFaceConfig  # the name that the documented signatures use


def _top_defaults(
    values: Mapping[str, Any], outer: Composite | None, facts: RoomFacts
) -> dict[str, Any]:
    """What transformers' class answers for keys that the top of a file leaves out."""
    if outer is None:
        return _class_defaults(values.get("model_type"), facts)
    if outer.flat and "text_config" not in values:
        return {**_class_defaults(outer.text, facts), **outer.defaults}
    return dict(outer.defaults)


def _part_defaults(
    key: str, part: Mapping[str, Any], outer: Composite | None, facts: RoomFacts
) -> dict[str, Any]:
    """The same for a part, by the model_type that it names, or that the outer one implies."""
    kind = part.get("model_type")
    implied = {"text_config": outer.text, "vision_config": outer.vision} if outer else {}
    if outer is not None and (kind is None or key in outer.fixed):
        kind = implied.get(key)
    known = _class_defaults(kind, facts)
    return known if kind is None else {"model_type": kind, **known}


def _class_defaults(kind: Any, facts: RoomFacts) -> dict[str, Any]:
    if kind not in facts.class_defaults:
        facts = find_facts((), kind)
    return dict(facts.class_defaults.get(kind, {}))


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
        raise ConfigError(
            f"config.json: {names[0]!r} is {shown(value)}, expected an int >= {minimum}"
        )
    return value


def optional_int(config: Any, *names: str, default: int, minimum: int = 1) -> int:
    """As require_int, with a default where none of the names is there."""
    if lookup(config, *names) is None:
        return default
    return require_int(config, *names, minimum=minimum)


def text_config(config: Any) -> Any:
    """The part that describes the decoder: `llm_config`, `text_config`, or the config itself."""
    return lookup(config, "llm_config", "text_config", default=config)


def require_vision_config(config: Any) -> Any:
    """The part that describes the tower. Raises: ConfigError if there is none."""
    vision = lookup(config, "vision_config")
    if vision is None:
        kind = lookup(config, "model_type", default="the configuration")
        raise ConfigError(f"{kind}: config.json lacks 'vision_config'; is it a text-only model?")
    return vision


def activation_name(config: Any, *names: str, default: str) -> str:
    """The name of an activation. Raises: ConfigError for one that we do not have."""
    name = lookup(config, *names, default=default)
    if name not in ACTIVATIONS:
        raise ConfigError(f"{names[0]} {shown(name)}; supported: {', '.join(ACTIVATIONS)}")
    return name


def rope_dictionary(config: Any) -> dict[str, Any]:
    """`rope_parameters` if it is a non-empty dict, else `rope_scaling`, else {}."""
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, Mapping) and value:
            return dict(value)
    return {}


def position_limit(config: Any, default: int | None = None) -> int:
    """The longest sequence of a text configuration, in tokens.

    max_position_embeddings, or `default` where it is missing; times the factor for linear and
    dynamic ropes, whose files keep the length before scaling; for YaRN at least its original length
    times the factor. transformers itself sets no limit.
    Raises: ConfigError if it is missing without a default, or no number.
    """
    given = lookup(config, "max_position_embeddings")
    limit = default if given is None and default else require_int(config, "max_position_embeddings")
    rope = rope_dictionary(config)
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if not isinstance(factor, (int, float)) or factor <= 1:
        return limit
    if kind in ("linear", "dynamic"):
        return int(limit * factor)
    if kind == "yarn":
        return max(limit, int(rope.get("original_max_position_embeddings", limit) * factor))
    return limit


def check_rope_keys(config: Any, also: Collection[str] = ()) -> None:
    """Raises: ConfigError for a key of the rope dictionary that nobody reads.

    also: keys that the architecture reads, besides those of the dictionary's type. A type that we
    do not have is not looked into.
    Source: transformers 5.23 modeling_rope_utils.py, _validate_..._rope_parameters.
    """
    rope = rope_dictionary(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        return
    known = {*_EVERY_ROPE_KEYS, *_ROPE_KEYS[kind], *also}
    unread = [key for key, value in rope.items() if value is not None and key not in known]
    if unread:
        names = ", ".join(map(repr, sorted(unread)))
        raise ConfigError(
            f"rope_scaling of type {shown(kind)} says {names}, which this architecture does not"
            " have"
        )


def rope_theta(config: Any, default: float = 10000.0) -> float:
    """Base of the rotary frequencies, from either spelling."""
    value = rope_dictionary(config).get("rope_theta")
    return float(value if value is not None else lookup(config, "rope_theta", default=default))


def axial_theta(vision_config: Any) -> float:
    """Base of a tower's row and column angles. Raises: ConfigError for another type of rope."""
    check_rope_keys(vision_config)
    kind = rope_dictionary(vision_config).get("rope_type", "axial")
    if kind not in ("axial", "default"):
        raise ConfigError(f"vision rope_type {shown(kind)} is not supported; supported: axial")
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
