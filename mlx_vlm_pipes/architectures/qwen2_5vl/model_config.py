"""Qwen2_5VLConfig and VisionConfig: what Qwen2.5-VL reads from config.json and the weights.

Source: transformers configuration_qwen2_5_vl.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config
from mlx_vlm_pipes.architectures.mrope_config import MRopeConfig, MRopeTowerConfig
from mlx_vlm_pipes.architectures.part_fields import PartField
from mlx_vlm_pipes.architectures.qwen2_5vl.facts import FACTS
from mlx_vlm_pipes.architectures.qwen2_5vl.sizes import VisionSizes
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import AutoConfig, activation_name, lookup, require_vision_config
from mlx_vlm_pipes.quantization import QuantConfig

if TYPE_CHECKING:
    from typing_extensions import Self

FULL_ATTENTION_BLOCKS = [7, 15, 23, 31]
RMS_NORM_EPS = 1e-6  # written into the reference's code, in no config.json


@dataclass
class VisionConfig(MRopeTowerConfig):
    """What the vision tower reads. patch_size and window_size in pixels.

    The fields below `quant_config` are ours; the documented ones stand above.
    """

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
    fullatt_block_indexes: list[int]
    rms_norm_eps: float
    window_size: int
    spatial_merge_size: int
    quant_config: QuantConfig | None = None
    hidden_act: str = "silu"
    rope_theta: float = 10000.0

    @classmethod
    def initialize_from_config(
        cls, pipeline_config: PipelineConfig, hf_vision_config: AutoConfig
    ) -> Self:
        """From `vision_config`.

        Raises: ConfigError for missing keys, heads that do not divide the width, a window smaller
        than a merged patch, or an activation or rope type that we do not have.
        """
        cfg, sizes = hf_vision_config, VisionSizes.read(hf_vision_config)
        blocks = lookup(cfg, "fullatt_block_indexes", default=FULL_ATTENTION_BLOCKS)
        config = cls(
            **cls.shared_fields(cfg),
            devices=pipeline_config.model.devices,
            patch_size=sizes.patch_size,
            temporal_patch_size=sizes.temporal_patch_size,
            fullatt_block_indexes=[int(block) for block in blocks],
            rms_norm_eps=RMS_NORM_EPS,
            window_size=sizes.window_size,
            spatial_merge_size=sizes.spatial_merge_size,
            hidden_act=activation_name(cfg, "hidden_act", default="silu"),
        )
        config._check()
        return config

    def _check(self) -> None:
        self.check_heads()
        if self.window_size < self.spatial_merge_size * self.patch_size:
            raise ConfigError(
                f"vision window_size {self.window_size} is smaller than a merged patch of "
                f"{self.spatial_merge_size * self.patch_size} pixels"
            )


@dataclass(kw_only=True)
class Qwen2_5VLConfig(MRopeConfig[VisionConfig]):
    """Both halves of the model. tokens_per_second: time positions a second of a clip takes."""

    facts = FACTS
    devices: list[DeviceRef]
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    spatial_merge_size: PartField[int] = PartField(  # noqa: RUF009  # a descriptor
        "vision_config", "spatial_merge_size"
    )
    tokens_per_second: int
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
        fields = cls.shared_fields(pipeline_config, huggingface_config, vision)
        return cls(**fields, tokens_per_second=VisionSizes.read(vision_cfg).tokens_per_second)
