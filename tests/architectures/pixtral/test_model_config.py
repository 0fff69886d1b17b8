"""PixtralConfig: what config.json says, in both spellings, and what is refused."""

from typing import Any

import pytest

from mlx_vlm_pipes.architectures.pixtral import PixtralConfig, PixtralModel
from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError, UnsupportedModel
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import ReturnLogits
from tests.architectures.driving import changed, pipeline_config

TEXT = {
    "model_type": "mistral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 350,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-4, "rope_theta": 1e9,
    "sliding_window": None,
}  # fmt: skip
VISION = {
    "model_type": "pixtral", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5,
    "num_attention_heads": 3, "head_dim": 12, "image_size": [128, 128], "patch_size": 8,
    "num_channels": 1, "hidden_act": "silu", "rope_theta": 500.0,
}  # fmt: skip
V4 = {
    "model_type": "llava", "image_token_index": 10, "text_config": TEXT, "vision_config": VISION,
    "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
}  # fmt: skip


def initialize(config: dict[str, Any]) -> PixtralConfig:
    return PixtralConfig.initialize(pipeline_config(config))


def test_every_field_is_read() -> None:
    config = initialize(V4)
    documented = {
        "dtype": DType.float32, "image_token_index": 10, "hidden_size": 64,
        "num_attention_heads": 4, "rms_norm_eps": 1e-4, "rope_theta": 1e9, "max_seq_len": 4096,
        "num_hidden_layers": 3, "head_dim": 24, "num_key_value_heads": 2,
        "feed_forward_length": 128, "vocab_size": 350, "attention_multiplier": 24**-0.5,
        "patch_size": 8, "image_size": 128, "num_channels": 1, "vision_hidden_size": 48,
        "vision_num_attention_heads": 3, "vision_rope_theta": 500.0,
        "vision_num_hidden_layers": 5, "vision_intermediate_size": 96, "vision_head_dim": 12,
        "return_logits": ReturnLogits.LAST_TOKEN, "vision_hidden_act": "silu",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in documented} == documented
    assert config.get_kv_params().shape_per_block == [2, 3, 128, 2, 24]
    assert config.get_max_seq_len() == 4096
    assert PixtralConfig.get_num_layers(HuggingFaceConfig(V4)) == 3
    assert config == initialize(V4)


def test_transformers_5_spelling() -> None:
    text = changed(
        TEXT, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e9}
    )
    vision = changed(
        VISION, rope_theta=None, rope_parameters={"rope_type": "axial", "rope_theta": 500.0}
    )
    v5 = changed(V4, image_token_index=None, image_token_id=10, text_config=text)
    assert initialize({**v5, "vision_config": vision}) == initialize(V4)


def test_the_released_file_leaves_nearly_all_out() -> None:
    vision = {"model_type": "pixtral", "head_dim": 64, "hidden_act": "silu", "image_size": 1024,
              "patch_size": 16, "rope_theta": 10000.0}  # fmt: skip
    text = {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128,
            "intermediate_size": 14336, "max_position_embeddings": 1024000,
            "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072}  # fmt: skip
    config = initialize(
        {"model_type": "llava", "image_token_index": 10, "text_config": text,
         "vision_config": vision, "vision_feature_layer": -1,
         "vision_feature_select_strategy": "full"}
    )  # fmt: skip
    assert (config.num_attention_heads, config.head_dim, config.sliding_window) == (32, 128, None)
    assert (config.vision_hidden_size, config.vision_num_hidden_layers) == (1024, 24)
    assert (config.vision_intermediate_size, config.num_channels) == (4096, 3)
    assert (config.vision_feature_layers, config.projector_bias) == ((-1,), True)
    assert (config.projector_hidden_act, config.tie_word_embeddings) == ("gelu", False)
    no_act = changed(VISION, hidden_act=None)
    assert initialize({**V4, "vision_config": no_act}).vision_hidden_act == "gelu"


def test_fields_of_ours() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 512}  # fmt: skip
    text = changed(
        V4, "text_config", sliding_window=64, rope_scaling=scaling, hidden_act="gelu",
        tie_word_embeddings=True,
    )  # fmt: skip
    config = initialize({**text, "projector_hidden_act": "relu", "multimodal_projector_bias": False,
                         "vision_feature_layer": [-2, 0]})  # fmt: skip
    decoder = config.decoder_config()
    assert (decoder.sliding_window, decoder.hidden_act) == (64, "gelu")
    assert (decoder.rope.scaling, decoder.tie_word_embeddings) == (config.rope_scaling_params, True)
    assert config.rope_scaling_params is not None
    assert (config.projector_hidden_act, config.projector_bias) == ("relu", False)
    assert config.vision_feature_layers == (-2, 0)
    llama = changed(V4, "text_config", model_type="llama", attention_bias=True, mlp_bias=True)
    decoder = initialize(llama).decoder_config()
    assert (decoder.qkv_bias, decoder.o_bias, decoder.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("part", "values", "error", "message"),
    [
        ("", {"vision_config": None}, ConfigError, "vision_config"),
        ("", {"image_token_index": None}, ConfigError, "image_token_index"),
        ("", {"vision_feature_select_strategy": "default"}, UnsupportedModel, "'default'"),
        ("", {"vision_feature_select_strategy": None}, UnsupportedModel, "must say 'full'"),
        ("", {"vision_feature_layer": 6}, ConfigError, "6 with 5 vision layers; expected -6 to 5"),
        ("", {"vision_feature_layer": [-1, -7]}, ConfigError, "-7"),
        ("", {"vision_feature_layer": []}, ConfigError, "empty"),
        ("", {"projector_hidden_act": "swiglu"}, ConfigError, "swiglu"),
        ("vision_config", {"model_type": "clip_vision_model"}, UnsupportedModel, "clip_vision"),
        ("vision_config", {"hidden_act": "swiglu"}, ConfigError, "swiglu"),
        ("vision_config", {"head_dim": 10}, ConfigError, "head_dim 10"),
        ("vision_config", {"image_size": 4}, ConfigError, "image_size 4"),
        ("vision_config", {"rope_parameters": {"rope_type": "yarn"}}, ConfigError, "yarn"),
        ("text_config", {"model_type": "gemma"}, UnsupportedModel, "gemma"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, ConfigError, "yarn"),
    ],
)
def test_refused(part: str, values: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        initialize(changed(V4, part, **values))


def test_no_huggingface_config() -> None:
    pipeline = PipelineConfig(model=ModelConfig("/nowhere", quantization_encoding="float32"))
    with pytest.raises(ConfigError, match="/nowhere"):
        PixtralConfig.initialize(pipeline)


def test_calculate_max_seq_len() -> None:
    cfg = HuggingFaceConfig(V4)
    for owner in (PixtralConfig, PixtralModel):
        assert owner.calculate_max_seq_len(pipeline_config(V4), cfg) == 4096
        assert owner.calculate_max_seq_len(pipeline_config(V4, max_length=100), cfg) == 100
        with pytest.raises(ConfigError, match=r"Pixtral.*5000.*4096"):
            owner.calculate_max_seq_len(pipeline_config(V4, max_length=5000), cfg)
    with pytest.raises(ConfigError, match=r"Pixtral.*5000.*4096"):
        PixtralConfig.initialize(pipeline_config(V4, max_length=5000))
