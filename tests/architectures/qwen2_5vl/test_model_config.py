"""config.json of Qwen2.5-VL in both spellings, and what the weights add."""

import dataclasses
from typing import Any

import mlx.core as mx
import pytest

from mlx_vlm_pipes.architectures.qwen2_5vl.model_config import Qwen2_5VLConfig, VisionConfig
from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import ReturnLogits
from mlx_vlm_pipes.weights import WeightData

_ZERO = mx.zeros((1,))
TEXT = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 8,
    "window_size": 56, "fullatt_block_indexes": [1], "out_hidden_size": 48,
    "tokens_per_second": 2,
}  # fmt: skip
IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
V4 = {
    "model_type": "qwen2_5_vl", **TEXT, **IDS, "rope_theta": 5000.0, "use_sliding_window": False,
    "sliding_window": 64, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
    "vision_config": {**VISION, "model_type": "qwen2_5_vl", "in_chans": 3},
}  # fmt: skip
V5 = {
    "model_type": "qwen2_5_vl", **IDS,
    "text_config": {
        "model_type": "qwen2_5_vl_text", **TEXT, "layer_types": ["full_attention"] * 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 2, 3],
        },
    },
    "vision_config": {
        **VISION, "model_type": "qwen2_5_vl_vision", "in_channels": 3,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    },
}  # fmt: skip


def pipeline(config: dict[str, Any], **options: Any) -> PipelineConfig:
    model = ModelConfig(
        model_path="somewhere",
        huggingface_config=HuggingFaceConfig(config),
        quantization_encoding="float32",
        **options,
    )
    return PipelineConfig(model=model)


def read(config: dict[str, Any], **options: Any) -> Qwen2_5VLConfig:
    return Qwen2_5VLConfig.initialize(pipeline(config, **options))


def weight(name: str, dtype: DType) -> WeightData:
    return dataclasses.replace(WeightData.from_array(_ZERO, name), dtype=dtype)


def test_both_spellings_read_alike() -> None:
    old, new = read(V4), read(V5)
    assert old == new
    assert (old.image_token_id, old.video_token_id, old.vision_start_token_id) == (90, 91, 92)
    assert old.mrope_section == [1, 2, 3]
    assert old.tokens_per_second == 2
    assert old.spatial_merge_size == 2
    assert old.llm_config.rope_theta == 5000.0
    assert old.llm_config.sliding_window is None
    assert old.llm_config.decoder_config().rope.mrope_section == (1, 2, 3)
    vision = old.vision_config
    assert (vision.patch_size, vision.window_size, vision.depth) == (8, 56, 3)
    assert (vision.num_attention_heads, vision.fullatt_block_indexes) == (2, [1])
    assert vision.rms_norm_eps == 1e-6
    assert vision.patch_elements == 3 * 2 * 8 * 8


def test_class_defaults_fill_what_a_file_leaves_out() -> None:
    config = read({"model_type": "qwen2_5_vl", "hidden_size": 3584, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "vision_config": {"hidden_size": 1280}})  # fmt: skip
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    assert config.vision_start_token_id == 151652
    assert config.mrope_section == [16, 24, 24]
    assert config.tokens_per_second == 4
    assert config.llm_config.rope_theta == 1e6
    assert config.llm_config.mrope_section == (16, 24, 24)
    vision = config.vision_config
    assert (vision.depth, vision.intermediate_size, vision.head_dim) == (32, 3420, 80)
    assert vision.fullatt_block_indexes == [7, 15, 23, 31]
    assert vision.dtype is vision.llm_dtype is DType.bfloat16


def test_outer_fields_are_the_parts_own() -> None:
    config = read(V4)
    config.mrope_section, config.spatial_merge_size = [2, 2, 2], 3
    assert config.llm_config.decoder_config().rope.mrope_section == (2, 2, 2)
    assert config.vision_config.merge_unit == 9
    config.llm_config.mrope_section = (3, 2, 1)
    assert (config.mrope_section, dataclasses.asdict(config)["mrope_section"]) == ([3, 2, 1],) * 2


def test_a_second_model_config_replaces_the_first() -> None:
    other = pipeline(V5, max_length=17).model
    assert Qwen2_5VLConfig.initialize(pipeline(V4), other).get_max_seq_len() == 17


