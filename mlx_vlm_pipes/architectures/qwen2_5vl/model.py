"""Qwen2_5VLModel (docs/api.md): the pipeline model over the vision tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_vlm_pipes.architectures.mrope import MRopeInputs, MRopeModel
from mlx_vlm_pipes.architectures.qwen2_5vl.context import (
    Qwen2_5VLImage,
    Qwen2_5VLTextAndVisionContext,
    VisionData,
)
from mlx_vlm_pipes.architectures.qwen2_5vl.model_config import Qwen2_5VLConfig
from mlx_vlm_pipes.architectures.qwen2_5vl.sizes import VisionSizes
from mlx_vlm_pipes.architectures.qwen2_5vl.vision_model import VisionModel
from mlx_vlm_pipes.architectures.qwen2_5vl.weight_adapters import LAYOUTS
from mlx_vlm_pipes.checkpoint.blueprint import Blueprint, Checkpoint
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.contexts import ImageMetadata
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.interfaces import Buffer, InferenceSession, Model
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.steps import require_kind

ACTIVATION_BYTES = 5 * 2**30  # MAX's estimate


@dataclass
class Qwen2_5VLInputs(MRopeInputs):
    """One step's inputs: those of MRopeInputs, and tables for the tower.

    The vision fields (docs/api.md#pictures) are None in a step without pixels: window_index int64
    [P/u], vision_position_ids int64 [P, 2], cu_* uint32 boundaries in patches, max_seqlen and
    max_window_seqlen uint32 [1], max_grid_size an int32 scalar. image_embeddings [M, E] takes the
    place of all of them where the pictures are encoded already.
    """

    vision_fields = (
        "pixel_values", "vision_position_ids", "window_index", "cu_seqlens", "cu_window_seqlens",
        "max_seqlen", "max_window_seqlen", "max_grid_size",
    )  # fmt: skip
    window_index: list[Buffer] | None = None
    vision_position_ids: list[Buffer] | None = None
    max_grid_size: list[Buffer] | None = None
    cu_seqlens: list[Buffer] | None = None
    cu_window_seqlens: list[Buffer] | None = None
    max_seqlen: list[Buffer] | None = None
    max_window_seqlen: list[Buffer] | None = None


class Qwen2_5VLModel(MRopeModel[Qwen2_5VLInputs]):
    """Qwen2.5-VL."""

    model_config: Qwen2_5VLConfig = cast("Qwen2_5VLConfig", None)  # as documented, before loading
    config_class = Qwen2_5VLConfig
    inputs_class = Qwen2_5VLInputs
    context_class = Qwen2_5VLTextAndVisionContext
    layouts = LAYOUTS

    @staticmethod
    def calculate_max_seq_len(  # pyright: ignore[reportIncompatibleMethodOverride]  # documented as static
        pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """Raises: ConfigError if max_length exceeds the model's limit."""
        return Qwen2_5VLConfig.calculate_max_seq_len(pipeline_config, huggingface_config)

    @classmethod
    def estimate_activation_memory(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """Bytes by MAX's rule of thumb: one number for all sizes (docs/api.md)."""
        del pipeline_config, huggingface_config
        return ACTIVATION_BYTES

    @classmethod
    def blueprint(cls, config: Qwen2_5VLConfig, checkpoint: Checkpoint) -> Blueprint:
        config.finalize_from(checkpoint)
        tower = VisionModel(config.vision_config)
        return Blueprint(tower, config.llm_config.decoder_config())

    def load_model(self, session: InferenceSession) -> tuple[Model, Model]:
        """(vision model, language model), with their weights in.

        Raises: ConfigError for files that are not safetensors; WeightsError for tensors that are
        missing, unknown or of another shape.
        """
        self.require_safetensors(ConfigError)
        return super().load_model(session)

    def pack(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Pixels and tables of these pictures and clips and no others."""
        vision = self.model_config.vision_config
        sizes = VisionSizes(vision.spatial_merge_size, vision.patch_size, vision.window_size)
        own = tuple(require_kind(image, Qwen2_5VLImage) for image in images)
        data = VisionData(own, sizes)
        tables = (
            data.vision_position_ids,
            data.window_index,
            data.cu_seqlens,
            data.cu_window_seqlens_unique,
            data.max_seqlen,
            data.window_max_seqlen,
            data.max_grid_size,
        )
        return [pixel_array(data.concatenated_pixel_values), *(mx.array(table) for table in tables)]
