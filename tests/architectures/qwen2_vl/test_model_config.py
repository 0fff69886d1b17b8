"""config.json of Qwen2-VL as released and as transformers 5 writes it, and what weights add."""

import dataclasses
from typing import Any

import mlx.core as mx
import pytest

from mlx_vlm_pipes.architectures.qwen2_vl.model_config import Qwen2VLConfig
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import ReturnLogits
from mlx_vlm_pipes.registry import find_room
from mlx_vlm_pipes.weights import WeightData
from tests.architectures.driving import changed, pipeline_config

# Qwen/Qwen2-VL-2B-Instruct, without the keys that nobody reads
RELEASED: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
    "vision_start_token_id": 151652, "image_token_id": 151655, "video_token_id": 151656,
    "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960,
    "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
        "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}  # fmt: skip
OUTER = ("architectures", "model_type", "vision_start_token_id", "image_token_id",
         "video_token_id", "tie_word_embeddings", "vision_config")  # fmt: skip
V5: dict[str, Any] = {
    **{key: RELEASED[key] for key in OUTER},
    "text_config": {
        **{k: v for k, v in RELEASED.items() if k not in (*OUTER, "rope_theta", "rope_scaling")},
        "model_type": "qwen2_vl_text",
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        **RELEASED["vision_config"], "model_type": "qwen2_vl_vision", "hidden_act": "quick_gelu",
        "in_channels": 3, "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    },
}  # fmt: skip


def read(config: dict[str, Any]) -> Qwen2VLConfig:
    return Qwen2VLConfig.initialize(pipeline_config(config))


def test_both_spellings_read_alike() -> None:
    assert find_room(HuggingFaceConfig(RELEASED)).name == "qwen2_vl"
    old, new = read(RELEASED), read(V5)
    assert old == new
    vision = old.vision_config
    assert (vision.hidden_size, vision.intermediate_size, vision.out_hidden_size) == (
        1280, 5120, 1536,
    )  # fmt: skip
    assert (vision.head_dim, vision.depth, vision.hidden_act) == (80, 32, "quick_gelu")
    assert vision.patch_elements == 3 * 2 * 14 * 14
    assert old.mrope_section == [16, 24, 24]
    assert old.llm_config.sliding_window is None
    assert old.get_max_seq_len() == 32768


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("", {"vision_config": None}, "lacks 'vision_config'"),
        ("", {"hidden_size": 3072}, "vision hidden_size 1536, expected the text hidden_size 3072"),
        ("", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "three numbers"),
        ("vision_config", {"num_heads": 3}, "embed_dim 1280 with 3 heads"),
        ("vision_config", {"hidden_act": "swiglu"}, "swiglu"),
        ("vision_config", {"mlp_ratio": 0}, "'mlp_ratio' is 0"),
        ("vision_config", {"mlp_ratio": 1e-9}, "mlp_ratio 1e-09; expected a width"),
        ("vision_config", {"mlp_ratio": "4"}, "'mlp_ratio' is '4'"),
        ("vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ],
)
def test_refusals(part: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(changed(RELEASED, part, **change))


def weight(name: str, dtype: DType) -> WeightData:
    return dataclasses.replace(WeightData.from_array(mx.zeros((1,)), name), dtype=dtype)


def test_finalize_takes_dtypes_and_the_head_from_the_weights() -> None:
    config, pipeline = read(RELEASED), pipeline_config(RELEASED)
    outer = pipeline.model.require_huggingface_config()
    text = {"embed_tokens.weight": weight("embed_tokens.weight", DType.float16)}
    name = "patch_embed.proj.weight"
    config.finalize(outer, pipeline, text, {name: weight(name, DType.float32)}, ReturnLogits.ALL)
    assert config.vision_config.dtype is DType.float32
    assert config.vision_config.llm_dtype is DType.float16
    llm = config.llm_config
    assert (llm.attention_bias, llm.tie_word_embeddings) == (True, True)
    assert llm.return_logits is ReturnLogits.ALL
    with pytest.raises(ConfigError, match=r"patch_embed.proj"):
        config.finalize(outer, pipeline, text, {}, ReturnLogits.ALL)
