"""What the configurations of Qwen2-VL and Qwen2.5-VL do alike.

A released (transformers 4) config.json keeps its text keys at the top; transformers 5 nests them
in `text_config`. Source: transformers configuration_qwen2_vl.py and configuration_qwen2_5_vl.py.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from mlx_vlm_pipes.architectures.grid_config import GridTowerConfig
from mlx_vlm_pipes.architectures.grid_facts import TOKEN_IDS
from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config
from mlx_vlm_pipes.architectures.part_fields import WithPartFields
from mlx_vlm_pipes.architectures.vision_language_config import TwoPartConfig
from mlx_vlm_pipes.checkpoint.blueprint import Checkpoint
from mlx_vlm_pipes.checkpoint.state import VISION, expanded_scales, stored_dtype
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import (
    AutoConfig,
    head_dim,
    lookup,
    require_vision_config,
    rope_dictionary,
    text_config,
)
from mlx_vlm_pipes.interfaces import ReturnLogits
from mlx_vlm_pipes.quantization import QuantConfig
from mlx_vlm_pipes.weights import WeightData

MROPE_SECTION = [16, 24, 24]


class MRopeTowerConfig(GridTowerConfig):
    """Each dataclass has these fields in its own documented order."""

    dtype: DType
    llm_dtype: DType
    quant_config: QuantConfig | None

    def finalize(
        self,
        huggingface_config: AutoConfig,
        vision_state_dict: dict[str, WeightData],
        vision_dtype: DType,
        llm_dtype: DType,
    ) -> None:
        """Take the two dtypes, and a record of scaled (FP8, FP4) weights of the vision tower."""
        self.dtype, self.llm_dtype = vision_dtype, llm_dtype
        self.quant_config = expanded_scales(huggingface_config, vision_state_dict)


TowerT = TypeVar("TowerT", bound=MRopeTowerConfig)


class MRopeConfig(WithPartFields, TwoPartConfig, Generic[TowerT]):
    """Both halves of the model. Each dataclass has its fields in its own documented order."""

    vision_config: TowerT

    @staticmethod
    def shared_fields(
        pipeline_config: PipelineConfig, huggingface_config: AutoConfig, vision: MRopeTowerConfig
    ) -> dict[str, Any]:
        """The values of fields that both rooms have, from either spelling; vision: the tower.

        Raises: ConfigError for missing or contradicting keys, and values that we do not run.
        """
        cfg, text_cfg = huggingface_config, text_config(huggingface_config)
        llm = Llama3Config.initialize_from_config(
            pipeline_config, text_cfg, rope_keys=("mrope_section",)
        )
        vision.check_width(llm.hidden_size)
        return {
            "devices": pipeline_config.model.devices,
            **{name: lookup(cfg, name, default=token) for name, token in TOKEN_IDS.items()},
            "spatial_merge_size": vision.spatial_merge_size,
            "mrope_section": _mrope_section(text_cfg),
            "vision_config": vision,
            "llm_config": llm,
        }

    def finalize_from(self, checkpoint: Checkpoint) -> None:
        """As `finalize`."""
        self.finalize(
            checkpoint.outer,
            checkpoint.pipeline_config,
            checkpoint.text,
            checkpoint.tower(VISION),
            checkpoint.return_logits,
        )

    def finalize(
        self,
        huggingface_config: AutoConfig,
        pipeline_config: PipelineConfig,
        llm_state_dict: dict[str, WeightData],
        vision_state_dict: dict[str, WeightData],
        return_logits: ReturnLogits,
        norm_method: Literal["rms_norm"] | Literal["layer_norm"] = "rms_norm",
    ) -> None:
        """Read what only the weights can say: dtypes, biases, the tied head.

        Raises: ConfigError without a vision_config, without one of the two tensors whose dtype
        decides, or for a quantisation that we do not know.
        """
        del pipeline_config  # the encoding that it names has been applied to the state dicts
        require_vision_config(huggingface_config)
        self.vision_config.finalize(
            huggingface_config,
            vision_state_dict,
            stored_dtype(vision_state_dict, "patch_embed.proj"),
            stored_dtype(llm_state_dict, "embed_tokens"),
        )
        self.llm_config.finalize(
            text_config(huggingface_config),
            llm_state_dict,
            return_logits,
            norm_method=norm_method,
            attention_bias=True,
        )
        self.finalize_outer(huggingface_config, llm_state_dict)


def _mrope_section(text_cfg: AutoConfig) -> list[int]:
    """Rotary pairs of the time, height and width axis."""
    given = rope_dictionary(text_cfg).get("mrope_section")
    section = [int(n) for n in (MROPE_SECTION if given is None else given)]
    half = head_dim(text_cfg) // 2
    if len(section) != 3 or sum(section) != half:
        raise ConfigError(
            f"mrope_section {section}; expected three numbers that sum to half of head_dim, {half}"
        )
    return section
