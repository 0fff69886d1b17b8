"""What pipeline models share of grids of patches and turns by time, height and width (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.base import VisionLanguageModel
from mlx_vlm_pipes.architectures.grid_config import GridTowerConfig
from mlx_vlm_pipes.checkpoint.state import VISION
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext
from mlx_vlm_pipes.dtypes import Device
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.interfaces import (
    AlwaysSignalBuffersMixin,
    Buffer,
    LayerWork,
    Phase,
    VisionInputs,
)
from mlx_vlm_pipes.kv_cache import KVCacheInputs
from mlx_vlm_pipes.processing.grids import GridContext, GridImage
from mlx_vlm_pipes.steps import require_kind
from mlx_vlm_pipes.weights.layout import Transform


@dataclass
class MRopeInputs(VisionInputs[list[Buffer]]):
    """Vision inputs with three-axis positions; every list holds one array, for the one device.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; position_ids uint32 [3, T], time, height
    and width; return_n_logits int64 [1]; image_token_indices int32 [M], rows of the flat tokens;
    pixel_values float [P, C*tp*p*p], None in a step without pixels, as what a room adds to them.
    Raises: ConfigError without the KV cache, which is documented as required.
    """

    per_device = True
    tokens: Buffer
    input_row_offsets: list[Buffer]
    signal_buffers: list[Buffer]
    position_ids: Buffer
    return_n_logits: Buffer
    image_token_indices: list[Buffer] | None = None
    pixel_values: list[Buffer] | None = None
    kv_cache_inputs: KVCacheInputs[Buffer, Buffer] = field(kw_only=True)  # pyright: ignore[reportIncompatibleVariableOverride]  # documented as required
    image_embeddings: Buffer | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.kv_cache_inputs is None:
            raise ConfigError("no kv_cache_inputs; pass the cache of this batch")


MRopeT = TypeVar("MRopeT", bound=MRopeInputs)


class MRopeModel(AlwaysSignalBuffersMixin, VisionLanguageModel[MRopeT]):
    """A model of pictures as grids of patches, whose contexts carry the decoder's positions."""

    context_class: ClassVar[type[GridContext]]
    tower_prefix = VISION

    @classmethod
    def transforms(cls, config: Any) -> tuple[Transform, ...]:
        return config.vision_config.transforms()

    @property
    def tower(self) -> GridTowerConfig:
        """The tower's part of the configuration."""
        return self.model_config.vision_config

    def count_rows(self, image: ImageMetadata) -> int:
        """Vision rows that a picture, clip or frame makes: one for each merged patch."""
        t, h, w = require_kind(image, GridImage).grid_thw
        return t * h * w // self.tower.merge_unit

    def vision_work(self, image: ImageMetadata) -> LayerWork:
        times, rows, columns = require_kind(image, GridImage).grid_thw
        frame, width = rows * columns, self.tower.hidden_size
        heads, inner = self.tower.num_attention_heads, self.tower.intermediate_size
        scores = times * heads * frame**2
        return LayerWork(times * frame, width, width, inner, scores, width // heads)

    @staticmethod
    def prepare_decoder_position_ids(
        context_batch: Sequence[GridContext], devices: list[Device]
    ) -> Buffer:
        """Positions of all active tokens, uint32 [3, T]: time, height and width.

        Contexts whose tokens have grown since their positions were made (a reset) get new ones.
        """
        del devices  # one unified memory
        columns = [np.zeros((3, 0), np.int64)]
        columns += [context.active_positions() for context in context_batch]
        return mx.array(np.concatenate(columns, axis=1).astype(np.uint32))

    def step_fields(
        self, contexts: Sequence[TextAndVisionContext], *, has_pixels: bool
    ) -> dict[str, Any]:
        """Raises: TypeError for contexts without positions, InputError for missing pixels."""
        own = [require_kind(context, self.context_class) for context in contexts]
        for context in own if has_pixels else ():
            if context.active_images:
                context.media_positions()
        position_ids = self.prepare_decoder_position_ids(own, self.devices)
        return {"signal_buffers": self.signal_buffers, "position_ids": position_ids}

    def next_fields(self, prev: MRopeT, count: int) -> dict[str, Any]:
        last = prev.position_ids
        if prev.phase is not Phase.DECODE:
            ends = prev.input_row_offsets[0][1:] - 1
            # a row that ends in a picture goes on behind its largest position
            last = mx.max(mx.take(last, ends, axis=1), axis=0, keepdims=True)
            last = mx.broadcast_to(last, (3, count))
        return {"position_ids": last + 1}

    def positions(self, inputs: MRopeT) -> Buffer:
        return inputs.position_ids
