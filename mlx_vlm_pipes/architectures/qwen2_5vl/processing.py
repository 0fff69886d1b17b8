"""Qwen2.5-VL: pictures and clips of any size as blocks of patches.

Source: transformers image_processing_pil_qwen2_vl.py, video_processing_qwen2_vl.py and
processing_qwen2_5_vl.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_vlm_pipes.architectures.qwen2_5vl.context import (
    Qwen2_5VLImage,
    Qwen2_5VLTextAndVisionContext,
    RopeTokens,
    VisionData,
    VisionSizes,
)
from mlx_vlm_pipes.contexts import ImageMetadata, TextContext
from mlx_vlm_pipes.errors import InputError, ProcessorError
from mlx_vlm_pipes.processing.base import EncodedMedia, Unit, VisionProcessor, check_num_tokens
from mlx_vlm_pipes.processing.settings import (
    CLIP_MEAN,
    CLIP_STD,
    PixelSettings,
    ProcessorFiles,
    Settings,
)
from mlx_vlm_pipes.processing.transforms import cut_clip, image_hash, resize, to_array
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import ClipPlan, VideoInfo, arange_indices, load_clip

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

BICUBIC = 3
IMAGE, VIDEO, START = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"
IMAGE_LIMITS = (56 * 56, 28 * 28 * 1280)
VIDEO_LIMITS = (128 * 28 * 28, 28 * 28 * 768)
MAX_RATIO = 200
MAX_MIN_PIXELS = 2**24


@dataclass(frozen=True)
class PatchSettings:
    """Pixels in a still picture, or in one frame of a clip, and how they become patches."""

    pixels: PixelSettings
    min_pixels: int
    max_pixels: int
    patch: int
    merge: int
    step: int  # frames in a patch

    @property
    def factor(self) -> int:
        return self.patch * self.merge

    @classmethod
    def read(cls, settings: Settings, limits: tuple[int, int]) -> PatchSettings:
        size = settings.edges("size", ("shortest_edge", "longest_edge", "min_pixels", "max_pixels"))
        low = size.get("shortest_edge", size.get("min_pixels", limits[0]))
        high = size.get("longest_edge", size.get("max_pixels", limits[1]))
        return cls(
            pixels=PixelSettings.read(settings, BICUBIC, CLIP_MEAN, CLIP_STD),
            min_pixels=settings.integer(
                "min_pixels", min(low, MAX_MIN_PIXELS), high=MAX_MIN_PIXELS
            ),
            max_pixels=settings.integer("max_pixels", high, high=2**40),
            patch=settings.integer("patch_size", 14, high=256),
            merge=settings.integer("merge_size", 2, high=16),
            step=settings.integer("temporal_patch_size", 2, high=16),
        )

    def limited(self, request: PromptRequest) -> PatchSettings:
        """With the request's own limits. Raises: InputError if they make no sense."""
        low = self.min_pixels if request.min_pixels is None else request.min_pixels
        high = self.max_pixels if request.max_pixels is None else request.max_pixels
        if request.max_pixels is not None and request.min_pixels is None:
            low = min(low, high)
        if not 1 <= low <= MAX_MIN_PIXELS or high < low:
            raise InputError(
                f"min_pixels {low} and max_pixels {high}; expected 1 <= min_pixels <= max_pixels, "
                f"and min_pixels at most {MAX_MIN_PIXELS}"
            )
        return replace(self, min_pixels=low, max_pixels=high)


@dataclass(frozen=True)
class ClipSettings:
    """Limits on the number of frames taken from a file, and on the pixels of a whole clip."""

    min_frames: int
    max_frames: int
    cap_pixels_per_frame: bool
    max_video_tokens: int

    @classmethod
    def read(cls, settings: Settings) -> ClipSettings:
        return cls(
            min_frames=settings.integer("min_frames", 4),
            max_frames=settings.integer("max_frames", 768),
            cap_pixels_per_frame=settings.flag("cap_pixels_per_frame", default=False),
            max_video_tokens=settings.integer("max_video_tokens", 128000, high=2**31),
        )


