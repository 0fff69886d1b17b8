"""InternVLModel (docs/api.md): the pipeline model over the vision tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_vlm_pipes.architectures.base import VisionLanguageModel
from mlx_vlm_pipes.architectures.internvl.model_config import InternVLConfig
from mlx_vlm_pipes.architectures.internvl.sizes import TileSizes
from mlx_vlm_pipes.architectures.internvl.vision_model import VisionModel, as_patches
from mlx_vlm_pipes.architectures.internvl.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.checkpoint.blueprint import Blueprint, Checkpoint
from mlx_vlm_pipes.config import PipelineConfig, upper_bounded_default
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext
from mlx_vlm_pipes.errors import InputError, WeightsError
from mlx_vlm_pipes.hf_config import AutoConfig, lookup, require_vision_config, text_config
from mlx_vlm_pipes.interfaces import (
    AlwaysSignalBuffersMixin,
    Buffer,
    InferenceSession,
    LayerWork,
    Model,
    VisionInputs,
)
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.weights.layout import Transform

DEFAULT_MAX_LENGTH = 4096  # where the text configuration names no limit
DEFAULT_TILES = 12
IMAGE_BYTES = 128 * 2**20  # of activations, for each image
TOKEN_BYTES = 100 * 2**10  # of activations, for each prompt token


@dataclass
class InternVLInputs(VisionInputs[list[Buffer]]):
    """One step's inputs; lists have one element, for the one device.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; return_n_logits int64 [1]; pixel_values
    [N, S/p, S/p, 3, p, p], the tiles of all images of the step; image_token_indices int32, one
    for each vision row. image_embeddings [rows, D] replaces the pixels where they are encoded.
    """

    vision_fields = ("pixel_values",)
    per_device = True
    tokens: Buffer
    input_row_offsets: list[Buffer]
    signal_buffers: list[Buffer]
    return_n_logits: Buffer
    pixel_values: list[Buffer] | None = None
    image_token_indices: list[Buffer] | None = None
    image_embeddings: Buffer | None = field(default=None, kw_only=True)


class InternVLModel(AlwaysSignalBuffersMixin, VisionLanguageModel[InternVLInputs]):
    """InternVL in transformers' layout and in that of the original InternVLChatModel."""

    model_config: InternVLConfig
    config_class = InternVLConfig
    inputs_class = InternVLInputs
    layouts = LAYOUTS

    @staticmethod
    def calculate_max_seq_len(  # pyright: ignore[reportIncompatibleMethodOverride]  # documented so
        pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """Raises: ConfigError if max_length exceeds the model's limit."""
        if lookup(text_config(huggingface_config), "max_position_embeddings") is None:
            return upper_bounded_default(DEFAULT_MAX_LENGTH, pipeline_config.model.max_length)
        return InternVLConfig.calculate_max_seq_len(pipeline_config, huggingface_config)

    @classmethod
    def estimate_activation_memory(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """Bytes by MAX's rule of thumb, not from the model's own sizes (docs/api.md).

        Raises: ConfigError without a vision_config.
        """
        vision = require_vision_config(huggingface_config)
        side = _first(lookup(vision, "image_size", default=448))
        patch = _first(lookup(vision, "patch_size", default=14))
        ratio = lookup(huggingface_config, "downsample_ratio", default=0.5)
        image_tokens = max(1, int((side // patch) ** 2 * ratio**2))
        tokens = pipeline_config.runtime.max_batch_input_tokens
        images = max(1, tokens // image_tokens)
        if not pipeline_config.runtime.enable_chunked_prefill:
            overrides = pipeline_config.model.vision_config_overrides
            images += (TileSizes.read(huggingface_config, overrides).max_tiles or DEFAULT_TILES) + 1
        devices = len(pipeline_config.model.device_specs)
        return devices * (images * IMAGE_BYTES + tokens * TOKEN_BYTES)

    @classmethod
    def transforms(cls, config: InternVLConfig) -> tuple[Transform, ...]:
        return transforms(config.vision_config)

    @classmethod
    def blueprint(cls, config: InternVLConfig, checkpoint: Checkpoint) -> Blueprint:
        vision = checkpoint.tower(cls.tower_prefix)
        floats = [w.dtype for name, w in vision.items() if name.endswith("class_embedding")]
        dtype = floats[0] if floats else checkpoint.pipeline_config.model.dtype
        config.finalize(checkpoint.outer, checkpoint.text, vision, dtype, checkpoint.return_logits)
        return Blueprint(VisionModel(config), config.llm_config.decoder_config())

    def load_model(self, session: InferenceSession) -> tuple[Model, Model]:
        """The vision and the language model, weights in and evaluated.

        Raises: WeightsError for files that are not safetensors, or that do not fit the config.
        """
        self.require_safetensors(WeightsError)
        return super().load_model(session)

    def count_rows(self, image: ImageMetadata) -> int:
        """Vision rows that the image becomes."""
        tiles, rows, columns = self._grid(image)
        return tiles * rows * columns // self.model_config.shuffle_factor**2

    def batch_key(self, image: ImageMetadata) -> tuple[int, int]:
        """Rows and columns of patches of the image's tiles."""
        return self._grid(image)[1:]

    def pack(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """All tiles of the images, [N, R, C, 3, p, p]. Raises: InputError for several sizes."""
        grids = {self.batch_key(image) for image in images}
        if len(grids) > 1:
            raise InputError(
                f"tiles of {sorted(grids)} patches in one step; resize all images to one size or"
                " pass image_embeddings"
            )
        patch = self.model_config.vision_config.patch_size
        tiles = [pixel_array(as_patches(image.pixel_values, patch)) for image in images]
        return [tiles[0] if len(tiles) == 1 else mx.concatenate(tiles)]

    def step_fields(
        self, contexts: Sequence[TextAndVisionContext], *, has_pixels: bool
    ) -> dict[str, Any]:
        del contexts, has_pixels
        return {"signal_buffers": self.signal_buffers}

    def vision_work(self, image: ImageMetadata) -> LayerWork:
        vision = self.model_config.vision_config
        tiles, patches = image.pixel_values.shape[0], (vision.image_size // vision.patch_size) ** 2
        scores = tiles * vision.num_attention_heads * (patches + 1) ** 2
        tokens, width = tiles * (patches + 1), vision.hidden_size
        return LayerWork(tokens, width, width, vision.intermediate_size, scores, vision.head_dim)

    def _grid(self, image: ImageMetadata) -> tuple[int, int, int]:
        """Tiles, and rows and columns of patches of each."""
        patch = self.model_config.vision_config.patch_size
        return as_patches(image.pixel_values, patch).shape[:3]


def _first(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]
