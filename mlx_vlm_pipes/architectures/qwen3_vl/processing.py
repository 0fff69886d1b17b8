"""Qwen3-VL: pictures of any size; clips frame by frame, each behind its time in seconds.

A clip in a prompt becomes `<0.2 seconds><|vision_start|>...<|vision_end|>` for each step of time.
As in transformers 4.57, which the released weights were trained with, these take the place of the
pair `<|vision_start|>...<|vision_end|>` that the chat template writes around the placeholder;
transformers 5.23 leaves that pair around them. A bare `<|video_pad|>` is taken as well.
Source: transformers video_processing_qwen3_vl.py, processing_qwen3_vl.py (4.57 and 5.23).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_vlm_pipes.architectures.qwen3_vl.context import Qwen3VLTextAndVisionContext
from mlx_vlm_pipes.architectures.qwen3_vl.facts import FACTS
from mlx_vlm_pipes.architectures.qwen3_vl.sizes import VisionSizes
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.processing.base import EncodedMedia, MediaTokens
from mlx_vlm_pipes.processing.grid_processor import START, GridProcessor
from mlx_vlm_pipes.processing.patches import ClipSettings, PatchDefaults, PatchSettings, cap_of, fit
from mlx_vlm_pipes.processing.settings import CLIP_MEAN, CLIP_STD, HALF
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import ClipPlan, VideoInfo, load_clip

if TYPE_CHECKING:
    from PIL.Image import Image

END = "<|vision_end|>"


class Qwen3VLProcessor(GridProcessor):
    """One GridImage a picture, and one for each step of a clip.

    min_pixels and max_pixels of a clip count the pixels of all its frames.
    """

    facts = FACTS
    image_defaults = PatchDefaults(56 * 56, 28 * 28 * 1280, 14, CLIP_MEAN, CLIP_STD)
    video_defaults = PatchDefaults(128 * 32 * 32, 32 * 32 * 768, 16, HALF, HALF)
    max_video_tokens = 768
    context_class = Qwen3VLTextAndVisionContext

    def read_settings(self, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> MediaTokens:
        self.agreed_token_id(END, config, "vision_end_token_id")
        return super().read_settings(config, overrides)

    def read_sizes(self, vision_config: AutoConfig) -> tuple[int, int, int]:
        sizes = VisionSizes.read(vision_config)
        return sizes.patch_size, sizes.spatial_merge_size, sizes.temporal_patch_size

    def place(self, text: str, num_images: int, num_videos: int) -> list[tuple[str, int, int]]:
        """As the base; a clip's marker takes in the pair around it, where there is one."""
        found = super().place(text, num_images, num_videos)
        return [
            (kind, begin - len(START), end + len(END))
            if kind == "video" and text[:begin].endswith(START) and text[end:].startswith(END)
            else (kind, begin, end)
            for kind, begin, end in found
        ]

    def encode_clip(self, source: Any, request: PromptRequest) -> EncodedMedia:
        """Raises: InputError for fewer frames than one step of time has."""
        settings = self.video_settings.limited(request)

        def choose(info: VideoInfo) -> np.ndarray:
            return sample_frames(info, request, self.clip_settings)

        def limits(
            first: tuple[int, int], count: int
        ) -> tuple[tuple[int, int], PatchSettings, int]:
            limited = capped(settings, self.clip_settings, count)
            return at_least(first, settings.factor), limited, count

        def prepare(frame: Image, first: tuple[int, int], count: int) -> Image:
            return fit(frame, *limits(first, count))

        convert = settings.pixels.convert_rgb
        plan = ClipPlan(request.fps, choose, prepare, request.access, convert_rgb=convert)
        clip = load_clip(source, plan)
        if len(clip.frames) < settings.step:
            raise InputError(
                f"a clip of {len(clip.frames)} frames; Qwen3-VL takes {settings.step} or more, or "
                "give it as a picture"
            )
        patches, (times, rows, columns) = self.cut_clip(clip, settings)
        steps = np.split(patches, times)
        images = [self.grid_image(step, (1, rows, columns), is_video=True) for step in steps]
        seconds = step_seconds(clip.timestamps_s, settings.step)
        texts = [
            f"<{second:.1f} seconds>{START}{self.video_token * image.end_idx}{END}"
            for second, image in zip(seconds, images, strict=True)
        ]
        cap = cap_of(*limits(clip.source_size, clip.num_chosen))
        return self.encoded_clip(clip, images, (times, rows, columns), "".join(texts), cap)


def sample_frames(info: VideoInfo, request: PromptRequest, limits: ClipSettings) -> np.ndarray:
    """Frame numbers at request.fps (or request.num_frames of them), from the first to the last.

    Source: transformers video_processing_qwen3_vl.py, sample_frames.
    """
    total = info.num_frames
    if request.num_frames is not None:
        count = min(request.num_frames, total)
    else:
        wanted = int(total / info.fps * request.fps)
        count = min(max(wanted, limits.min_frames), limits.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def step_seconds(timestamps_s: Sequence[float], step: int) -> list[float]:
    """The time of each `step` frames, halfway from the first to the last; the last one repeats."""
    stamps = [*timestamps_s, *[timestamps_s[-1]] * (-len(timestamps_s) % step)]
    return [(stamps[i] + stamps[i + step - 1]) / 2 for i in range(0, len(stamps), step)]


def at_least(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) enlarged, ratio kept, until neither is below `side`."""
    width, height = size
    if min(size) >= side:
        return size
    scale = max(side / height, side / width)
    return int(width * scale), int(height * scale)


def capped(settings: PatchSettings, limits: ClipSettings, count: int) -> PatchSettings:
    """Limits of a clip of `count` frames. Only where the files ask for a cap on each frame: unset,
    transformers 5.23 warns and applies none.
    """
    if not limits.cap_pixels_per_frame:
        return settings
    frame = min(limits.max_video_tokens * settings.factor**2, settings.max_pixels // count)
    return replace(settings, max_pixels=max(frame, int(settings.min_pixels * 1.05)) * count)