class Qwen2_5VLProcessor(VisionProcessor):
    """One ImageMetadata a picture or clip; a clip's time steps count as frames of its grid."""

    refused_options = ()

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> Self:
        """Read tokenizer, chat template and picture settings of a checkpoint.

        Args: config, the parsed config.json.
        Raises: ProcessorError when a file or special token is missing.
        """
        return cls(folder, config)

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        files = ProcessorFiles.read(self.folder)
        names = self.tokenizer.named_tokens
        image, video = names.get("image_token", IMAGE), names.get("video_token", VIDEO)
        self.image_token, self.video_token = image, video
        self.markers = {"image": (image,), "video": (video,)}
        self.text_markers = {}
        self.image_token_id = self.tokenizer.require_token_id(image)
        self.video_token_id = self.tokenizer.require_token_id(video)
        self.vision_token_ids = [self.image_token_id, self.video_token_id]
        self.image_settings = PatchSettings.read(files.image, IMAGE_LIMITS)
        self.video_settings = PatchSettings.read(files.video, VIDEO_LIMITS)
        self.clip_settings = ClipSettings.read(files.video)
        top = Settings("config.json", config)
        vision = top.section("vision_config") or Settings("config.json: vision_config")
        self.sizes = VisionSizes(
            vision.integer("spatial_merge_size", 2, high=16),
            vision.integer("patch_size", 14, high=256),
            vision.integer("window_size", 112),
        )
        self.rope = RopeTokens(
            self.sizes.spatial_merge_size,
            vision.number("tokens_per_second", 4),
            self.image_token_id,
            self.video_token_id,
            self.tokenizer.require_token_id(START),
        )
        self.digest = "qwen2_5vl"
        for settings in (self.image_settings, self.video_settings):
            if (settings.patch, settings.merge) != (
                self.sizes.patch_size,
                self.rope.spatial_merge_size,
            ):
                raise ProcessorError(
                    f"{self.folder}: patches of {settings.patch} pixels merged by {settings.merge} "
                    f"in the processor, {self.sizes.patch_size} by {self.rope.spatial_merge_size} "
                    "in config.json"
                )

    def check(self, request: PromptRequest, num_videos: int) -> None:
        super().check(request, num_videos)
        self.image_settings.limited(request)
        self.video_settings.limited(request)

    def encode_image(self, source: Any, request: PromptRequest) -> EncodedMedia:
        settings = self.image_settings.limited(request)
        image = self.load(source, request)
        resized = fit(image, image.size, settings)
        frames = np.repeat(to_array(resized, settings.pixels)[None], settings.step, axis=0)
        return self._encoded(frames, settings, image.size, resized.size)

    def encode_clip(self, source: Any, request: PromptRequest) -> EncodedMedia:
        settings = self.video_settings.limited(request)

        def choose(info: VideoInfo) -> np.ndarray:
            return sample_frames(info, request, self.clip_settings, settings.step)

        def prepare(frame: Image, first: tuple[int, int], count: int) -> Image:
            return fit(frame, first, self._capped(settings, count))

        clip = load_clip(source, ClipPlan(request.fps, choose, prepare, request.local_files))
        frames = np.stack([to_array(frame, settings.pixels) for frame in clip.frames])
        size = clip.frames[0].size
        seconds = float(np.float32(settings.step / clip.fps))
        return self._encoded(frames, settings, clip.source_size, size, second_per_grid=seconds)

    def _capped(self, settings: PatchSettings, count: int) -> PatchSettings:
        """Limits of one frame so that the whole clip stays within its share of tokens."""
        if not self.clip_settings.cap_pixels_per_frame:
            return settings
        total = int(self.clip_settings.max_video_tokens * settings.factor**2 * 0.9)
        share = min(settings.max_pixels, total * settings.step // count)
        return replace(settings, max_pixels=max(share, int(settings.min_pixels * 1.05)))

    def _encoded(
        self,
        frames: np.ndarray,
        settings: PatchSettings,
        source_size: tuple[int, int],
        size: tuple[int, int],
        second_per_grid: float | None = None,
    ) -> EncodedMedia:
        patches = cut_clip(frames, settings.patch, settings.merge, settings.step)
        rows, columns = size[1] // settings.patch, size[0] // settings.patch
        grid = (len(patches) // (rows * columns), rows, columns)
        count = len(patches) // settings.merge**2
        check_num_tokens(count, source_size)
        is_video = second_per_grid is not None
        token = self.video_token if is_video else self.image_token
        token_id = self.video_token_id if is_video else self.image_token_id
        return EncodedMedia(
            kind="video" if is_video else "image",
            replacement=token * count,
            units=[Unit(patches, token_id, count)],
            source_size=source_size,
            resized_size=size,
            grid=grid,
            num_frames=len(frames) if is_video else 1,
            facts={"second_per_grid": 1.0 if second_per_grid is None else second_per_grid},
        )

    def make_metadata(self, item: EncodedMedia, unit: Unit, span: tuple[int, int]) -> ImageMetadata:
        pixels = unit.pixel_values
        grid = (item.grid[0], item.grid[1], item.grid[2])
        # Seconds decide a clip's positions, so its cached keys: another speed is another clip.
        identity = f"{self.digest}|{grid}|{item.facts['second_per_grid']}"
        return Qwen2_5VLImage(
            *span,
            pixels,
            image_hash(pixels, identity),
            grid,
            item.kind == "video",
            item.facts["second_per_grid"],
        )

    def arrays(self, media: Sequence[EncodedMedia]) -> dict[str, np.ndarray]:
        """Patches float32 [P, C*tp*p*p] and grids int64 [N, 3], of pictures and of clips."""
        out: dict[str, np.ndarray] = {}
        names = {"image": "pixel_values", "video": "pixel_values_videos"}
        for kind, name in names.items():
            items = [item for item in media if item.kind == kind]
            if items:
                out[name] = np.concatenate([item.units[0].pixel_values for item in items])
                out[f"{kind}_grid_thw"] = np.array([item.grid for item in items], np.int64)
        seconds = [item.facts["second_per_grid"] for item in media if item.kind == "video"]
        if seconds:
            out["second_per_grid_ts"] = np.array(seconds, np.float32)
        return out

    def make_context(self, processed: Any, fields: dict[str, Any]) -> TextContext:
        images = [image for image in processed.images if isinstance(image, Qwen2_5VLImage)]
        context = Qwen2_5VLTextAndVisionContext(
            **fields,
            vision_token_ids=list(self.vision_token_ids),
            images=processed.images,
            rope=self.rope,
            vision_data=VisionData(tuple(images), self.sizes) if images else None,
        )
        context.refresh_positions()
        return context


def fit(image: Image, size: tuple[int, int], settings: PatchSettings) -> Image:
    """The picture at the size that a picture of the given (width, height) gets.

    Raises: InputError for a ratio of the sides above 200, or, without resizing, for sides that are
    not whole blocks.
    """
    if settings.pixels.do_resize:
        return resize(image, *smart_size(size, settings), settings.pixels)
    if image.width % settings.factor or image.height % settings.factor:
        raise InputError(
            f"a picture of {image.size} pixels; without resizing both sides must be multiples "
            f"of {settings.factor}"
        )
    return image


def smart_size(size: tuple[int, int], settings: PatchSettings) -> tuple[int, int]:
    """(width, height) in whole blocks, within the limits, the ratio kept as closely as possible.

    Raises: InputError for a ratio of the sides above 200.
    """
    width, height = size
    factor = settings.factor
    if max(size) / min(size) > MAX_RATIO:
        raise InputError(
            f"a picture of {width}x{height} pixels: the longer side is more than {MAX_RATIO} "
            "times the shorter; crop it"
        )
    new_w, new_h = round(width / factor) * factor, round(height / factor) * factor
    if new_w * new_h > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        new_h = max(factor, math.floor(height / shrink / factor) * factor)
        new_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_w * new_h < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        new_h = math.ceil(height * grow / factor) * factor
        new_w = math.ceil(width * grow / factor) * factor
    return max(new_w, factor), max(new_h, factor)


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
