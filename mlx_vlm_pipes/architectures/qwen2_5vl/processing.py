"""Qwen2.5-VL: pictures and clips of any size as blocks of patches.

Source: transformers image_processing_pil_qwen2_vl.py, video_processing_qwen2_vl.py and
processing_qwen2_5_vl.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
from mlx_vlm_pipes.processing.grid_processor import GridProcessor
from mlx_vlm_pipes.processing.grids import Grid
from mlx_vlm_pipes.processing.patches import ClipSettings, PatchDefaults, PatchSettings, fit
from mlx_vlm_pipes.processing.settings import CLIP_MEAN, CLIP_STD
from mlx_vlm_pipes.processing.types import ProcessedPrompt, PromptRequest
from mlx_vlm_pipes.processing.video import ClipPlan, VideoInfo, arange_indices, load_clip

if TYPE_CHECKING:
    from PIL.Image import Image


class Qwen2_5VLProcessor(GridProcessor):
    """A clip is one run of placeholders; how long its steps last decides their positions."""

    facts = FACTS
    image_defaults = PatchDefaults(56 * 56, 28 * 28 * 1280, 14, CLIP_MEAN, CLIP_STD)
    video_defaults = PatchDefaults(128 * 28 * 28, 28 * 28 * 768, 14, CLIP_MEAN, CLIP_STD)
    max_video_tokens = 128000

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

    def grid_image(self, patches: np.ndarray, grid: Grid) -> Qwen2_5VLImage:
        return self._image(patches, grid)

    def encode_clip(self, source: Any, request: PromptRequest) -> EncodedMedia:
        settings = self.video_settings.limited(request)

        def choose(info: VideoInfo) -> np.ndarray:
            return sample_frames(info, request, self.clip_settings, settings.step)

        def prepare(frame: Image, first: tuple[int, int], count: int) -> Image:
            return fit(frame, first, self._capped(settings, count))

        convert = settings.pixels.convert_rgb
        plan = ClipPlan(request.fps, choose, prepare, request.access, convert_rgb=convert)
        clip = load_clip(source, plan)
        seconds = float(np.float32(settings.step / clip.fps))
        made = self._image(*self.cut_clip(clip, settings), is_video=True, seconds=seconds)
        return self.encoded_clip(clip, [made], made.grid_thw, self.video_token * made.end_idx)

    def _capped(self, settings: PatchSettings, count: int) -> PatchSettings:
        """Limits of one frame so that the whole clip stays within its share of tokens."""
        if not self.clip_settings.cap_pixels_per_frame:
            return settings
        total = int(self.clip_settings.max_video_tokens * settings.factor**2 * 0.9)
        share = min(settings.max_pixels, total * settings.step // count)
        return replace(settings, max_pixels=max(share, int(settings.min_pixels * 1.05)))

    def _image(
        self, patches: np.ndarray, grid: Grid, *, is_video: bool = False, seconds: float = 1.0
    ) -> Qwen2_5VLImage:
        """seconds: that one step of a clip covers."""
        rows = len(patches) // self.sizes.spatial_merge_size**2
        # Seconds decide a clip's positions, so its cached keys: another speed is another clip.
        identity = self.grid_hash(patches, grid, str(seconds))
        return Qwen2_5VLImage(0, rows, patches, identity, grid, is_video, seconds)

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


def sample_frames(
    info: VideoInfo, request: PromptRequest, limits: ClipSettings, step: int
) -> np.ndarray:
    """Frame numbers at request.fps (or request.num_frames of them), in whole temporal patches.

    Source: transformers video_processing_qwen2_vl.py, sample_frames.
    """
    total = info.num_frames
    if total < step:
        return np.arange(total)
    if request.num_frames is not None:
        count = min(round(request.num_frames / step) * step, total // step * step)
    else:
        most = min(limits.max_frames, total) // step * step
        wanted = total / info.fps * request.fps
        count = math.floor(min(max(wanted, limits.min_frames), most, total) / step) * step
    return arange_indices(0, total, total / max(count, step))
