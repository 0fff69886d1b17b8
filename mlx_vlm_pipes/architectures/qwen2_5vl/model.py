"""Qwen2_5VLModel (docs/api.md): the pipeline model over the vision tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
from mlx_vlm_pipes.checkpoint.state import (
    LANGUAGE,
    VISION,
    StateDict,
    part,
)
from mlx_vlm_pipes.config import PipelineConfig, weights_format
from mlx_vlm_pipes.contexts import ImageMetadata
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.interfaces import (
    Buffer,
    InferenceSession,
    LayerWork,
    Model,
    ReturnHiddenStates,
    ReturnLogits,
    require_kind,
)
from mlx_vlm_pipes.kv_cache import KVCacheInputs
from mlx_vlm_pipes.nn.decoder import DecoderConfig
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.weights.layout import Transform

ACTIVATION_BYTES = 5 * 2**30  # MAX's estimate


@dataclass
class Qwen2_5VLInputs(MRopeInputs):
    """One step's inputs; every list holds one array, for the one device.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; position_ids uint32 [3, T], time, height
    and width; return_n_logits int64 [1]; image_token_indices int32 [M], rows of the flat tokens.
    The vision fields (docs/api.md#pictures) are None in a step without pixels: window_index int64
    [P/u], vision_position_ids int64 [P, 2], cu_* uint32 boundaries in patches, max_seqlen and
    max_window_seqlen uint32 [1], max_grid_size an int32 scalar. image_embeddings [M, E] takes the
    place of all of them where the pictures are encoded already.
    """

    vision_fields = (
        "pixel_values", "vision_position_ids", "window_index", "cu_seqlens", "cu_window_seqlens",
        "max_seqlen", "max_window_seqlen", "max_grid_size",
    )  # fmt: skip
    tokens: Buffer
    input_row_offsets: list[Buffer]
    signal_buffers: list[Buffer]
    position_ids: Buffer
    return_n_logits: Buffer
    image_token_indices: list[Buffer] | None = None
    pixel_values: list[Buffer] | None = None
    window_index: list[Buffer] | None = None
    vision_position_ids: list[Buffer] | None = None
    max_grid_size: list[Buffer] | None = None
    cu_seqlens: list[Buffer] | None = None
    cu_window_seqlens: list[Buffer] | None = None
    max_seqlen: list[Buffer] | None = None
    max_window_seqlen: list[Buffer] | None = None
    kv_cache_inputs: KVCacheInputs[Buffer, Buffer] = field(kw_only=True)  # pyright: ignore[reportIncompatibleVariableOverride]  # documented as required
    image_embeddings: Buffer | None = field(default=None, kw_only=True)


class Qwen2_5VLModel(MRopeModel[Qwen2_5VLInputs]):
    """Qwen2.5-VL."""

    model_config: Qwen2_5VLConfig = cast("Qwen2_5VLConfig", None)  # as documented, before loading
    config_class = Qwen2_5VLConfig
    inputs_class = Qwen2_5VLInputs
    context_class = Qwen2_5VLTextAndVisionContext
    layouts = LAYOUTS
    tower_prefix = VISION

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
    def transforms(cls, config: Qwen2_5VLConfig) -> tuple[Transform, ...]:
        return config.vision_config.transforms()

    @classmethod
    def blueprint(
        cls,
        config: Qwen2_5VLConfig,
        pipeline_config: PipelineConfig,
        state: StateDict,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
    ) -> tuple[VisionModel, DecoderConfig]:
        del return_hidden_states  # no field of the configuration
        outer = pipeline_config.model.require_huggingface_config()
        text, vision = part(state, LANGUAGE), part(state, VISION)
        config.finalize(outer, pipeline_config, text, vision, return_logits)
        return VisionModel(config.vision_config), config.llm_config.decoder_config()

    def load_model(self, session: InferenceSession) -> tuple[Model, Model]:
        """(vision model, language model), with their weights in.

        Raises: ConfigError for files that are not safetensors; WeightsError for tensors that are
        missing, unknown or of another shape.
        """
        files = self.pipeline_config.model.weight_path
        if files and weights_format(files) != "safetensors":
            raise ConfigError(f"weight files {files[0].name}, ...; expected .safetensors")
        return super().load_model(session)

    def count_rows(self, image: ImageMetadata) -> int:
        """Vision rows that a picture or clip makes: one for each merged patch."""
        t, h, w = require_kind(image, Qwen2_5VLImage).grid_thw
        return t * h * w // self.model_config.vision_config.spatial_merge_size**2

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

    def vision_work(self, image: ImageMetadata) -> LayerWork:
        vision = self.model_config.vision_config
        times, rows, columns = require_kind(image, Qwen2_5VLImage).grid_thw
        frame = rows * columns
        scores = times * vision.num_attention_heads * frame**2
        width = vision.hidden_size
        return LayerWork(times * frame, width, width, vision.intermediate_size, scores)
