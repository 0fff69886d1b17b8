"""Qwen2_5VLConfig and VisionConfig: what Qwen2.5-VL reads from config.json and the weights.

A released (transformers 4) config.json keeps its text keys at the top; transformers 5 nests them
in `text_config`. Source: transformers configuration_qwen2_5_vl.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlx_vlm_pipes.architectures.grid_config import GridTowerConfig
from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config
from mlx_vlm_pipes.architectures.part_fields import PartField, WithPartFields
from mlx_vlm_pipes.architectures.qwen2_5vl.facts import FACTS
from mlx_vlm_pipes.architectures.qwen2_5vl.sizes import VisionSizes
from mlx_vlm_pipes.architectures.vision_language_config import TwoPartConfig
from mlx_vlm_pipes.checkpoint.state import expanded_scales, stored_dtype
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import (
    AutoConfig,
    activation_name,
    head_dim,
    lookup,
    require_vision_config,
    rope_dictionary,
    text_config,
)
from mlx_vlm_pipes.interfaces import ReturnLogits
from mlx_vlm_pipes.quantization import QuantConfig
from mlx_vlm_pipes.weights import WeightData

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, VISION_START_TOKEN_ID = 151655, 151656, 151652
MROPE_SECTION = [16, 24, 24]
FULL_ATTENTION_BLOCKS = [7, 15, 23, 31]
RMS_NORM_EPS = 1e-6  # written into the reference's code, in no config.json


@dataclass
class VisionConfig(GridTowerConfig):
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

    def _check(self) -> None:
        self.check_heads()
        if self.window_size < self.spatial_merge_size * self.patch_size:
            raise ConfigError(
                f"vision window_size {self.window_size} is smaller than a merged patch of "
                f"{self.spatial_merge_size * self.patch_size} pixels"
            )


@dataclass(kw_only=True)
class Qwen2_5VLConfig(WithPartFields, TwoPartConfig):
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
        cfg, vision_cfg = huggingface_config, require_vision_config(huggingface_config)
        text_cfg = text_config(cfg)
        vision = VisionConfig.initialize_from_config(pipeline_config, vision_cfg)
        llm = Llama3Config.initialize_from_config(
            pipeline_config, text_cfg, rope_keys=("mrope_section",)
        )
        vision.check_width(llm.hidden_size)
        return cls(
            devices=pipeline_config.model.devices,
            image_token_id=lookup(cfg, "image_token_id", default=IMAGE_TOKEN_ID),
            video_token_id=lookup(cfg, "video_token_id", default=VIDEO_TOKEN_ID),
            vision_start_token_id=lookup(
                cfg, "vision_start_token_id", default=VISION_START_TOKEN_ID
            ),
            tokens_per_second=VisionSizes.read(vision_cfg).tokens_per_second,
            spatial_merge_size=vision.spatial_merge_size,
            mrope_section=_mrope_section(text_cfg),
            vision_config=vision,
            llm_config=llm,
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
