"""InternVLModel: the documented pipeline model over the vision tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.internvl.model_config import InternVLConfig, require_vision_config
from mlx_vlm_pipes.architectures.internvl.vision_model import VisionModel, as_patches
from mlx_vlm_pipes.architectures.internvl.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.checkpoint.state import (
    LANGUAGE,
    StateDict,
    part,
)
from mlx_vlm_pipes.config import (
    PipelineConfig,
    upper_bounded_default,
    weights_format,
)
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext
from mlx_vlm_pipes.errors import InputError, WeightsError
from mlx_vlm_pipes.hf_config import AutoConfig, lookup, text_config
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
from mlx_vlm_pipes.nn.ragged import (
    active_images,
    flat_tokens,
    image_token_indices,
    require_image_rows,
    row_offsets,
    single_replica,
)
from mlx_vlm_pipes.nn.vision import pixel_array
from mlx_vlm_pipes.weights.layout import Transform

DEFAULT_MAX_LENGTH = 4096  # where the text configuration names no limit
DEFAULT_TILES = 12
IMAGE_BYTES = 128 * 2**20  # of activations, for each image
TOKEN_BYTES = 100 * 2**10  # of activations, for each prompt token


@dataclass
class InternVLInputs(ModelInputs):
    """One step's inputs; lists have one element, for the one device.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; return_n_logits int64 [1]; pixel_values
    [N, S/p, S/p, 3, p, p], the tiles of all images of the step; image_token_indices int32, one
    for each vision row. image_embeddings [rows, D] replaces the pixels where they are encoded.
    """

    tokens: Buffer
    input_row_offsets: list[Buffer]
    signal_buffers: list[Buffer]
    return_n_logits: Buffer
    pixel_values: list[Buffer] | None = None
    image_token_indices: list[Buffer] | None = None
    image_embeddings: Buffer | None = field(default=None, kw_only=True)

    @property
    def has_vision_inputs(self) -> bool:
        return self.pixel_values is not None


class InternVLModel(AlwaysSignalBuffersMixin, VisionLanguageModel):
    """InternVL in transformers' layout and in that of the original InternVLChatModel."""

    config_class = InternVLConfig
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
        """Bytes of a prefill step's activations, by the documented rule of thumb.

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
            tiles = lookup(huggingface_config, "max_dynamic_patch", default=DEFAULT_TILES)
            images += overrides.get("max_dynamic_patch", tiles) + 1
        devices = len(pipeline_config.model.device_specs)
        return devices * (images * IMAGE_BYTES + tokens * TOKEN_BYTES)

    @classmethod
    def read_config(
        cls, pipeline_config: PipelineConfig
    ) -> tuple[InternVLConfig, tuple[Transform, ...]]:
        """What config.json alone says, and the changes of values that it implies."""
        config = InternVLConfig.initialize(pipeline_config)
        return config, transforms(config.vision_config)

    @classmethod
    def blueprint(
        cls,
        config: InternVLConfig,
        pipeline_config: PipelineConfig,
        state: StateDict,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
    ) -> tuple[VisionModel, DecoderConfig]:
        del return_hidden_states  # no field of the configuration
        text, vision = part(state, LANGUAGE), state.without(LANGUAGE)
        floats = [w.dtype for name, w in vision.items() if name.endswith("class_embedding")]
        dtype = floats[0] if floats else pipeline_config.model.dtype
        outer = pipeline_config.model.require_huggingface_config()
        config.finalize(outer, text, vision, dtype, return_logits)
        return VisionModel(config), config.llm_config.decoder_config()

    def load_model(self, session: InferenceSession) -> tuple[Model, Model]:
        """The vision and the language model, weights in and evaluated.

        Raises: WeightsError for files that are not safetensors, or that do not fit the config.
        """
        paths = self.pipeline_config.model.weight_path
        if paths and weights_format(paths) != "safetensors":
            raise WeightsError("InternVL weights must be .safetensors files")
        return super().load_model(session)

    def count_rows(self, image: ImageMetadata) -> int:
        """Vision rows that the image becomes."""
        shape, config = image.pixel_values.shape, self.model_config
        patch = 1 if len(shape) == 6 else config.vision_config.patch_size
        rows, columns = shape[-2:] if len(shape) == 4 else shape[1:3]
        return shape[0] * (rows // patch) * (columns // patch) // config.shuffle_factor**2

    def encode_images(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Vision rows [M_i, D] of each image. Images with tiles of one size share a batch."""
        tiles = [self._tiles(image) for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, array in enumerate(tiles):
            groups.setdefault(array.shape[1:3], []).append(i)
        encoded: dict[int, Buffer] = {}
        for members in groups.values():
            batch = mx.concatenate([tiles[i] for i in members])
            rows = self.vision_model(batch)
            per_tile = rows.shape[0] // batch.shape[0]
            ends = np.cumsum([tiles[i].shape[0] * per_tile for i in members])
            pieces = mx.split(rows, ends[:-1].tolist())
            encoded.update(zip(members, pieces, strict=True))
        return [encoded[i] for i in range(len(images))]

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextAndVisionContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
        *,
        image_embeddings: Buffer | None = None,
    ) -> InternVLInputs:
        """image_embeddings [rows, D]: rows of the step's images, encoded before.

        Raises: ConfigError for more than one replica, InputError for tiles of several sizes,
        ImageTokenMismatch for an image with more or fewer placeholders than vision rows.
        """
        single_replica(replica_batches)
        contexts = [context for batch in replica_batches for context in batch]
        require_image_rows(contexts, None, self.count_rows)
        images = active_images(contexts)
        pixels = indices = None
        if images:
            indices = [mx.array(image_token_indices(contexts))]
            if image_embeddings is None:
                pixels = [self._batch(images)]
        return InternVLInputs(
            tokens=flat_tokens(contexts),
            input_row_offsets=[row_offsets(contexts)],
            signal_buffers=self.signal_buffers,
            return_n_logits=mx.array([return_n_logits]),
            pixel_values=pixels,
            image_token_indices=indices,
            kv_cache_inputs=kv_cache_inputs,
            image_embeddings=image_embeddings if images else None,
        )

    def vision_work(self, image: ImageMetadata) -> VisionWork:
        vision = self.model_config.vision_config
        tiles, patches = image.pixel_values.shape[0], (vision.image_size // vision.patch_size) ** 2
        scores = tiles * vision.num_attention_heads * (patches + 1) ** 2
        tokens, width = tiles * (patches + 1), vision.hidden_size
        return VisionWork(tokens, width, width, vision.intermediate_size, scores)

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """One step. Raises: TypeError for other inputs, ConfigError without a cache."""
        require_inputs(model_inputs, InternVLInputs)
        assert isinstance(model_inputs, InternVLInputs)
        embeddings = model_inputs.image_embeddings
        if embeddings is None and model_inputs.pixel_values is not None:
            embeddings = self.vision_model(model_inputs.pixel_values[0])
        indices = model_inputs.image_token_indices
        return self.language_model(
            model_inputs.tokens,
            model_inputs.input_row_offsets[0],
            model_inputs.return_n_logits,
            model_inputs.kv_cache_inputs,
            embeddings,
            None if indices is None else indices[0],
        )

    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> InternVLInputs:
        """The decode step's inputs, lazily: next_tokens [B] becomes the tokens, images are gone."""
        if not isinstance(prev_model_inputs, InternVLInputs):
            raise TypeError(f"expected InternVLInputs, got {type(prev_model_inputs).__name__}")
        return replace(
            prev_model_inputs,
            tokens=next_tokens,
            input_row_offsets=[mx.arange(next_tokens.shape[0] + 1, dtype=mx.uint32)],
            pixel_values=None,
            image_token_indices=None,
            image_embeddings=None,
        )

    def _tiles(self, image: ImageMetadata) -> Buffer:
        """The image's tiles as [tiles, R, C, 3, p, p]."""
        patch = self.model_config.vision_config.patch_size
        return as_patches(pixel_array(image.pixel_values), patch)

    def _batch(self, images: Sequence[ImageMetadata]) -> Buffer:
        """All tiles of the images, [N, R, C, 3, p, p]. Raises: InputError for several sizes."""
        tiles = [self._tiles(image) for image in images]
        grids = {array.shape[1:3] for array in tiles}
        if len(grids) > 1:
            raise InputError(
                f"tiles of {sorted(grids)} patches in one step; resize all images to one size or"
                " pass image_embeddings"
            )
        return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles)


def _first(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]
