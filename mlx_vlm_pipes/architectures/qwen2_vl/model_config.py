"""Qwen2VLConfig and VisionConfig: what Qwen2-VL reads from config.json and the weights.

Source: transformers configuration_qwen2_vl.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config
from mlx_vlm_pipes.architectures.mrope_config import MRopeConfig, MRopeTowerConfig
from mlx_vlm_pipes.architectures.part_fields import PartField
from mlx_vlm_pipes.architectures.qwen2_vl.facts import FACTS
from mlx_vlm_pipes.architectures.qwen2_vl.sizes import VisionSizes
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import (
    AutoConfig,
    activation_name,
    lookup,
    require_int,
    require_vision_config,
)
from mlx_vlm_pipes.quantization import QuantConfig

if TYPE_CHECKING:
    from typing_extensions import Self

MLP_RATIO = 4


@dataclass
class VisionConfig(MRopeTowerConfig):
    """What the vision tower reads. patch_size in pixels.

    config.json calls the tower's width `embed_dim` and that of its rows `hidden_size`; here they
    are hidden_size and out_hidden_size, as in the other rooms.
    """

    width_key = "embed_dim"
    rows_key = "hidden_size"
    dtype: DType
    llm_dtype: DType
    devices: list[DeviceRef]
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    hidden_size: int
    num_attention_heads: int
    depth: int
    intermediate_size: int
    out_hidden_size: int
    spatial_merge_size: int
    quant_config: QuantConfig | None = None
    hidden_act: str = "quick_gelu"
    rope_theta: float = 10000.0

    @classmethod
    def inner_width(cls, vision_config: AutoConfig) -> int:
        """`embed_dim` times `mlp_ratio`. Raises: ConfigError for less than 1."""
        ratio = lookup(vision_config, "mlp_ratio", default=MLP_RATIO)
        width = int(require_int(vision_config, cls.width_key) * ratio)
        if width < 1:
            raise ConfigError(f"vision mlp_ratio {ratio}; expected a width of at least 1")
        return width

    @classmethod
    def initialize_from_config(
        cls, pipeline_config: PipelineConfig, hf_vision_config: AutoConfig
    ) -> Self:
        """From `vision_config`.

        Raises: ConfigError for missing keys, heads that do not divide the width, or an activation
        or rope type that we do not have.
        """
        cfg, sizes = hf_vision_config, VisionSizes.read(hf_vision_config)
        config = cls(
            **cls.shared_fields(cfg),
            devices=pipeline_config.model.devices,
            patch_size=sizes.patch_size,
            temporal_patch_size=sizes.temporal_patch_size,
            spatial_merge_size=sizes.spatial_merge_size,
            hidden_act=activation_name(cfg, "hidden_act", default="quick_gelu"),
        )
        config.check_heads()
        return config


@dataclass(kw_only=True)
class Qwen2VLConfig(MRopeConfig[VisionConfig]):
    """Both halves of the model."""

    facts = FACTS
    devices: list[DeviceRef]
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    spatial_merge_size: PartField[int] = PartField(  # noqa: RUF009  # a descriptor
        "vision_config", "spatial_merge_size"
    )
    mrope_section: PartField[list[int]] = PartField(  # noqa: RUF009
        "llm_config", "mrope_section", list, tuple
    )
    vision_config: VisionConfig
    llm_config: Llama3Config

    @classmethod
    def initialize_from_config(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> Self:
        """From either spelling. Raises: as the base says."""
        vision_cfg = require_vision_config(huggingface_config)
        vision = VisionConfig.initialize_from_config(pipeline_config, vision_cfg)
        return cls(**cls.shared_fields(pipeline_config, huggingface_config, vision))
