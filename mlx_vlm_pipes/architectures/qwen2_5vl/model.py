"""Qwen2_5VLModel: the documented pipeline model over the vision tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.qwen2_5vl.context import (
    Qwen2_5VLImage,
    Qwen2_5VLTextAndVisionContext,
    VisionData,
    VisionSizes,
)
from mlx_vlm_pipes.architectures.qwen2_5vl.model_config import Qwen2_5VLConfig
from mlx_vlm_pipes.architectures.qwen2_5vl.vision_model import VisionModel
from mlx_vlm_pipes.architectures.qwen2_5vl.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.config import PipelineConfig, weights_format
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext
from mlx_vlm_pipes.dtypes import Device
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.interfaces import (
    AlwaysSignalBuffersMixin,
    Buffer,
    InferenceSession,
    Model,
    ModelInputs,
    ModelOutputs,
    ReturnHiddenStates,
    ReturnLogits,
    VisionWork,
    require_inputs,
)
from mlx_vlm_pipes.kv_cache import KVCacheInputs
from mlx_vlm_pipes.nn.checkpoint_model import VisionLanguageModel
from mlx_vlm_pipes.nn.decoder import DecoderConfig
from mlx_vlm_pipes.nn.loading import (
    LANGUAGE,
    VISION,
    StateDict,
    part,
)
from mlx_vlm_pipes.nn.ragged import (
    active_images,
    flat_tokens,
    image_token_indices,
    row_offsets,
    single_replica,
)
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.weights.layout import Transform

ACTIVATION_BYTES = 5 * 2**30  # the documented estimate


@dataclass
class Qwen2_5VLInputs(ModelInputs):
    """One step's inputs; every list holds one array, for the one device.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; position_ids uint32 [3, T], time, height
    and width; return_n_logits int64 [1]; image_token_indices int32 [M], rows of the flat tokens.
    The vision fields (spec, section 8.2) are None in a step without pixels: window_index int64
    [P/u], vision_position_ids int64 [P, 2], cu_* uint32 boundaries in patches, max_seqlen and
    max_window_seqlen uint32 [1], max_grid_size an int32 scalar. image_embeddings [M, E] takes the
    place of all of them where the pictures are encoded already.
    """

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

    @property
    def has_vision_inputs(self) -> bool:
        return self.pixel_values is not None


class Qwen2_5VLModel(AlwaysSignalBuffersMixin, VisionLanguageModel):
    """Qwen2.5-VL. `model_config` is None until `load_model` has finalised it."""

    model_config: Qwen2_5VLConfig | None = None
    config_class = Qwen2_5VLConfig
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
        """Bytes: one number for all sizes, as documented (spec, section 10)."""
        del pipeline_config, huggingface_config
        return ACTIVATION_BYTES

    @classmethod
    def read_config(
        cls, pipeline_config: PipelineConfig
    ) -> tuple[Qwen2_5VLConfig, tuple[Transform, ...]]:
        """What config.json alone says, and the changes of values that it implies."""
        config = Qwen2_5VLConfig.initialize(pipeline_config)
        return config, transforms(config.vision_config)

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

    def encode_images(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Decoder rows [M_i, E] of each picture or clip, all encoded in one batch. Lazy."""
        if not images:
            return []
        data = self._vision_data(images)
        rows = self.vision_model(*(fields[0] for fields in _vision_fields(data).values()))
        unit = data.sizes.spatial_merge_size**2
        counts = [t * h * w // unit for t, h, w in data.grids]
        return list(mx.split(rows, np.cumsum(counts)[:-1].tolist()))

    @staticmethod
    def prepare_decoder_position_ids(
        context_batch: Sequence[Qwen2_5VLTextAndVisionContext], devices: list[Device]
    ) -> Buffer:
        """Positions of all active tokens, uint32 [3, T]: time, height and width.

        Contexts whose tokens have grown since their positions were made (a reset) get new ones.
        """
        del devices  # one unified memory
        columns = [np.zeros((3, 0), np.int64)]
        columns += [context.active_positions() for context in context_batch]
        return mx.array(np.concatenate(columns, axis=1).astype(np.uint32))

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextAndVisionContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
        *,
        image_embeddings: Buffer | None = None,
    ) -> Qwen2_5VLInputs:
        """Raises: ConfigError without a cache; InputError for a picture without vision_data."""
        if kv_cache_inputs is None:
            raise ConfigError("no kv_cache_inputs; pass the cache of this batch")
        single_replica(replica_batches)
        contexts = [_own_context(context) for context in replica_batches[0]]
        inputs = Qwen2_5VLInputs(
            tokens=flat_tokens(contexts),
            input_row_offsets=[row_offsets(contexts)],
            signal_buffers=self.signal_buffers,
            position_ids=self.prepare_decoder_position_ids(contexts, self.devices),
            return_n_logits=mx.array([return_n_logits]),
            kv_cache_inputs=kv_cache_inputs,
            image_embeddings=image_embeddings,
        )
        images = active_images(contexts)
        if images or image_embeddings is not None:
            inputs.image_token_indices = [mx.array(image_token_indices(contexts))]
        if images and image_embeddings is None:
            for context in contexts:
                if active_images([context]):
                    context.require_vision_data()
            inputs.update(**_vision_fields(self._vision_data(images)))
        return inputs

    def vision_work(self, image: ImageMetadata) -> VisionWork:
        assert isinstance(image, Qwen2_5VLImage)
        assert self.model_config is not None
        vision, (times, rows, columns) = self.model_config.vision_config, image.grid_thw
        frame = rows * columns
        scores = times * vision.num_attention_heads * frame**2
        width = vision.hidden_size
        return VisionWork(times * frame, width, width, vision.intermediate_size, scores)

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """One step. Raises: TypeError for other inputs, ConfigError without a cache,
        ImageTokenMismatch if vision rows and image_token_indices differ in number."""
        require_inputs(model_inputs, Qwen2_5VLInputs)
        inputs = cast("Qwen2_5VLInputs", model_inputs)
        rows = inputs.image_embeddings
        if rows is None and inputs.has_vision_inputs:
            rows = self.vision_model(*(getattr(inputs, name)[0] for name in VISION_FIELDS))
        indices = inputs.image_token_indices
        return self.language_model(
            inputs.tokens,
            inputs.input_row_offsets[0],
            inputs.return_n_logits,
            inputs.kv_cache_inputs,
            rows,
            None if indices is None else indices[0],
            inputs.position_ids,
        )

    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> Qwen2_5VLInputs:
        """The decode step's inputs, lazily: next_tokens [B] becomes the tokens."""
        if not isinstance(prev_model_inputs, Qwen2_5VLInputs):
            raise TypeError(f"expected Qwen2_5VLInputs, got {type(prev_model_inputs).__name__}")
        prev, count = prev_model_inputs, next_tokens.shape[0]
        last = prev.position_ids
        if last.shape[1] != count or prev.image_token_indices is not None:
            ends = prev.input_row_offsets[0][1:] - 1
            # a row that ends in a picture goes on behind its largest position
            last = mx.max(mx.take(last, ends, axis=1), axis=0, keepdims=True)
            last = mx.broadcast_to(last, (3, count))
        return Qwen2_5VLInputs(
            tokens=next_tokens,
            input_row_offsets=[mx.arange(count + 1, dtype=mx.uint32)],
            signal_buffers=prev.signal_buffers,
            position_ids=last + 1,
            return_n_logits=prev.return_n_logits,
            kv_cache_inputs=prev.kv_cache_inputs,
            lora_ids=prev.lora_ids,
            lora_ranks=prev.lora_ranks,
        )

    def _vision_data(self, images: Sequence[ImageMetadata]) -> VisionData:
        """The tables of these pictures and no others."""
        assert self.model_config is not None
        vision = self.model_config.vision_config
        sizes = VisionSizes(vision.spatial_merge_size, vision.patch_size, vision.window_size)
        return VisionData(tuple(_own_image(image) for image in images), sizes)


