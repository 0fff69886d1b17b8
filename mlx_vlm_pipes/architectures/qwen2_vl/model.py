"""Qwen2VLModel: the pipeline model over the vision tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.architectures.mrope import MRopeInputs, MRopeModel
from mlx_vlm_pipes.architectures.qwen2_vl.context import Qwen2VLTextAndVisionContext, VisionData
from mlx_vlm_pipes.architectures.qwen2_vl.model_config import Qwen2VLConfig
from mlx_vlm_pipes.architectures.qwen2_vl.vision_model import VisionModel
from mlx_vlm_pipes.architectures.qwen2_vl.weight_adapters import LAYOUTS
from mlx_vlm_pipes.checkpoint.blueprint import Blueprint, Checkpoint
from mlx_vlm_pipes.contexts import ImageMetadata
from mlx_vlm_pipes.interfaces import Buffer
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.processing.grids import GridImage
from mlx_vlm_pipes.steps import require_kind


@dataclass
class Qwen2VLInputs(MRopeInputs):
    """One step's inputs: those of MRopeInputs, and tables for the tower.

    The vision fields are None in a step without pixels: vision_position_ids int64 [P, 2],
    cu_seqlens uint32 boundaries in patches. image_embeddings [M, E] takes the place of all of them
    where the pictures are encoded already.
    """

    vision_fields = ("pixel_values", "vision_position_ids", "cu_seqlens")
    vision_position_ids: list[Buffer] | None = None
    cu_seqlens: list[Buffer] | None = None


class Qwen2VLModel(MRopeModel[Qwen2VLInputs]):
    """Qwen2-VL."""

    model_config: Qwen2VLConfig
    config_class = Qwen2VLConfig
    inputs_class = Qwen2VLInputs
    context_class = Qwen2VLTextAndVisionContext
    layouts = LAYOUTS

    @classmethod
    def blueprint(cls, config: Qwen2VLConfig, checkpoint: Checkpoint) -> Blueprint:
        config.finalize_from(checkpoint)
        return Blueprint(VisionModel(config.vision_config), config.llm_config.decoder_config())

    def pack(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Pixels and tables of these pictures and clips and no others."""
        own = tuple(require_kind(image, GridImage) for image in images)
        data = VisionData(own, self.model_config.spatial_merge_size)
        tables = (data.vision_position_ids, data.cu_seqlens)
        return [pixel_array(data.concatenated_pixel_values), *(mx.array(table) for table in tables)]