def test_max_seq_len() -> None:
    for config in (V4, V5):
        cfg = HuggingFaceConfig(config)
        assert Qwen2_5VLConfig.calculate_max_seq_len(pipeline(config), cfg) == 256
        assert Qwen2_5VLConfig.calculate_max_seq_len(pipeline(config, max_length=9), cfg) == 9
        with pytest.raises(ConfigError, match=r"qwen2_5_vl.* 257 .* 256"):
            Qwen2_5VLConfig.calculate_max_seq_len(pipeline(config, max_length=257), cfg)
        assert Qwen2_5VLConfig.get_num_layers(cfg) == 2
    kv = read(V5).get_kv_params()
    assert (kv.n_kv_heads, kv.head_dim, kv.num_layers) == (2, 12, 2)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("", {"vision_config": None}, "lacks 'vision_config'"),
        ("text_config", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 2]}},
         r"\[1, 2, 2\].* 6"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "mrope_section": [1, 2, 3]}},
         "yarn"),
        ("text_config", {"hidden_act": "swiglu"}, "swiglu"),
        ("text_config", {"hidden_size": 96, "num_attention_heads": 8}, "out_hidden_size 48.* 96"),
        ("vision_config", {"hidden_act": "swiglu"}, "swiglu"),
        ("vision_config", {"window_size": 15}, "window_size 15.* 16"),
        ("vision_config", {"num_heads": 3}, "hidden_size 32 with 3 heads"),
        ("vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ("vision_config", {"depth": "many"}, "depth"),
    ],
)  # fmt: skip
def test_refusals(part: str, change: dict[str, Any], message: str) -> None:
    config = {**V5, part: {**V5[part], **change}} if part else {**V5, **change}  # pyright: ignore[reportGeneralTypeIssues]  # parts are dicts
    with pytest.raises(ConfigError, match=message):
        read(config)


def finalize(config: Qwen2_5VLConfig, cfg: dict[str, Any], *names: str) -> None:
    text = {n: weight(n, DType.float16) for n in names if "patch" not in n}
    vision = {n: weight(n, DType.float32) for n in names if "patch" in n}
    Qwen2_5VLConfig.finalize(
        config, HuggingFaceConfig(cfg), pipeline(cfg), text, vision, ReturnLogits.ALL
    )


@pytest.mark.parametrize("prefixes", [("language_model.", "vision_encoder."), ("", "")])
def test_finalize_takes_dtypes_and_biases_from_the_weights(prefixes: tuple[str, str]) -> None:
    names = (
        f"{prefixes[0]}embed_tokens.weight", f"{prefixes[0]}layers.0.input_layernorm.weight",
        "lm_head.weight", f"{prefixes[1]}patch_embed.proj.weight",
    )  # fmt: skip
    for cfg in (V4, V5):
        config = read(cfg)
        finalize(config, cfg, *names)
        once = dataclasses.replace(config)
        finalize(config, cfg, *names)
        assert config == once
        assert config.vision_config.dtype is DType.float32
        assert config.vision_config.llm_dtype is DType.float16
        assert config.vision_config.quant_config is None
        llm = config.llm_config
        assert (llm.attention_bias, llm.output_bias) == (True, False)
        assert llm.norm_dtype is DType.float16
        assert llm.rms_norm_eps == 1e-5
        assert llm.return_logits is ReturnLogits.ALL
        assert llm.tie_word_embeddings is False


def test_a_packed_weight_has_the_dtype_of_its_scales() -> None:
    config = read(V4)
    text = {
        "embed_tokens.weight": weight("", DType.uint32),
        "embed_tokens.scales": weight("", DType.bfloat16),
    }
    vision = {"vision_model.patch_embed.proj.weight": weight("", DType.float16)}
    config.finalize(HuggingFaceConfig(V4), pipeline(V4), text, vision, ReturnLogits.LAST_TOKEN)
    assert config.vision_config.llm_dtype is DType.bfloat16


def test_the_outer_tie_flag_holds_for_the_nested_text() -> None:
    cfg = {**V5, "tie_word_embeddings": True}
    config = read(cfg)
    finalize(config, cfg, "embed_tokens.weight", "lm_head.weight", "patch_embed.proj.weight")
    assert config.llm_config.tie_word_embeddings is True


@pytest.mark.parametrize("missing", ["embed_tokens.weight", "patch_embed.proj.weight"])
def test_finalize_refuses_weights_without_the_deciding_tensors(missing: str) -> None:
    names = {"embed_tokens.weight", "patch_embed.proj.weight", "patch_other"} - {missing}
    with pytest.raises(ConfigError, match=missing):
        finalize(read(V4), V4, *names)


def test_vision_config_alone() -> None:
    cfg = HuggingFaceConfig({**VISION, "model_type": "qwen2_5_vl_vision"})
    assert VisionConfig.initialize_from_config(pipeline(V5), cfg) == read(V5).vision_config
