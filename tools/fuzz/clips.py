"""Clips of InternVL and SmolVLM as transformers' video processors make them, by Pillow.

Those need torchvision; the arithmetic is that of the picture processors for one tile a frame.
Source: processing_internvl.py, processing_smolvlm.py and video_processing_smolvlm.py.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
from PIL import Image

from tools.make_fixtures.case import Json, Prompt
from tools.make_fixtures.families.family import Arrays, Pictures

_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
NUMBERS = _WORDS.split(" ")
Expand = Callable[[Any, str, Prompt, Pictures], tuple[str, Arrays]]


def pixels_of(frame: Image.Image, settings: Json, sizes: list[tuple[int, int]]) -> np.ndarray:
    """float32 [3, H, W] of a frame that is resized to each of `sizes` (width, height) in turn."""
    frame = frame.convert("RGB")
    for size in sizes if settings["do_resize"] else []:
        frame = frame.resize(size, Image.Resampling(settings["resample"]))
    pixels = np.asarray(frame, np.float32)
    if settings["do_rescale"]:
        pixels = pixels * np.float32(settings["rescale_factor"])
    if settings["do_normalize"]:
        mean, std = (np.array(settings[k], np.float32) for k in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
    return pixels.transpose(2, 0, 1)


def internvl_clips(
    family: Any, text: str, prompt: Prompt, pictures: Pictures
) -> tuple[str, Arrays]:
    """Tiles in the order in which pictures and clips stand in the text."""
    side, pieces, tiles = family.tile_px, [], []
    images, videos = iter(pictures.images), iter(pictures.videos)
    run = "<img>" + family.placeholder * family.num_tile_tokens + "</img>"
    for piece in _split(text, (family.placeholder, "<video>")):
        if piece == family.placeholder:
            one = Pictures([next(images)], [])
            replaced, arrays = family.expand(piece, prompt, one)
            pieces.append(replaced)
            tiles.append(arrays["pixel_values"])
        elif piece == "<video>":
            frames = next(videos)
            pieces.append("\n".join(f"Frame{i + 1}: {run}" for i in range(len(frames))))
            says = family.video_settings()
            tiles.append(np.stack([pixels_of(f, says, [(side, side)]) for f in frames]))
        else:
            pieces.append(piece)
    return "".join(pieces), {"pixel_values": np.concatenate(tiles)}


def smolvlm_clips(family: Any, text: str, prompt: Prompt, pictures: Pictures) -> tuple[str, Arrays]:
    """Frames behind their times; `size` of the file comes before the square of the tower."""
    side, pieces, tiles = family.tile_px, [], []
    images, videos = iter(pictures.images), iter(pictures.videos)
    says = family.video_settings()
    # A nested file has a size of its own for clips, a flat one shares that of the pictures.
    size = {"longest_edge": side} if family.options.nested_processor else says["size"]
    block = family._block(0, 0)
    for piece in _split(text, ("<image>", "<video>")):
        if piece == "<image>":
            replaced, arrays = family.expand(piece, prompt, Pictures([next(images)], []))
            pieces.append(replaced)
            tiles.append(arrays["pixel_values"][0])
        elif piece == "<video>":
            frames = next(videos)
            pieces.append(_story(len(frames), prompt.fps, block))
            first = (size["width"], size["height"]) if "width" in size else None
            sizes = [first or _longest(frames[0].size, size["longest_edge"]), (side, side)]
            tiles.append(np.stack([pixels_of(f, says, sizes) for f in frames]))
        else:
            pieces.append(piece)
    pixels = np.concatenate(tiles)[None]
    mask = np.ones((*pixels.shape[:2], side, side), np.int64)
    return "".join(pieces), {"pixel_values": pixels, "pixel_attention_mask": mask}


CLIP_TEXT: dict[str, Expand] = {"internvl": internvl_clips, "smolvlm": smolvlm_clips}


def _story(count: int, fps: float, block: str) -> str:
    seconds = timedelta(seconds=int(count / fps))
    text = (
        f"You are provided the following series of {NUMBERS[count]} frames from a {seconds} "
        "[H:MM:SS] video.\n"
    )
    for i in range(count):
        text += f"\nFrame from {int(i / fps // 60):02d}:{int(i / fps % 60):02d}:{block}"
    return text + "\n\n"


def _longest(size: tuple[int, int], longest: int) -> tuple[int, int]:
    width, height = size
    ratio = width / height
    if width >= height:
        height = int(longest / ratio)
        return longest, max(height + height % 2, 1)
    width = int(longest * ratio)
    return max(width + width % 2, 1), longest


def _split(text: str, marks: tuple[str, str]) -> list[str]:
    first, second = marks
    pieces: list[str] = []
    for i, outer in enumerate(text.split(first)):
        pieces += [first] * bool(i)
        for j, inner in enumerate(outer.split(second)):
            pieces += [second] * bool(j) + [inner]
    return pieces
