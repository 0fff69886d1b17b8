"""Prompts of the Pixtral fixtures as the processor would hand them over."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from tests.architectures.driving import load
from tests.fixtures_helper import cases, reference

CASES = cases("pixtral")
PROMPTS = [(path, p["name"]) for path in CASES for p in reference(path)[0]["prompts"]]


def context(
    ids: np.ndarray, images: Sequence[np.ndarray], token: int, patch_size: int
) -> TextAndVisionContext:
    """A request whose image tokens belong to images [3, H, W], one for each patch."""
    where, parts = np.flatnonzero(ids == token), []
    for pixels in images:
        count = (pixels.shape[1] // patch_size) * (pixels.shape[2] // patch_size)
        own, where = where[:count], where[count:]
        parts.append(ImageMetadata(int(own[0]), int(own[-1]) + 1, pixels))
    assert not len(where)
    return TextAndVisionContext(
        max_length=4096, tokens=TokenBuffer(ids), vision_token_ids=[token], images=parts
    )


def stored(path: Path, prompt: str) -> TextAndVisionContext:
    arrays, config = reference(path)[1], load(path).model_config
    images = []
    if f"{prompt}/pixel_values" in arrays:
        padded, sizes = arrays[f"{prompt}/pixel_values"], arrays[f"{prompt}/image_sizes"]
        images = [p[:, :h, :w] for p, (h, w) in zip(padded, sizes, strict=True)]
    ids = arrays[f"{prompt}/input_ids"]
    return context(ids, images, config.image_token_index, config.patch_size)
