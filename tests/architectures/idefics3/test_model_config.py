"""Idefics3Config: what config.json says, in both spellings, and what is refused."""

import pytest

from mlx_vlm_pipes.architectures.idefics3 import Idefics3Config, Idefics3Model
from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError, UnsupportedModel
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.weights import WeightData
from tests.architectures.driving import changed, pipeline_config

TEXT = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 379,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
VISION = {
    "model_type": "idefics3", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5,
    "num_attention_heads": 3, "image_size": 364, "patch_size": 14, "num_channels": 1,
    "layer_norm_eps": 1e-4, "hidden_act": "gelu", "initializer_range": 0.01,
}  # fmt: skip
V4 = {
    "model_type": "idefics3", "scale_factor": 2, "image_token_id": 371,
    "text_config": TEXT, "vision_config": VISION,
}  # fmt: skip


def test_every_field_is_read() -> None:
    config = Idefics3Config.initialize(pipeline_config(V4))
    vision, text = config.vision_config, config.text_config
    assert (config.scale_factor, config.image_token_id, config.image_seq_len) == (2, 371, 169)
    assert (vision.dtype, vision.num_channels, vision.head_dim) == (DType.float32, 1, 16)
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (48, 96, 5)
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (364, 14, 3)
    assert (vision.layer_norm_eps, vision.hidden_act) == (1e-4, "gelu")
    assert (vision.initializer_range, vision.scale_factor) == (0.01, 2)
    assert vision.text_config_hidden_size == text.hidden_size == 64
    assert (text.rope_theta, text.kv_params.n_kv_heads) == (500000.0, 2)
    assert config.get_kv_params() == text.kv_params
    assert config.get_max_seq_len() == 2048
    assert Idefics3Config.get_num_layers(HuggingFaceConfig(V4)) == 3
    assert config == Idefics3Config.initialize(pipeline_config(V4))


@pytest.mark.parametrize("value", ["x", {}, [], True])
def test_an_initializer_range_of_any_type_is_left_unread(value) -> None:
    config = Idefics3Config.initialize(
        pipeline_config(changed(V4, "vision_config", initializer_range=value))
    )
    assert config.vision_config.initializer_range == 0.02


def test_both_spellings_of_rope_are_one() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }  # fmt: skip
    v4 = changed(V4, "text_config", rope_scaling=scaling)
    both = {**scaling, "rope_theta": 500000.0}
    v5 = changed(V4, "text_config", rope_theta=None, rope_parameters=both)
    read = [Idefics3Config.initialize(pipeline_config(c)).text_config for c in (v4, v5)]
    assert read[0] == read[1]
    assert read[0].rope_scaling_params is not None


def test_defaults() -> None:
    """What saved files leave out is the class default; mlx-community's vision part is short."""
    vision = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = {"model_type": "smolvlm", "text_config": TEXT, "vision_config": vision}
    read = Idefics3Config.initialize(pipeline_config(config))
    assert (read.scale_factor, read.image_token_id) == (2, 128257)
    tower = read.vision_config
    assert (tower.num_hidden_layers, tower.intermediate_size, tower.num_channels) == (12, 3072, 3)
    assert (tower.layer_norm_eps, tower.hidden_act) == (1e-6, "gelu_pytorch_tanh")


@pytest.mark.parametrize(
    ("image_size", "patch_size", "scale_factor", "tokens"),
    [(364, 14, 2, 169), (512, 16, 4, 64), (384, 14, 3, 81)],
)
def test_image_seq_len(image_size: int, patch_size: int, scale_factor: int, tokens: int) -> None:
    config = changed(V4, "vision_config", image_size=image_size, patch_size=patch_size)
    config = changed(config, scale_factor=scale_factor)
    assert Idefics3Config.initialize(pipeline_config(config)).image_seq_len == tokens


@pytest.mark.parametrize(
    ("part", "values", "error", "message"),
    [
        ("", {"vision_config": None}, ConfigError, "vision_config"),
        ("", {"scale_factor": 4}, ConfigError, "26 patches a side .* scale_factor 4"),
        ("vision_config", {"model_type": "clip_vision_model"}, UnsupportedModel, "clip_vision"),
        ("vision_config", {"num_attention_heads": 5}, ConfigError, "48 .* 5 heads"),
        ("vision_config", {"hidden_act": "swiglu"}, ConfigError, "swiglu"),
        ("vision_config", {"image_size": 7}, ConfigError, "0 patches a side"),
        ("text_config", {"model_type": "mamba"}, UnsupportedModel, "mamba"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, ConfigError, "yarn"),
    ],
)
def test_refused(part: str, values: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Idefics3Config.initialize(pipeline_config(changed(V4, part, **values)))


def test_no_huggingface_config() -> None:
    pipeline = PipelineConfig(model=ModelConfig("/nowhere", quantization_encoding="float32"))
    with pytest.raises(ConfigError, match="/nowhere"):
        Idefics3Config.initialize(pipeline)


def test_calculate_max_seq_len() -> None:
    cfg = HuggingFaceConfig(V4)
    for owner in (Idefics3Config, Idefics3Model):
        assert owner.calculate_max_seq_len(pipeline_config(V4), cfg) == 2048
        assert owner.calculate_max_seq_len(pipeline_config(V4, max_length=100), cfg) == 100
        with pytest.raises(ConfigError, match=r"3000.*2048"):
            owner.calculate_max_seq_len(pipeline_config(V4, max_length=3000), cfg)
    without = HuggingFaceConfig({"text_config": {"hidden_size": 64}})  # no class to ask either
    assert Idefics3Model.calculate_max_seq_len(pipeline_config(V4), without) == 4096


@pytest.mark.parametrize(
    ("outer", "text", "has_head", "tied"),
    [(True, None, True, True), (None, True, True, True), (False, False, True, False),
     (None, None, True, False), (False, None, False, True)],
)  # fmt: skip
def test_finalize_decides_the_tie(
    outer: bool | None, text: bool | None, has_head: bool, tied: bool
) -> None:
    values = changed(V4, tie_word_embeddings=outer)
    values = changed(values, "text_config", tie_word_embeddings=text)
    config = Idefics3Config.initialize(pipeline_config(values))
    names = ["layers.0.input_layernorm.weight", *(["lm_head.weight"] if has_head else [])]
    state = {name: WeightData(None, name, DType.float16, (1,)) for name in names}  # type: ignore[arg-type]  # never looked at
    for _ in range(2):
        config.finalize(HuggingFaceConfig(values), state, ReturnLogits.ALL, ReturnHiddenStates.LAST)
        text_config = config.text_config
        assert text_config.tie_word_embeddings is tied
        assert (text_config.norm_dtype, text_config.rms_norm_eps) == (DType.float16, 1e-5)
        assert text_config.return_logits is ReturnLogits.ALL
        assert text_config.return_hidden_states is ReturnHiddenStates.LAST
