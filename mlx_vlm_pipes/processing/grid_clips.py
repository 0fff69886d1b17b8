"""Clips as one run of placeholders, their frames resized alike.

Source: transformers video_processing_qwen2_vl.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_vlm_pipes.processing.base import EncodedMedia
from mlx_vlm_pipes.processing.grid_processor import GridProcessor
from mlx_vlm_pipes.processing.grids import Grid, GridImage
from mlx_vlm_pipes.processing.patches import ClipSettings, PatchDefaults, PatchSettings, cap_of, fit
from mlx_vlm_pipes.processing.settings import CLIP_MEAN, CLIP_STD
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import ClipPlan, VideoInfo, arange_indices, load_clip

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipRunProcessor(GridProcessor):
    """A clip is one picture of several steps of time; limits count the pixels of each frame."""

    image_defaults = PatchDefaults(56 * 56, 28 * 28 * 1280, 14, CLIP_MEAN, CLIP_STD)
    video_defaults = PatchDefaults(128 * 28 * 28, 28 * 28 * 768, 14, CLIP_MEAN, CLIP_STD)
    max_video_tokens = 128000

    def clip_image(self, patches: np.ndarray, grid: Grid, seconds: float) -> GridImage:
        """A clip, hashed. seconds: that one step of t covers."""
        del seconds
        return self.grid_image(patches, grid, is_video=True)

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
        made = self.clip_image(*self.cut_clip(clip, settings), seconds)
        cap = cap_of(clip.source_size, self._capped(settings, clip.num_chosen))
        return self.encoded_clip(clip, [made], made.grid_thw, self.video_token * made.end_idx, cap)

    def _capped(self, settings: PatchSettings, count: int) -> PatchSettings:
        """Limits of one frame so that the whole clip stays within its share of tokens."""
        if not self.clip_settings.cap_pixels_per_frame:
            return settings
        total = int(self.clip_settings.max_video_tokens * settings.factor**2 * 0.9)
        share = min(settings.max_pixels, total * settings.step // count)
        return replace(settings, max_pixels=max(share, int(settings.min_pixels * 1.05)))


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
