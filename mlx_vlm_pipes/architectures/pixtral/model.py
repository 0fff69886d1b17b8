"""PixtralModel: the documented pipeline model over the Pixtral tower and the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.pixtral.model_config import PixtralConfig
from mlx_vlm_pipes.architectures.pixtral.vision_model import (
    PixtralVision,
    image_grids,
    position_ids,
    to_patches,
)
from mlx_vlm_pipes.architectures.pixtral.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.checkpoint.state import (
    StateDict,
)
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.interfaces import (
    Buffer,
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


@dataclass
class PixtralInputs(ModelInputs):
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

    tokens: Buffer
    input_row_offsets: Buffer
    return_n_logits: Buffer
    pixel_patches: Buffer | None = None
    vision_attention_mask: Buffer | None = None
    vision_position_ids: Buffer | None = None
    image_token_indices: Buffer | None = None
    image_embeddings: Buffer | None = field(default=None, kw_only=True)

    @property
    def has_vision_inputs(self) -> bool:
        return self.pixel_patches is not None


class PixtralModel(VisionLanguageModel):
    """LLaVA checkpoints with a Pixtral tower."""

    config_class = PixtralConfig
    layouts = LAYOUTS

    @classmethod
    def calculate_max_seq_len(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """Raises: ConfigError if max_length exceeds the decoder's limit."""
        return PixtralConfig.calculate_max_seq_len(pipeline_config, huggingface_config)

    @classmethod
    def read_config(
        cls, pipeline_config: PipelineConfig
    ) -> tuple[PixtralConfig, tuple[Transform, ...]]:
        """What config.json alone says, and the changes of values that it implies."""
        config = PixtralConfig.initialize(pipeline_config)
        return config, transforms(config)

    @classmethod
    def blueprint(
        cls,
        config: PixtralConfig,
        pipeline_config: PipelineConfig,
        state: StateDict,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
    ) -> tuple[PixtralVision, DecoderConfig]:
        del pipeline_config, state, return_hidden_states  # nothing in a checkpoint decides here
        config.return_logits = return_logits
        return PixtralVision(config), config.decoder_config()

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextAndVisionContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
        *,
        image_embeddings: Buffer | None = None,
    ) -> PixtralInputs:
        """Ragged inputs; the images with tokens among the active ones are encoded in this step.

        image_embeddings [M, E]: the vision rows of exactly these images, encoded before.
        """
        single_replica(replica_batches)
        contexts = [context for batch in replica_batches for context in batch]
        require_image_rows(contexts, self.model_config.image_token_index, self.count_rows)
        inputs = PixtralInputs(
            tokens=flat_tokens(contexts),
            input_row_offsets=row_offsets(contexts),
            return_n_logits=mx.array([return_n_logits]),
            kv_cache_inputs=kv_cache_inputs,
        )
        images = active_images(contexts)
        if images:
            inputs.image_token_indices = mx.array(image_token_indices(contexts))
            inputs.image_embeddings = image_embeddings
            if image_embeddings is None:
                packed = self._pack(images)
                inputs.pixel_patches, inputs.vision_attention_mask, inputs.vision_position_ids = (
                    packed
                )
        return inputs

    def _pack(self, images: Sequence[ImageMetadata]) -> tuple[Buffer, Buffer, Buffer]:
        """pixel_patches, vision_attention_mask and vision_position_ids of these images."""
        p, config = self.model_config.patch_size, self.model_config
        patches = np.concatenate([to_patches(image.pixel_values, p) for image in images])
        grids = image_grids([image.pixel_values.shape for image in images], p)
        ids = position_ids(grids, config.image_size // p)
        return pixel_array(patches), mx.array(grids), mx.array(ids)

    def count_rows(self, image: ImageMetadata) -> int:
        """Vision rows that an image gives: one for each whole patch."""
        return int(image_grids([image.pixel_values.shape], self.model_config.patch_size).prod())

    def encode_images(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Vision rows [h * w, E] of each image, all of them packed into one sequence. Lazy."""
        if not images:
            return []
        rows = self.vision_model(*self._pack(images))
        ends = np.cumsum([self.count_rows(image) for image in images])
        return [*mx.split(rows, ends[:-1].tolist())]

    def vision_work(self, image: ImageMetadata) -> VisionWork:
        config, patches = self.model_config, self.count_rows(image)
        scores = config.vision_num_attention_heads * patches**2
        width = config.vision_hidden_size
        heads = config.vision_num_attention_heads * config.vision_head_dim
        return VisionWork(patches, width, heads, config.vision_intermediate_size, scores)

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """One step.

        Raises: TypeError for other inputs, ConfigError without a cache, ImageTokenMismatch if
        vision rows and image_token_indices differ in number.
        """
        require_inputs(model_inputs, PixtralInputs)
        assert isinstance(model_inputs, PixtralInputs)
        embeddings = model_inputs.image_embeddings
        if embeddings is None and model_inputs.has_vision_inputs:
            embeddings = self.vision_model(
                model_inputs.pixel_patches,
                model_inputs.vision_attention_mask,
                model_inputs.vision_position_ids,
            )
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
    ) -> PixtralInputs:
        """The decode step's inputs, lazily: next_tokens [B] becomes the tokens."""
        if not isinstance(prev_model_inputs, PixtralInputs):
            raise TypeError(f"expected PixtralInputs, got {type(prev_model_inputs).__name__}")
        return replace(
            prev_model_inputs,
            tokens=next_tokens,
            input_row_offsets=mx.arange(next_tokens.shape[0] + 1, dtype=mx.uint32),
            pixel_patches=None,
            vision_attention_mask=None,
            vision_position_ids=None,
            image_token_indices=None,
            image_embeddings=None,
        )
