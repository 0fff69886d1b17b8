"""PixtralModel (docs/api.md): the pipeline model over the Pixtral tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.base import VisionLanguageModel
from mlx_vlm_pipes.architectures.pixtral.model_config import PixtralConfig
from mlx_vlm_pipes.architectures.pixtral.vision_model import (
    PixtralVision,
    image_grids,
    position_ids,
    to_patches,
)
from mlx_vlm_pipes.architectures.pixtral.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.checkpoint.blueprint import Blueprint, Checkpoint
from mlx_vlm_pipes.contexts import ImageMetadata
from mlx_vlm_pipes.interfaces import (
    Buffer,
    LayerWork,
    VisionInputs,
)
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.weights.layout import Transform


@dataclass
class PixtralInputs(VisionInputs[Buffer]):
    """One step's inputs.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; return_n_logits int64 [1]; pixel_patches
    float [P, 3 * p * p], the patches of all images of all rows, each (channel, y, x).

    vision_attention_mask int32 [N, 2], rows and columns of patches of each image: a patch sees
    the rows * columns patches of its own image, no dense mask is made. vision_position_ids int32
    [P]: row * (image_size / p) + column (an image with more columns than that: row * its columns
    + column). image_token_indices int32 [M], where each vision row goes among the tokens
    (negative: nowhere); image_embeddings [M, E]: vision rows that are encoded already, in place
    of the four fields before.
    """

    vision_fields = ("pixel_patches", "vision_attention_mask", "vision_position_ids")
    tokens: Buffer
    input_row_offsets: Buffer
    return_n_logits: Buffer
    pixel_patches: Buffer | None = None
    vision_attention_mask: Buffer | None = None
    vision_position_ids: Buffer | None = None
    image_token_indices: Buffer | None = None
    image_embeddings: Buffer | None = field(default=None, kw_only=True)


class PixtralModel(VisionLanguageModel[PixtralInputs]):
    """LLaVA checkpoints with a Pixtral tower."""

    model_config: PixtralConfig
    config_class = PixtralConfig
    inputs_class = PixtralInputs
    layouts = LAYOUTS

    @classmethod
    def transforms(cls, config: PixtralConfig) -> tuple[Transform, ...]:
        return transforms(config)

    @classmethod
    def blueprint(cls, config: PixtralConfig, checkpoint: Checkpoint) -> Blueprint:
        config.return_logits = checkpoint.return_logits  # its tensors decide nothing
        return Blueprint(PixtralVision(config), config.decoder_config())

    @property
    def placeholder(self) -> int:
        return self.model_config.image_token_index

    def pack(self, images: Sequence[ImageMetadata]) -> tuple[Buffer, Buffer, Buffer]:
        """pixel_patches, vision_attention_mask and vision_position_ids of these images."""
        p, config = self.model_config.patch_size, self.model_config
        patches = np.concatenate([to_patches(image.pixel_values, p) for image in images])
        grids = image_grids([image.pixel_values.shape for image in images], p)
        ids = position_ids(grids, config.image_size // p)
        return pixel_array(patches), mx.array(grids), mx.array(ids)

    def count_rows(self, image: ImageMetadata) -> int:
        """Vision rows that an image gives: one for each whole patch."""
        return int(image_grids([image.pixel_values.shape], self.model_config.patch_size).prod())

    def vision_work(self, image: ImageMetadata) -> LayerWork:
        config, patches = self.model_config, self.count_rows(image)
        scores = config.vision_num_attention_heads * patches**2
        width = config.vision_hidden_size
        heads = config.vision_num_attention_heads * config.vision_head_dim
        inner, head_dim = config.vision_intermediate_size, config.vision_head_dim
        return LayerWork(patches, width, heads, inner, scores, head_dim)
