"""InternVLConfig and VisionConfig from both dialects, and what they refuse."""

from typing import Any

import pytest

from mlx_vlm_pipes.architectures.internvl import InternVLConfig, InternVLModel, VisionConfig
from mlx_vlm_pipes.architectures.internvl.model_config import is_original
from mlx_vlm_pipes.architectures.llama3 import Llama3Config
from mlx_vlm_pipes.architectures.qwen3 import Qwen3Config
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import CheckpointError, ConfigError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import ReturnLogits
from tests.architectures.internvl.driving import NATIVE, TEXT, VISION, pipeline_config

LLM = {k: v for k, v in TEXT.items() if k not in ("model_type", "head_dim")}
ORIGINAL: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "llm_config": {**LLM, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "vision_config": {**VISION, "model_type": "intern_vit_6b"},
    "ps_version": "v2",
    "select_layer": -1,
    "force_image_size": 32,
    "max_dynamic_patch": 6,
}


def initialize(values: dict[str, Any], **options: Any) -> InternVLConfig:
    config = HuggingFaceConfig(values)
    return InternVLConfig.initialize(pipeline_config(config, **options))


def test_native_dialect() -> None:
    config = initialize(NATIVE)
    vision = config.vision_config
    assert (vision.qk_normalization, vision.qkv_bias, vision.norm_type) == (
        False, True, "layer_norm",
    )  # fmt: skip
    assert (vision.head_dim, vision.layer_norm_eps, vision.dtype) == (8, 1e-6, DType.bfloat16)
    assert (config.downsample_ratio, config.num_image_token) == (0.5, 4)
    assert isinstance(config.llm_config, Qwen3Config)
    assert initialize(NATIVE) == config


def test_native_defaults() -> None:
    """What transformers leaves out of a saved configuration."""
    vision = VisionConfig.initialize_from_config(
        HuggingFaceConfig({"model_type": "internvl_vision"})
    )
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (
        1024, 4096, 24,
    )  # fmt: skip
    assert (vision.image_size, vision.patch_size, vision.norm_type) == (448, 14, "layer_norm")
    assert not vision.qk_normalization
    assert not vision.final_norm


def test_original_dialect() -> None:
    config = initialize(ORIGINAL)
    vision = config.vision_config
    assert (vision.qk_normalization, vision.qkv_bias) == (True, False)  # not transformers' defaults
    assert config.num_image_token == 16  # of a forced tile of 32 pixels
    assert type(config.llm_config) is Llama3Config
    bare = {k: v for k, v in ORIGINAL["vision_config"].items() if k != "norm_type"}
    assert VisionConfig.initialize_from_config(HuggingFaceConfig(bare)).norm_type == "rms_norm"


def test_dialect_without_llm_config() -> None:
    """mlx-vlm keeps the original's names, but may carry a text_config."""
    values = {"model_type": "internvl_chat", "text_config": TEXT}
    told = {**values, "vision_config": {**VISION, "qk_normalization": False}}
    assert is_original(HuggingFaceConfig(told))
    native = {**values, "vision_config": {**VISION, "use_qk_norm": False}}
    assert not is_original(HuggingFaceConfig(native))


def test_qk_norm_eps_is_fixed_in_transformers() -> None:
    eps = {"layer_norm_eps": 1e-2}
    native = HuggingFaceConfig({**VISION, **eps, "use_qk_norm": True})
    assert VisionConfig.initialize_from_config(native).qk_norm_eps == 1e-6
    original = HuggingFaceConfig({**VISION, **eps, "qk_normalization": True})
    assert VisionConfig.initialize_from_config(original).qk_norm_eps == 1e-2


def test_finalize() -> None:
    config = initialize(ORIGINAL)
    cfg = HuggingFaceConfig(ORIGINAL)
    names: Any = {"vision_model.encoder.layers.0.attn.proj.bias": None}
    for _ in range(2):
        config.finalize(cfg, {}, names, DType.float16, ReturnLogits.ALL)
    assert config.vision_config.o_proj_bias
    assert config.vision_config.dtype is DType.float16
    assert config.llm_config.attention_bias  # Qwen2
    assert config.llm_config.return_logits is ReturnLogits.ALL
    config.finalize(cfg, {}, {}, DType.float16, ReturnLogits.ALL)
    assert not config.vision_config.o_proj_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, "vision_config"),
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio 0.3"),
        ({"downsample_ratio": "half"}, "'half', expected a number"),
        ({"vision_feature_layer": -4}, "vision_feature_layer -4"),
        ({"vision_feature_layer": [1, 2]}, "one layer number"),
        ({"vision_feature_select_strategy": "full"}, "'full'"),
        ({"projector_hidden_act": "swiglu"}, "'swiglu'"),
        ({"text_config": {**TEXT, "model_type": "internlm2"}}, "'internlm2'"),
        ({"vision_config": {**VISION, "norm_type": "batch_norm"}}, "'batch_norm'"),
        ({"vision_config": {**VISION, "num_attention_heads": 5}}, "5 heads"),
        ({"vision_config": {**VISION, "image_size": [16, 32]}}, "square"),
        ({"vision_config": {**VISION, "num_channels": 4}}, "num_channels 4"),
        ({"vision_config": {**VISION, "patch_size": 16}}, "blocks of 2 x 2"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        initialize({**NATIVE, **changes})
    assert "\n" not in str(caught.value)


def test_max_seq_len() -> None:
    config = HuggingFaceConfig(NATIVE)
    assert InternVLModel.calculate_max_seq_len(pipeline_config(config), config) == 256
    short = pipeline_config(config, max_length=64)
    assert InternVLConfig.calculate_max_seq_len(short, config) == 64
    with pytest.raises(ConfigError, match=r"257.*256"):
        InternVLModel.calculate_max_seq_len(pipeline_config(config, max_length=257), config)
    silent = HuggingFaceConfig({**NATIVE, "model_type": None, "text_config": {}})
    assert InternVLModel.calculate_max_seq_len(pipeline_config(silent), silent) == 4096


def test_kv_params_are_the_text_models() -> None:
    config = HuggingFaceConfig(NATIVE)
    pipeline = pipeline_config(config)
    params = InternVLModel.get_kv_params(
        config, pipeline, pipeline.model.devices, pipeline.model.kv_cache, DType.float32
    )
    assert (params.n_kv_heads, params.head_dim, params.num_layers) == (2, 16, 2)
    assert params == initialize(NATIVE).get_kv_params()
    assert InternVLConfig.get_num_layers(config) == 2


def test_activation_memory() -> None:
    """The documented figures: 8192 tokens, one device, 448 / 14 / 0.5."""
    config = HuggingFaceConfig({"vision_config": {"model_type": "internvl_vision"}})
    pipeline = pipeline_config(config)
    assert InternVLModel.estimate_activation_memory(pipeline, config) == 5_133_828_096
    pipeline.runtime.enable_chunked_prefill = False
    assert InternVLModel.estimate_activation_memory(pipeline, config) == 6_878_658_560
    pipeline.model.vision_config_overrides["max_dynamic_patch"] = 11
    assert InternVLModel.estimate_activation_memory(pipeline, config) == (
        6_878_658_560 - 128 * 2**20
    )
    with pytest.raises(ConfigError, match="vision_config"):
        InternVLModel.estimate_activation_memory(pipeline, HuggingFaceConfig({}))
