"""Qwen3Config: the dense decoder with RMS norm on each head's queries and keys."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.architectures.llama3 import Llama3Config
from mlx_vlm_pipes.config import MAXModelConfig, PipelineConfig
from mlx_vlm_pipes.errors import UnsupportedModel
from mlx_vlm_pipes.hf_config import AutoConfig, lookup
from mlx_vlm_pipes.interfaces import ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.weights import WeightData

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlx_vlm_pipes.architectures.llama3.model_config import NormMethod


@dataclass(kw_only=True)
class Qwen3Config(Llama3Config):
    """Llama3Config with query and key norms. The expert fields describe Qwen3-MoE, not run here."""

    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    mlp_only_layers: list[int] = field(default_factory=list)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    ep_config: Any = None

    @classmethod
    def initialize_from_config(
        cls,
        pipeline_config: PipelineConfig,
        huggingface_config: AutoConfig,
        model_config: MAXModelConfig | None = None,
        *,
        rope_keys: Collection[str] = (),
    ) -> Self:
        """As Llama3Config's. Raises: UnsupportedModel for mixture-of-experts layers."""
        experts = lookup(huggingface_config, "num_experts", default=0)
        if experts:
            raise UnsupportedModel(
                f"qwen3 with num_experts {experts}; only dense Qwen3 models are supported"
            )
        return super().initialize_from_config(
            pipeline_config, huggingface_config, model_config, rope_keys=rope_keys
        )

    def finalize(
        self,
        huggingface_config: AutoConfig,
        state_dict: dict[str, WeightData],
        return_logits: ReturnLogits,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
        norm_method: NormMethod = "rms_norm",
        attention_bias: bool = False,  # noqa: FBT001, FBT002  # the base has it so
    ) -> None:
        """As Llama3Config's; the norms belong to the architecture, so missing ones are an error."""
        super().finalize(
            huggingface_config,
            state_dict,
            return_logits,
            return_hidden_states,
            norm_method,
            attention_bias,
        )
        self.qk_norm = True
