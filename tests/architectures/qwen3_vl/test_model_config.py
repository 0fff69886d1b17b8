"""config.json of Qwen3-VL in both spellings, and what the weights add."""

import dataclasses
from typing import Any

import mlx.core as mx
import pytest

from mlx_vlm_pipes.architectures.qwen3_vl.model_config import Qwen3VLConfig
from mlx_vlm_pipes.checkpoint.blueprint import Checkpoint
from mlx_vlm_pipes.checkpoint.state import LANGUAGE, StateDict
from mlx_vlm_pipes.checkpoint.state import VISION as TOWER
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError, UnsupportedModel
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.registry import find_room
from mlx_vlm_pipes.weights import WeightData
from tests.architectures.driving import changed, pipeline_config

TEXT = {
    "model_type": "qwen3_vl_text", "hidden_size": 48, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 99, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "attention_bias": False,
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 8,
    "in_channels": 3, "out_hidden_size": 48, "num_position_embeddings": 49,
    "deepstack_visual_indexes": [0, 2], "hidden_act": "gelu_pytorch_tanh",
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
IDS = {"model_type": "qwen3_vl", "image_token_id": 90, "video_token_id": 91}
V4 = {
    **IDS, "vision_config": {**VISION, "model_type": "qwen3_vl"},
    "text_config": {**TEXT, "rope_theta": 5e6, "rope_scaling": SECTIONS},
}  # fmt: skip
V5 = {
    **IDS, "text_config": {**TEXT, "rope_parameters": {**SECTIONS, "rope_theta": 5e6}},
    "vision_config": {
        **VISION, "model_type": "qwen3_vl_vision",
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    },
}  # fmt: skip


def read(config: dict[str, Any]) -> Qwen3VLConfig:
    return Qwen3VLConfig.initialize(pipeline_config(config))


def test_both_spellings_read_alike() -> None:
    old, new = read(V4), read(V5)
    assert old == new
    assert (old.image_token_id, old.video_token_id) == (90, 91)
    decoder = old.decoder_config()
    assert decoder.rope.mrope_section == (4, 2, 2)
    assert decoder.rope.mrope_interleaved
    assert (decoder.rope.theta, decoder.feature_layers, decoder.head_dim) == (5e6, 2, 16)
    vision = old.vision_config
    assert (vision.patch_size, vision.depth, vision.num_attention_heads) == (8, 3, 2)
    assert vision.deepstack_visual_indexes == [0, 2]
    assert vision.patch_elements == 3 * 2 * 8 * 8
    kv = new.get_kv_params()
    assert (kv.n_kv_heads, kv.head_dim, kv.num_layers) == (2, 16, 2)


def test_max_seq_len() -> None:
    pipeline, cfg = pipeline_config(V4, max_length=9), HuggingFaceConfig(V4)
    assert Qwen3VLConfig.calculate_max_seq_len(pipeline, cfg) == 9
    assert read(V4).get_max_seq_len() == 256
    with pytest.raises(ConfigError, match=r"257 .* 256"):
        Qwen3VLConfig.calculate_max_seq_len(pipeline_config(V4, max_length=257), cfg)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("", {"vision_config": None}, "lacks 'vision_config'"),
        ("text_config", {"rope_scaling": {**SECTIONS, "mrope_section": [4, 4]}}, "three numbers"),
        ("text_config", {"rope_scaling": {**SECTIONS, "mrope_interleaved": False}}, "take turns"),
        ("text_config", {"rope_scaling": {**SECTIONS, "rope_type": "yarn"}}, "yarn"),
        ("text_config", {"hidden_size": 96}, "out_hidden_size 48.* 96"),
        ("vision_config", {"hidden_act": "swiglu"}, "swiglu"),
        ("vision_config", {"num_heads": 3}, "hidden_size 32 with 3 heads"),
        ("vision_config", {"num_position_embeddings": 50}, "50; expected a square"),
        ("vision_config", {"deepstack_visual_indexes": [0, 3]}, "blocks from 0 to 2"),
        ("vision_config", {"deepstack_visual_indexes": [1, 1]}, "different blocks"),
        ("vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ],
)
def test_refusals(part: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(changed(V4, part, **change))


def test_a_section_that_is_not_half_the_head_is_refused() -> None:
    config = read(changed(V4, "text_config", rope_scaling={**SECTIONS, "mrope_section": [4, 2, 1]}))
    with pytest.raises(ConfigError, match="half of the head, 8"):
        config.decoder_config()


def test_mixtures_of_experts_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="qwen3_vl_moe"):
        find_room(HuggingFaceConfig({"model_type": "qwen3_vl_moe"}))
    with pytest.raises(UnsupportedModel, match="num_experts 8"):
        read(changed(V4, "text_config", num_experts=8))


def weight(name: str, dtype: DType) -> WeightData:
    return dataclasses.replace(WeightData.from_array(mx.zeros((1,)), name), dtype=dtype)


def finalized(cfg: dict[str, Any], *names: str) -> Qwen3VLConfig:
    config = read(cfg)
    text = {LANGUAGE + n: weight(n, DType.float16) for n in names if "patch" not in n}
    vision = {TOWER + n: weight(n, DType.float32) for n in names if "patch" in n}
    modes = ReturnLogits.ALL, ReturnHiddenStates.LAST
    checkpoint = Checkpoint(pipeline_config(cfg), StateDict({**text, **vision}), *modes)

    def once() -> Qwen3VLConfig:
        config.finalize(checkpoint)
        return dataclasses.replace(config)

    assert once() == once()
    return config


def test_finalize_takes_dtypes_and_the_head_from_the_weights() -> None:
    names = ("embed_tokens.weight", "lm_head.weight", "patch_embed.proj.weight")
    config = finalized(V4, *names)
    assert config.vision_config.dtype is DType.float32
    assert config.vision_config.llm_dtype is DType.float16
    llm = config.llm_config
    assert (llm.qk_norm, llm.attention_bias, llm.rms_norm_eps) == (True, False, 1e-5)
    assert (llm.return_logits, llm.tie_word_embeddings) == (ReturnLogits.ALL, False)
    assert llm.return_hidden_states is ReturnHiddenStates.LAST
    assert finalized({**V4, "tie_word_embeddings": True}, *names).llm_config.tie_word_embeddings
    with pytest.raises(ConfigError, match=r"patch_embed.proj.weight"):
        finalized(V4, *names[:2])
