"""What pipeline models share whose decoder turns by time, height and width (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.base import VisionLanguageModel
from mlx_vlm_pipes.contexts import TextAndVisionContext
from mlx_vlm_pipes.dtypes import Device
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.interfaces import (
    AlwaysSignalBuffersMixin,
    Buffer,
    Phase,
    VisionInputs,
    require_kind,
)
from mlx_vlm_pipes.nn.ragged import active_images
from mlx_vlm_pipes.processing.grids import GridContext


class MRopeInputs(VisionInputs[list[Buffer]]):
    """Vision inputs with three-axis positions, uint32 [3, T], one array a device.

    Raises: ConfigError without the KV cache, which is documented as required.
    """

    per_device = True
    signal_buffers: list[Buffer]
    position_ids: Buffer

    def __post_init__(self) -> None:
        if self.kv_cache_inputs is None:
            raise ConfigError("no kv_cache_inputs; pass the cache of this batch")


MRopeT = TypeVar("MRopeT", bound=MRopeInputs)


class MRopeModel(AlwaysSignalBuffersMixin, VisionLanguageModel[MRopeT]):
    """A vision-language model whose contexts carry their own decoder positions."""

    context_class: ClassVar[type[GridContext]]

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
            if active_images([context]):
                context.media_positions()
        position_ids = self.prepare_decoder_position_ids(own, self.devices)
        return {"signal_buffers": self.signal_buffers, "position_ids": position_ids}

    def next_fields(self, prev: MRopeT, count: int) -> dict[str, Any]:
        last = prev.position_ids
        if prev.phase is Phase.PREFILL:
            ends = prev.input_row_offsets[0][1:] - 1
            # a row that ends in a picture goes on behind its largest position
            last = mx.max(mx.take(last, ends, axis=1), axis=0, keepdims=True)
            last = mx.broadcast_to(last, (3, count))
        return {"position_ids": last + 1}

    def positions(self, inputs: MRopeT) -> Buffer:
        return inputs.position_ids