# The vision model's arguments, in its order.
VISION_FIELDS = (
    "pixel_values", "vision_position_ids", "window_index", "cu_seqlens", "cu_window_seqlens",
    "max_seqlen", "max_window_seqlen", "max_grid_size",
)  # fmt: skip


def _vision_fields(data: VisionData) -> dict[str, list[Buffer]]:
    """The inputs' vision fields, by name, in the order of VISION_FIELDS."""
    tables = (
        data.vision_position_ids,
        data.window_index,
        data.cu_seqlens,
        data.cu_window_seqlens_unique,
        data.max_seqlen,
        data.window_max_seqlen,
        data.max_grid_size,
    )
    arrays = [pixel_array(data.concatenated_pixel_values), *(mx.array(table) for table in tables)]
    return {name: [array] for name, array in zip(VISION_FIELDS, arrays, strict=True)}


def _own_context(context: TextAndVisionContext) -> Qwen2_5VLTextAndVisionContext:
    if not isinstance(context, Qwen2_5VLTextAndVisionContext):
        raise TypeError(f"expected Qwen2_5VLTextAndVisionContext, got {type(context).__name__}")
    return context


def _own_image(image: ImageMetadata) -> Qwen2_5VLImage:
    if not isinstance(image, Qwen2_5VLImage):
        raise TypeError(f"expected Qwen2_5VLImage, got {type(image).__name__}")
    return image
