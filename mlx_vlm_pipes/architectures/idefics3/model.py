"""Idefics3Model (docs/api.md): the pipeline model over the SigLIP tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_vlm_pipes.architectures.base import VisionLanguageModel
from mlx_vlm_pipes.architectures.idefics3.model_config import Idefics3Config
from mlx_vlm_pipes.architectures.idefics3.vision_model import Idefics3Vision
from mlx_vlm_pipes.architectures.idefics3.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.architectures.llama3.model_config import bounded_max_seq_len
from mlx_vlm_pipes.checkpoint.blueprint import Blueprint, Checkpoint
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.contexts import ImageMetadata
from mlx_vlm_pipes.errors import MediaError
from mlx_vlm_pipes.hf_config import AutoConfig, position_limit, text_config
from mlx_vlm_pipes.interfaces import (
    Buffer,
    InferenceSession,
    LayerWork,
    Model,
    VisionInputs,
)
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.weights.layout import Transform

MAX_POSITIONS = 4096  # where a text configuration names no max_position_embeddings


@dataclass
class Idefics3Inputs(VisionInputs[Buffer]):
    """One step's inputs.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; return_n_logits int64 [1]; pixel_values
    float [N, 3, S, S], the frames of all rows; image_token_indices int32 [M], where each vision
    row goes among the tokens (negative: nowhere); image_embeddings [M, E]: vision rows that are
    encoded already, in place of pixel_values.
    """

    vision_fields = ("pixel_values",)
    tokens: Buffer
    input_row_offsets: Buffer
    return_n_logits: Buffer
    pixel_values: Buffer | None = None
    image_token_indices: Buffer | None = None
    image_embeddings: Buffer | None = field(default=None, kw_only=True)


class Idefics3Model(VisionLanguageModel[Idefics3Inputs]):
    """Idefics3 and SmolVLM."""

    model_config: Idefics3Config
    config_class = Idefics3Config
    inputs_class = Idefics3Inputs
    layouts = LAYOUTS

    @staticmethod
    def calculate_max_seq_len(  # pyright: ignore[reportIncompatibleMethodOverride]  # documented as static
        pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """Raises: ConfigError if max_length exceeds the decoder's limit."""
        text = text_config(huggingface_config)
        limit = position_limit(text, MAX_POSITIONS)
        return bounded_max_seq_len("idefics3", limit, pipeline_config.model.max_length)

    @classmethod
    def transforms(cls, config: Idefics3Config) -> tuple[Transform, ...]:
        return transforms(config.vision_config)

    @classmethod
    def blueprint(cls, config: Idefics3Config, checkpoint: Checkpoint) -> Blueprint:
        config.finalize(checkpoint.outer, checkpoint.text, *checkpoint.modes)
        tower = Idefics3Vision(config.vision_config)
        return Blueprint(tower, config.text_config.decoder_config())

    def load_model(self, session: InferenceSession | None = None) -> tuple[Model, Model]:
        """Vision and language model, with their weights in; the model's own session by default.

        Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
        """
        return super().load_model(session or self.session)

    @property
    def placeholder(self) -> int:
        return self.model_config.image_token_id

    def pack(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """[N, 3, S, S]: the frames of a checkpoint all have one size."""
        return [pixel_array(np.stack([image.pixel_values for image in images]))]

    def count_rows(self, image: ImageMetadata) -> int:
        """Vision rows that a frame gives. Raises: MediaError for a side that does not divide."""
        config = self.model_config.vision_config
        rows, columns = (size // config.patch_size for size in image.pixel_values.shape[1:])
        if rows % config.scale_factor or columns % config.scale_factor:
            raise MediaError(
                f"a frame of {rows} x {columns} patches does not divide by scale_factor "
                f"{config.scale_factor}; max_image_size in preprocessor_config.json does not fit"
            )
        return rows * columns // config.scale_factor**2

    def vision_work(self, image: ImageMetadata) -> LayerWork:
        vision = self.model_config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        scores = vision.num_attention_heads * patches**2
        width = vision.hidden_size
        return LayerWork(patches, width, width, vision.intermediate_size, scores, vision.head_dim)
