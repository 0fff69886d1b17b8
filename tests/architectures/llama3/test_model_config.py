"""What Llama3Config refuses to read."""

from typing import Any

import pytest

from mlx_vlm_pipes.architectures.llama3 import Llama3Config
from mlx_vlm_pipes.errors import ConfigError
from tests.architectures.driving import pipeline_config

SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


def initialize(rope: dict[str, Any], kind: str = "llama", **options: Any) -> Llama3Config:
    values = {"model_type": kind, "rope_scaling": rope, "max_position_embeddings": 8192}
    return Llama3Config.initialize(pipeline_config(values, **options))


@pytest.mark.parametrize(
    ("rope", "unread"),
    [
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"type": "mrope", "mrope_interleaved": True}, "mrope_interleaved"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "llama3", **SCALED, "attention_factor": 1.1}, "attention_factor"),
        ({"rope_type": "longrope", **LONG, "short_mscale": 1.2}, "short_mscale"),
        ({"type": "dynamic", "factor": 2.0, "beta_fast": 32}, "beta_fast"),
        ({"rope_type": "default", "full_attention": {"rope_theta": 1.0}}, "full_attention"),
    ],
)
def test_a_rope_key_that_nobody_reads_is_refused(rope: dict[str, Any], unread: str) -> None:
    with pytest.raises(ConfigError, match=f"'{unread}', which this architecture does not have"):
        initialize(rope)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "type": "default", "rope_theta": 5e5, "factor": None},
        {"rope_type": "llama3", "type": "llama3", "rope_theta": 5e5, **SCALED,
         "original_max_position_embeddings": 4096},
        {"type": "su", **LONG, "factor": 2.0, "attention_factor": 1.0, "rope_theta": 1e4,
         "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
        {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0},
    ],
)  # fmt: skip
def test_what_transformers_writes_is_taken(rope: dict[str, Any]) -> None:
    scaled = 2 if rope.get("type") == "dynamic" else 1
    assert initialize(rope).max_seq_len == 8192 * scaled


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"type": "linear", "factor": 4.0}, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32768),
    ],
)
def test_a_scaled_rope_makes_the_limit_longer(rope: dict[str, Any], limit: int) -> None:
    assert initialize(rope).max_seq_len == limit
    with pytest.raises(ConfigError, match=str(limit)):
        initialize(rope, max_length=limit + 1)


def test_odd_values_are_named_or_do_no_harm() -> None:
    odd = {"hidden_size": 72, "num_attention_heads": 8, "num_key_value_heads": 8}
    with pytest.raises(ConfigError, match="head_dim times partial_rotary_factor is 9; rotary"):
        read(**odd).decoder_config()
    assert read(model_type="mistral", sliding_window=2**31).sliding_window == 2**30
    with pytest.raises(ConfigError, match=r"'sliding_window' is 4096\.5, expected an int"):
        read(model_type="mistral", sliding_window=4096.5)


def read(**values: Any) -> Llama3Config:
    values = {"model_type": "llama", "max_position_embeddings": 8192, **values}
    return Llama3Config.initialize(pipeline_config(values))


def test_there_is_nothing_to_override() -> None:
    with pytest.raises(ConfigError, match="'max_dynamic_patch'; this architecture knows none"):
        initialize({}, vision_config_overrides={"max_dynamic_patch": 3})


@pytest.mark.parametrize("kind", ["llama", "granite", "olmo"])
def test_a_window_left_over_in_a_model_without_one_is_not_read(kind: str) -> None:
    values = {"model_type": kind, "sliding_window": 12, "max_position_embeddings": 8192}
    assert Llama3Config.initialize(pipeline_config(values)).sliding_window is None
    values["model_type"] = "mistral"
    assert Llama3Config.initialize(pipeline_config(values)).sliding_window == 12


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("kind", "values", "layers"),
    [
        ("mistral", {"use_sliding_window": False}, None),
        ("phi3", {"use_sliding_window": False, "layer_types": [FULL] * 2}, None),
        ("smollm3", {"layer_types": [SLIDING, FULL]}, (True, False)),
        ("smollm3", {"use_sliding_window": True, "no_rope_layers": [1, 0]}, (False, True)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, (False, True)),
    ],
)
def test_a_type_reads_of_windows_what_transformers_reads(
    kind: str, values: dict[str, Any], layers: tuple[bool, ...] | None
) -> None:
    """Source: transformers 5.23, the configuration and the modelling file of each type."""
    config = read(model_type=kind, sliding_window=12, num_hidden_layers=2, **values)
    assert (config.sliding_window, config.sliding_layers) == (12, layers)


@pytest.mark.parametrize("types", [[FULL], [FULL] * 3, ["chunked_attention"] * 2])
def test_layer_types_that_are_not_one_for_each_layer(types: list[str]) -> None:
    with pytest.raises(ConfigError, match="for each of 2 layers"):
        read(model_type="qwen3", num_hidden_layers=2, layer_types=types)
