"""Qwen3Config: the dense decoder with RMS norm on each head's queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config
from mlx_vlm_pipes.errors import UnsupportedModel
from mlx_vlm_pipes.hf_config import AutoConfig, lookup

if TYPE_CHECKING:
    pass


@dataclass(kw_only=True)
class Qwen3Config(Llama3Config):
    """Llama3Config with query and key norms. The expert fields describe Qwen3-MoE, not run here."""

    has_qk_norm = True  # missing norms are an error
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    mlp_only_layers: list[int] = field(default_factory=list)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    ep_config: Any = None

    @classmethod
    def check(cls, huggingface_config: AutoConfig) -> None:
        """Raises: UnsupportedModel for mixture-of-experts layers."""
        experts = lookup(huggingface_config, "num_experts", default=0)
        if experts:
            raise UnsupportedModel(
                f"qwen3 with num_experts {experts}; only dense Qwen3 models are supported"
            )
