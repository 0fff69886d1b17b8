"""Pixtral: a picture of any size as rows of [IMG] tokens.

Source: transformers image_processing_pil_pixtral.py and processing_pixtral.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_vlm_pipes.architectures.pixtral.facts import FACTS
from mlx_vlm_pipes.architectures.pixtral.sizes import PatchSizes
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.media.records import Cap, Tiles
from mlx_vlm_pipes.processing.base import (
    EncodedMedia,
    MediaTokens,
    VisionProcessor,
    check_num_tokens,
)
from mlx_vlm_pipes.processing.records import picture_record
from mlx_vlm_pipes.processing.settings import (
    CLIP_MEAN,
    CLIP_STD,
    PixelSettings,
    ProcessorFiles,
    Settings,
)
from mlx_vlm_pipes.processing.transforms import pad_to_common_size, resize, to_array
from mlx_vlm_pipes.processing.types import PromptRequest

BICUBIC = 3


class PixtralProcessor(VisionProcessor):
    """h x w patches of `patch_px` a picture; each row of tokens ends in a break token."""

    facts = FACTS

    def read_settings(self, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> MediaTokens:
        del overrides  # there are none
        files = ProcessorFiles.read(self.folder)
        names = files.processor
        self.image_token = names.text("image_token", "[IMG]")
        self.break_token = names.text("image_break_token", "[IMG_BREAK]")
        self.end_token = names.text("image_end_token", "[IMG_END]")
        keys = ("image_token_index", "image_token_id")
        self.image_token_id = self.agreed_token_id(self.image_token, config, *keys)
        break_id = self.tokenizer.require_token_id(self.break_token)
        self.tokenizer.require_token_id(self.end_token)
        self.pixels = PixelSettings.read(files.image, BICUBIC, CLIP_MEAN, CLIP_STD)
        self.patch_px = read_patch(files, PatchSizes.read(HuggingFaceConfig(config)).patch_size)
        self.max_size = read_size(files.image)
        return MediaTokens({"image": (self.image_token,)}, (self.image_token_id, break_id))

    @property
    def digest(self) -> str:
        return f"pixtral|{self.pixels}|{self.patch_px}|{self.max_size}"

    def check(self, request: PromptRequest, num_videos: int) -> None:
        super().check(request, num_videos)
        if num_videos:
            raise InputError(f"{self.architecture} takes no video; give frames of it as images")

    def encode_image(self, source: Any, request: PromptRequest) -> EncodedMedia:
        picture = self.load(source, request, self.pixels)
        image = resized = picture.image
        cap = None
        if self.pixels.do_resize:
            size = fitting_size(image.size, self.max_size, self.patch_px)
            resized = resize(image, *size, self.pixels)
            if excess(image.size, self.max_size) > 1:
                cap = Cap("longest_edge", max(self.max_size))
        rows, columns = resized.height // self.patch_px, resized.width // self.patch_px
        if not rows or not columns:
            raise InputError(f"a picture of {image.size} pixels is smaller than one patch")
        check_num_tokens(rows * columns, image.size)
        lines = [self.image_token * columns] * rows
        tiles = Tiles(1, 1, resized.size, (rows, columns))
        return EncodedMedia(
            replacement=self.break_token.join(lines) + self.end_token,
            token_id=self.image_token_id,
            images=[self.new_image(to_array(resized, self.pixels), rows * columns)],
            record=picture_record(picture, resized, (rows, columns), tiles, cap),
        )

    def encode_clip(self, source: Any, request: PromptRequest) -> EncodedMedia:
        raise InputError(f"{self.architecture} takes no video")

    def arrays(self, media: Sequence[EncodedMedia]) -> dict[str, np.ndarray]:
        """pixel_values float32 [N, 3, max H, max W], zero-padded; image_sizes int64 [N, 2]."""
        images = [image.pixel_values for item in media for image in item.images]
        if not images:
            return {}
        sizes = np.array([image.shape[1:] for image in images], np.int64)
        return {"pixel_values": pad_to_common_size(images), "image_sizes": sizes}


def excess(size: tuple[int, int], limit: tuple[int, int]) -> float:
    """How many times larger than the limit a picture is; both (width, height)."""
    return max(size[0] / limit[0], size[1] / limit[1])


def fitting_size(size: tuple[int, int], limit: tuple[int, int], patch: int) -> tuple[int, int]:
    """(width, height) shrunk into the limit (width, height), then up to multiples of a patch."""
    width, height = size
    ratio = excess(size, limit)
    if ratio > 1:
        # An extreme ratio floors a side to 0; one patch is the least.
        width, height = max(math.floor(width / ratio), 1), max(math.floor(height / ratio), 1)
    return math.ceil(width / patch) * patch, math.ceil(height / patch) * patch


def read_patch(files: ProcessorFiles, patch: int) -> int:
    """Side in pixels of the square that one token stands for.

    patch: of the model. Raises: ProcessorError if the processor's is another.
    """
    if isinstance(files.image.get("patch_size"), Mapping):
        for key, side in files.image.edges("patch_size", ("height", "width")).items():
            Settings(files.image.source, {key: side}).agree(key, patch)
    else:
        files.image.agree("patch_size", patch)
    files.processor.agree("patch_size", patch)
    files.processor.agree("spatial_merge_size", 1)
    return patch


def read_size(settings: Settings) -> tuple[int, int]:
    """The largest (width, height) a picture may have."""
    edges = settings.edges("size", ("longest_edge", "height", "width"))
    if "longest_edge" in edges:
        return edges["longest_edge"], edges["longest_edge"]
    if "height" in edges and "width" in edges:
        return edges["width"], edges["height"]
    return 1024, 1024
