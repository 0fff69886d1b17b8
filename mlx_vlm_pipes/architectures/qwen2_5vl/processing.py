"""Qwen2.5-VL: pictures and clips of any size as blocks of patches.

Source: transformers image_processing_pil_qwen2_vl.py, video_processing_qwen2_vl.py and
processing_qwen2_5_vl.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_vlm_pipes.architectures.qwen2_5vl.context import (
    Qwen2_5VLImage,
    Qwen2_5VLTextAndVisionContext,
    RopeTokens,
    VisionData,
)
from mlx_vlm_pipes.architectures.qwen2_5vl.facts import FACTS
from mlx_vlm_pipes.architectures.qwen2_5vl.sizes import VisionSizes
from mlx_vlm_pipes.contexts import ImageMetadata, TextContext
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.processing.base import ContextFields, EncodedMedia
from mlx_vlm_pipes.processing.grid_clips import ClipRunProcessor
from mlx_vlm_pipes.processing.grids import Grid
from mlx_vlm_pipes.processing.types import ProcessedPrompt


class Qwen2_5VLProcessor(ClipRunProcessor):
    """A clip is one run of placeholders; how long its steps last decides their positions."""

    facts = FACTS

    def read_sizes(self, vision_config: AutoConfig) -> tuple[int, int, int]:
        self.sizes = sizes = VisionSizes.read(vision_config)
        self.rope = RopeTokens(
            sizes.spatial_merge_size,
            sizes.tokens_per_second,
            self.image_token_id,
            self.video_token_id,
            self.start_token_id,
        )
        return sizes.patch_size, sizes.spatial_merge_size, sizes.temporal_patch_size

    def grid_image(
        self, patches: np.ndarray, grid: Grid, *, is_video: bool = False, seconds: float = 1.0
    ) -> Qwen2_5VLImage:
        """seconds: that one step of a clip covers."""
        # Seconds decide a clip's positions, so its cached keys: another speed is another clip.
        identity = self.grid_hash(patches, grid, str(seconds))
        rows = self.num_rows(patches)
        return Qwen2_5VLImage(0, rows, patches, identity, grid, is_video, seconds)

    def clip_image(self, patches: np.ndarray, grid: Grid, seconds: float) -> Qwen2_5VLImage:
        return self.grid_image(patches, grid, is_video=True, seconds=seconds)

    def arrays(self, media: Sequence[EncodedMedia]) -> dict[str, np.ndarray]:
        """As GridProcessor; second_per_grid_ts float32 [clips]."""
        out = super().arrays(media)
        images = [image for item in media for image in item.images]
        data = self._vision_data(images)
        if len(data.second_per_grid_ts):
            out["second_per_grid_ts"] = data.second_per_grid_ts
        return out

    def make_context(self, processed: ProcessedPrompt, fields: ContextFields) -> TextContext:
        context = Qwen2_5VLTextAndVisionContext(
            **fields,
            vision_token_ids=list(self.tokens.ids),
            images=processed.images,
            rope=self.rope,
            vision_data=self._vision_data(processed.images) if processed.images else None,
        )
        context.refresh_positions()
        return context

    def _vision_data(self, images: Sequence[ImageMetadata]) -> VisionData:
        own = tuple(image for image in images if isinstance(image, Qwen2_5VLImage))
        return VisionData(own, self.sizes)
