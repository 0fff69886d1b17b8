"""Qwen3Config: Llama3Config with query and key norms, dense only."""

import pytest

from mlx_vlm_pipes.architectures.llama3 import Llama3Config
from mlx_vlm_pipes.architectures.qwen3 import Qwen3Config
from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.errors import UnsupportedModel
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import ReturnLogits

TEXT = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
}  # fmt: skip


def initialize(**changes: object) -> Qwen3Config:
    pipeline = PipelineConfig(model=ModelConfig(quantization_encoding="float32"))
    return Qwen3Config.initialize_from_config(pipeline, HuggingFaceConfig({**TEXT, **changes}))


def test_dense() -> None:
    config = initialize()
    assert isinstance(config, Llama3Config)
    assert (config.kv_params.head_dim, config.rope_theta) == (128, 5e6)  # qwen3's class default
    assert (config.num_experts, config.num_experts_per_tok, config.mlp_only_layers) == (0, 1, [])
    config.finalize(HuggingFaceConfig(TEXT), {}, ReturnLogits.ALL)
    assert config.decoder_config().qk_norm
    assert not config.attention_bias


def test_experts_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="num_experts 64"):
        initialize(num_experts=64)
