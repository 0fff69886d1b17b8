"""Pictures and clips of any size in whole blocks of patches: settings, sizes, limits.

Source: transformers image_processing_pil_qwen2_vl.py and video_processing_qwen2_vl.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.media.records import Cap
from mlx_vlm_pipes.processing.settings import PixelSettings, Settings
from mlx_vlm_pipes.processing.transforms import resize
from mlx_vlm_pipes.processing.types import PromptRequest

if TYPE_CHECKING:
    from PIL.Image import Image

BICUBIC = 3
MAX_RATIO = 200
MAX_MIN_PIXELS = 2**24


@dataclass(frozen=True)
class PatchDefaults:
    """What a family takes where its files say nothing. min_pixels, max_pixels: of one picture."""

    min_pixels: int
    max_pixels: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


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
    def read(cls, settings: Settings, defaults: PatchDefaults) -> PatchSettings:
        """Raises: ProcessorError for values of a wrong type or beyond any model."""
        size = settings.edges("size", ("shortest_edge", "longest_edge", "min_pixels", "max_pixels"))
        low = size.get("shortest_edge", size.get("min_pixels", defaults.min_pixels))
        high = size.get("longest_edge", size.get("max_pixels", defaults.max_pixels))
        return cls(
            pixels=PixelSettings.read(settings, BICUBIC, defaults.mean, defaults.std),
            min_pixels=settings.integer(
                "min_pixels", min(low, MAX_MIN_PIXELS), high=MAX_MIN_PIXELS
            ),
            max_pixels=settings.integer("max_pixels", high, high=2**40),
            patch=settings.integer("patch_size", defaults.patch, high=256),
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
    def read(cls, settings: Settings, max_video_tokens: int) -> ClipSettings:
        """Args: max_video_tokens, what the family takes where the file says nothing."""
        return cls(
            min_frames=settings.integer("min_frames", 4),
            max_frames=settings.integer("max_frames", 768),
            cap_pixels_per_frame=settings.flag("cap_pixels_per_frame", default=False),
            max_video_tokens=settings.integer("max_video_tokens", max_video_tokens, high=2**31),
        )


def fit(image: Image, size: tuple[int, int], settings: PatchSettings, frames: int = 1) -> Image:
    """The picture at the size that a picture of the given (width, height) gets.

    frames: as for `smart_size`. Raises: InputError for a ratio of the sides above 200, or, without
    resizing, for sides that are not whole blocks.
    """
    if settings.pixels.do_resize:
        return resize(image, *smart_size(size, settings, frames), settings.pixels)
    if image.width % settings.factor or image.height % settings.factor:
        raise InputError(
            f"a picture of {image.size} pixels; without resizing both sides must be multiples "
            f"of {settings.factor}"
        )
    return image


def smart_size(size: tuple[int, int], settings: PatchSettings, frames: int = 1) -> tuple[int, int]:
    """(width, height) in whole blocks; arguments and errors as `capped_size`."""
    return capped_size(size, settings, frames)[0]


def cap_of(size: tuple[int, int], settings: PatchSettings, frames: int = 1) -> Cap | None:
    """The limit that decided the size of a picture; arguments and errors as `capped_size`."""
    return capped_size(size, settings, frames)[1] if settings.pixels.do_resize else None


def capped_size(
    size: tuple[int, int], settings: PatchSettings, frames: int = 1
) -> tuple[tuple[int, int], Cap | None]:
    """(width, height) in whole blocks, within the limits, the ratio kept as closely as possible.

    The limit that decided it comes with it, None where the size is the picture's own.

    frames: of a clip whose limits count the pixels of all its frames; 1 where they count those of
    one. Raises: InputError for a ratio of the sides above 200.
    """
    width, height = size
    factor = settings.factor
    if max(size) / min(size) > MAX_RATIO:
        raise InputError(
            f"a picture of {width}x{height} pixels: the longer side is more than {MAX_RATIO} "
            "times the shorter; crop it"
        )
    whole = 1 if frames == 1 else round(frames / settings.step) * settings.step
    new_w, new_h = round(width / factor) * factor, round(height / factor) * factor
    cap = None
    if whole * new_w * new_h > settings.max_pixels:
        cap = Cap("max_pixels", settings.max_pixels)
        shrink = math.sqrt(frames * height * width / settings.max_pixels)
        new_h = max(factor, math.floor(height / shrink / factor) * factor)
        new_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif whole * new_w * new_h < settings.min_pixels:
        cap = Cap("min_pixels", settings.min_pixels)
        grow = math.sqrt(settings.min_pixels / (frames * height * width))
        new_h = math.ceil(height * grow / factor) * factor
        new_w = math.ceil(width * grow / factor) * factor
    return (max(new_w, factor), max(new_h, factor)), cap
