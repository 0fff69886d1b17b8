"""Idefics3Model: the documented pipeline model over the SigLIP tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.idefics3.model_config import Idefics3Config
from mlx_vlm_pipes.architectures.idefics3.vision_model import Idefics3Vision
from mlx_vlm_pipes.architectures.idefics3.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.architectures.llama3.model_config import bounded_max_seq_len
from mlx_vlm_pipes.checkpoint.state import (
    LANGUAGE,
    StateDict,
    part,
)
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext
from mlx_vlm_pipes.errors import MediaError
from mlx_vlm_pipes.hf_config import AutoConfig, lookup, text_config
from mlx_vlm_pipes.interfaces import (
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

MAX_POSITIONS = 4096  # where a text configuration names no max_position_embeddings


@dataclass
class Idefics3Inputs(ModelInputs):
    """One step's inputs.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; return_n_logits int64 [1]; pixel_values
    float [N, 3, S, S], the frames of all rows; image_token_indices int32 [M], where each vision
    row goes among the tokens (negative: nowhere); image_embeddings [M, E]: vision rows that are
    encoded already, in place of pixel_values.
    """

    tokens: Buffer
    input_row_offsets: Buffer
    return_n_logits: Buffer
    pixel_values: Buffer | None = None
    image_token_indices: Buffer | None = None
    image_embeddings: Buffer | None = field(default=None, kw_only=True)

    @property
    def has_vision_inputs(self) -> bool:
        return self.pixel_values is not None


def stack_frames(images: Sequence[ImageMetadata]) -> Buffer:
    """[N, 3, S, S]: the frames of a checkpoint all have one size."""
    return pixel_array(np.stack([image.pixel_values for image in images]))


class Idefics3Model(VisionLanguageModel):
    """Idefics3 and SmolVLM."""

    config_class = Idefics3Config
    layouts = LAYOUTS

    @staticmethod
    def calculate_max_seq_len(  # pyright: ignore[reportIncompatibleMethodOverride]  # documented as static
        pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """Raises: ConfigError if max_length exceeds the decoder's limit."""
        text = text_config(huggingface_config)
        limit = lookup(text, "max_position_embeddings", default=MAX_POSITIONS)
        return bounded_max_seq_len("idefics3", limit, pipeline_config.model.max_length)

    @classmethod
    def read_config(
        cls, pipeline_config: PipelineConfig
    ) -> tuple[Idefics3Config, tuple[Transform, ...]]:
        """What config.json alone says, and the changes of values that it implies."""
        config = Idefics3Config.initialize(pipeline_config)
        return config, transforms(config.vision_config)

    @classmethod
    def blueprint(
        cls,
        config: Idefics3Config,
        pipeline_config: PipelineConfig,
        state: StateDict,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
    ) -> tuple[Idefics3Vision, DecoderConfig]:
        text = part(state, LANGUAGE)
        outer = pipeline_config.model.require_huggingface_config()
        config.finalize(outer, text, return_logits, return_hidden_states)
        return Idefics3Vision(config.vision_config), config.text_config.decoder_config()

    def load_model(self, session: InferenceSession | None = None) -> tuple[Model, Model]:
        """Vision and language model, with their weights in; the model's own session by default.

        Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
        """
        return super().load_model(session or self.session)

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextAndVisionContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
        *,
        image_embeddings: Buffer | None = None,
    ) -> Idefics3Inputs:
        """Ragged inputs; the frames with tokens among the active ones are encoded in this step.

        image_embeddings [M, E]: the vision rows of exactly these frames, encoded before.
        """
        single_replica(replica_batches)
        contexts = [context for batch in replica_batches for context in batch]
        require_image_rows(contexts, self.model_config.image_token_id, self.count_rows)
        images = active_images(contexts)
        pixels = None
        if images and image_embeddings is None:
            pixels = stack_frames(images)
        return Idefics3Inputs(
            tokens=flat_tokens(contexts),
            input_row_offsets=row_offsets(contexts),
            return_n_logits=mx.array([return_n_logits]),
            pixel_values=pixels,
            image_token_indices=mx.array(image_token_indices(contexts)) if images else None,
            kv_cache_inputs=kv_cache_inputs,
            image_embeddings=image_embeddings if images else None,
        )

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

    def encode_images(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Vision rows [image_seq_len, E] of each frame, all of them in one batch. Lazy."""
        if not images:
            return []
        pixels = stack_frames(images)
        return [*mx.split(self.vision_model(pixels), len(images))]

    def vision_work(self, image: ImageMetadata) -> VisionWork:
        vision = self.model_config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        scores = vision.num_attention_heads * patches**2
        width = vision.hidden_size
        return VisionWork(patches, width, width, vision.intermediate_size, scores)

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """One step.

        Raises: TypeError for other inputs, ConfigError without a cache, ImageTokenMismatch if
        vision rows and image_token_indices differ in number.
        """
        require_inputs(model_inputs, Idefics3Inputs)
        assert isinstance(model_inputs, Idefics3Inputs)
        embeddings = model_inputs.image_embeddings
        if embeddings is None and model_inputs.has_vision_inputs:
            embeddings = self.vision_model(model_inputs.pixel_values)
        return self.language_model(
            model_inputs.tokens,
            model_inputs.input_row_offsets,
            model_inputs.return_n_logits,
            model_inputs.kv_cache_inputs,
            embeddings,
            model_inputs.image_token_indices,
        )

    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> Idefics3Inputs:
        """The decode step's inputs, lazily: next_tokens [B] becomes the tokens."""
        if not isinstance(prev_model_inputs, Idefics3Inputs):
            raise TypeError(f"expected Idefics3Inputs, got {type(prev_model_inputs).__name__}")
        return replace(
            prev_model_inputs,
            tokens=next_tokens,
            input_row_offsets=mx.arange(next_tokens.shape[0] + 1, dtype=mx.uint32),
            pixel_values=None,
            image_token_indices=None,
            image_embeddings=None,
        )
