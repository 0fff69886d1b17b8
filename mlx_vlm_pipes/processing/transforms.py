"""Pictures to numbers: resize, rescale and normalise, cut into patches.

Bit for bit what the PIL processors of transformers 5 compute. Their arithmetic per pixel (float64
product with the scale, rounded to float32; then float32 subtraction and division) has only 256
possible inputs a channel, so it is tabulated.
Source: transformers image_transforms.py, functions rescale and normalize.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.processing.settings import PixelSettings

if TYPE_CHECKING:
    from PIL.Image import Image


def resize(image: Image, width: int, height: int, settings: PixelSettings) -> Image:
    """An RGB image resampled to width x height pixels, with PIL's antialiasing filters."""
    from PIL.Image import Resampling

    return image.resize((width, height), resample=Resampling(settings.resample))


def require_side(frame: Image, side: int) -> Image:
    """The frame of a clip that is not resized. Raises: InputError if it is no such square."""
    if frame.size != (side, side):
        raise InputError(
            f"a frame of {frame.width}x{frame.height} pixels; without resizing (do_resize false) "
            f"frames must have {side}x{side}"
        )
    return frame


def to_array(image: Image, settings: PixelSettings) -> np.ndarray:
    """RGB image -> float32 [3, H, W], rescaled and normalised as the settings say."""
    pixels = np.asarray(image)  # [H, W, 3] uint8
    table = _value_table(settings)
    out = np.empty((3, *pixels.shape[:2]), np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[..., channel], out=out[channel], mode="clip")
    return out


@lru_cache(maxsize=16)
def _value_table(settings: PixelSettings) -> np.ndarray:
    """float32 [3, 256]: what each byte of each channel becomes."""
    values = np.arange(256, dtype=np.float32)
    if settings.do_rescale:
        values = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    table = np.repeat(values[None], 3, axis=0)
    if settings.do_normalize:
        mean = np.array(settings.mean, np.float32)[:, None]
        std = np.array(settings.std, np.float32)[:, None]
        table = (table - mean) / std
    return table


def cut_tiles(tiles: Any, patch: int) -> Any:
    """[N, 3, S, S] -> [N, S/p, S/p, 3, p, p], a view in the same dtype. p must divide S.

    Takes and gives an array of numpy, or of MLX.
    """
    count, channels, height, width = tiles.shape
    grid = tiles.reshape(count, channels, height // patch, patch, width // patch, patch)
    return grid.transpose(0, 2, 4, 1, 3, 5)


def join_tiles(patches: np.ndarray) -> np.ndarray:
    """[N, R, C, 3, p, p] -> [N, 3, R*p, C*p], what `cut_tiles` has cut."""
    count, rows, columns, channels, height, width = patches.shape
    joined = patches.transpose(0, 3, 1, 4, 2, 5)
    return joined.reshape(count, channels, rows * height, columns * width)


def cut_clip(frames: np.ndarray, patch: int, merge: int, step: int) -> np.ndarray:
    """Frames to rows of patches, in blocks of merge x merge patches.

    Args: frames float32 [T, 3, H, W], H and W multiples of patch * merge; step, frames in a patch.
    Returns: [t*h*w, 3*step*patch*patch], ordered (time; block row; block column; row in block;
    column in block), each vector (channel, time, y, x). A short last step repeats its last frame.
    Source: transformers video_processing_qwen2_vl.py, patchify.
    """
    missing = -len(frames) % step
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    count, channels, height, width = frames.shape
    rows, columns = height // patch, width // patch
    blocks = frames.reshape(
        count // step, step, channels, rows // merge, merge, patch, columns // merge, merge, patch
    )
    blocks = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(count // step * rows * columns, channels * step * patch * patch)


def pad_to_common_size(images: list[np.ndarray]) -> np.ndarray:
    """[3, h_i, w_i] each -> [N, 3, max h, max w], zeros at the bottom and on the right."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    out = np.zeros((len(images), 3, height, width), images[0].dtype)
    for row, image in zip(out, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return out


def image_hash(pixels: np.ndarray, digest: str) -> int:
    """A 63-bit content hash of processed pixels.

    Equal only for equal dtype, shape, bytes and processor settings (digest), so that two families
    or two resolutions never share a cache entry. Source: sha256.
    """
    state = hashlib.sha256(f"{digest}|{pixels.dtype.str}|{pixels.shape}|".encode())
    state.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(state.digest()[:8], "big") >> 1
