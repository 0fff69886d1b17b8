"""Qwen3VLModel: the pipeline model over the vision tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_vlm_pipes.architectures.mrope import MRopeInputs, MRopeModel
from mlx_vlm_pipes.architectures.qwen3_vl.context import Qwen3VLTextAndVisionContext, VisionData
from mlx_vlm_pipes.architectures.qwen3_vl.model_config import Qwen3VLConfig
from mlx_vlm_pipes.architectures.qwen3_vl.sizes import VisionSizes
from mlx_vlm_pipes.architectures.qwen3_vl.vision_model import VisionModel
from mlx_vlm_pipes.architectures.qwen3_vl.weight_adapters import LAYOUTS
from mlx_vlm_pipes.checkpoint.state import LANGUAGE, VISION, StateDict, part
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.contexts import ImageMetadata
from mlx_vlm_pipes.hf_config import AutoConfig, require_vision_config
from mlx_vlm_pipes.interfaces import (
    Buffer,
    LayerWork,
    ReturnHiddenStates,
    ReturnLogits,
    require_kind,
)
from mlx_vlm_pipes.kv_cache import KVCacheInputs
from mlx_vlm_pipes.nn.decoder import DecoderConfig
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.processing.grids import GridImage
from mlx_vlm_pipes.weights.layout import Transform


@dataclass
class Qwen3VLInputs(MRopeInputs):
    """One step's inputs; every list holds one array, for the one device.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; position_ids uint32 [3, T], time, height
    and width; return_n_logits int64 [1]; image_token_indices int32 [M], rows of the flat tokens.
    The vision fields are None in a step without pixels: vision_position_ids int64 [P, 2],
    interpolation_indices int32 [P, 4], interpolation_weights float32 [P, 4], cu_seqlens uint32
    boundaries in patches. image_embeddings [M, (1 + K) * E] takes the place of all of them where
    the pictures are encoded already: rows, and what each of the first K layers adds.
    """

    vision_fields = (
        "pixel_values", "vision_position_ids", "interpolation_indices", "interpolation_weights",
        "cu_seqlens",
    )  # fmt: skip
    tokens: Buffer
    input_row_offsets: list[Buffer]
    signal_buffers: list[Buffer]
    position_ids: Buffer
    return_n_logits: Buffer
    image_token_indices: list[Buffer] | None = None
    pixel_values: list[Buffer] | None = None
    vision_position_ids: list[Buffer] | None = None
    interpolation_indices: list[Buffer] | None = None
    interpolation_weights: list[Buffer] | None = None
    cu_seqlens: list[Buffer] | None = None
    kv_cache_inputs: KVCacheInputs[Buffer, Buffer] = field(kw_only=True)  # pyright: ignore[reportIncompatibleVariableOverride]  # required, as in the base's check
    image_embeddings: Buffer | None = field(default=None, kw_only=True)


class Qwen3VLModel(MRopeModel[Qwen3VLInputs]):
    """Qwen3-VL, dense."""

    model_config: Qwen3VLConfig
    config_class = Qwen3VLConfig
    inputs_class = Qwen3VLInputs
    context_class = Qwen3VLTextAndVisionContext
    layouts = LAYOUTS
    tower_prefix = VISION

    @classmethod
    def calculate_max_seq_len(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """Raises: ConfigError if max_length exceeds the model's limit."""
        return Qwen3VLConfig.calculate_max_seq_len(pipeline_config, huggingface_config)

    @classmethod
    def transforms(cls, config: Qwen3VLConfig) -> tuple[Transform, ...]:
        return config.vision_config.transforms()

    @classmethod
    def blueprint(
        cls,
        config: Qwen3VLConfig,
        pipeline_config: PipelineConfig,
        state: StateDict,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
    ) -> tuple[VisionModel, DecoderConfig]:
        outer = pipeline_config.model.require_huggingface_config()
        text, vision = part(state, LANGUAGE), part(state, VISION)
        config.finalize(outer, text, vision, return_logits, return_hidden_states)
        return VisionModel(config.vision_config), config.decoder_config()

    def count_rows(self, image: ImageMetadata) -> int:
        """Vision rows that a picture or frame makes: one for each merged patch."""
        t, h, w = require_kind(image, GridImage).grid_thw
        return t * h * w // self.model_config.vision_config.merge_unit

    def pack(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Pixels and tables of these pictures and frames and no others."""
        own = tuple(require_kind(image, GridImage) for image in images)
        outer = require_vision_config(self.huggingface_config)
        data = VisionData(own, VisionSizes.read(outer))
        tables = (data.vision_position_ids, *data.interpolation, data.cu_seqlens)
        return [pixel_array(data.concatenated_pixel_values), *(mx.array(table) for table in tables)]

    def vision_work(self, image: ImageMetadata) -> LayerWork:
        vision = self.model_config.vision_config
        times, rows, columns = require_kind(image, GridImage).grid_thw
        frame, width = rows * columns, vision.hidden_size
        scores = times * vision.num_attention_heads * frame**2
        return LayerWork(times * frame, width, width, vision.intermediate_size, scores)
