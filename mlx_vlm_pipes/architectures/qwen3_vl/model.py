"""Qwen3VLModel: the pipeline model over the vision tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.architectures.mrope import MRopeInputs, MRopeModel
from mlx_vlm_pipes.architectures.qwen3_vl.context import Qwen3VLTextAndVisionContext, VisionData
from mlx_vlm_pipes.architectures.qwen3_vl.model_config import Qwen3VLConfig
from mlx_vlm_pipes.architectures.qwen3_vl.sizes import VisionSizes
from mlx_vlm_pipes.architectures.qwen3_vl.vision_model import VisionModel
from mlx_vlm_pipes.architectures.qwen3_vl.weight_adapters import LAYOUTS
from mlx_vlm_pipes.checkpoint.blueprint import Blueprint, Checkpoint
from mlx_vlm_pipes.contexts import ImageMetadata
from mlx_vlm_pipes.hf_config import require_vision_config
from mlx_vlm_pipes.interfaces import Buffer
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.processing.grids import GridImage
from mlx_vlm_pipes.steps import require_kind


@dataclass
class Qwen3VLInputs(MRopeInputs):
    """One step's inputs: those of MRopeInputs, and tables for the tower.

    The vision fields are None in a step without pixels: vision_position_ids int64 [P, 2],
    interpolation_indices int32 [P, 4], interpolation_weights float32 [P, 4], cu_seqlens uint32
    boundaries in patches. image_embeddings [M, (1 + K) * E] takes the place of all of them where
    the pictures are encoded already: rows, and what each of the first K layers adds.
    """

    vision_fields = (
        "pixel_values", "vision_position_ids", "interpolation_indices", "interpolation_weights",
        "cu_seqlens",
    )  # fmt: skip
    vision_position_ids: list[Buffer] | None = None
    interpolation_indices: list[Buffer] | None = None
    interpolation_weights: list[Buffer] | None = None
    cu_seqlens: list[Buffer] | None = None


class Qwen3VLModel(MRopeModel[Qwen3VLInputs]):
    """Qwen3-VL, dense."""

    model_config: Qwen3VLConfig
    config_class = Qwen3VLConfig
    inputs_class = Qwen3VLInputs
    context_class = Qwen3VLTextAndVisionContext
    layouts = LAYOUTS

    @classmethod
    def blueprint(cls, config: Qwen3VLConfig, checkpoint: Checkpoint) -> Blueprint:
        config.finalize(checkpoint)
        return Blueprint(VisionModel(config.vision_config), config.decoder_config())

    def pack(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Pixels and tables of these pictures and frames and no others."""
        own = tuple(require_kind(image, GridImage) for image in images)
        outer = require_vision_config(self.huggingface_config)
        data = VisionData(own, VisionSizes.read(outer))
        tables = (data.vision_position_ids, *data.interpolation, data.cu_seqlens)
        return [pixel_array(data.concatenated_pixel_values), *(mx.array(table) for table in tables)]
