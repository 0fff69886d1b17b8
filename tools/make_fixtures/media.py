"""Pictures and clips drawn from their descriptions, written once per folder."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .case import Clip, Picture


def draw(spec: Picture) -> Image.Image:
    """The picture in its mode; RGBA gets an alpha that rises from top to bottom."""
    rng = np.random.RandomState(1000 + spec.seed)
    x = np.linspace(0, 1, spec.width)[None, :].repeat(spec.height, 0)
    y = np.linspace(0, 1, spec.height)[:, None].repeat(spec.width, 1)
    base = _KINDS[spec.kind](spec, rng, x, y)
    picture = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    if spec.mode == "RGBA":
        picture.putalpha(Image.fromarray((55 + 200 * y).astype(np.uint8)))
        return picture
    return picture.convert(spec.mode)


def _gradient(spec: Picture, rng: np.random.RandomState, x: np.ndarray, y: np.ndarray):
    mix = rng.uniform(0.2, 1.0, (3, 3))
    return np.stack([255 * (m[0] * x + m[1] * y + m[2] * x * y) / m.sum() for m in mix], -1)


def _checker(spec: Picture, rng: np.random.RandomState, x: np.ndarray, y: np.ndarray):
    cell = 5 + spec.seed % 11
    board = (np.arange(spec.width)[None] // cell + np.arange(spec.height)[:, None] // cell) % 2
    dark, light = rng.randint(0, 120, 3), rng.randint(130, 256, 3)
    return np.where(board[..., None] == 0, dark, light) * (0.6 + 0.4 * x[..., None])


def _clouds(spec: Picture, rng: np.random.RandomState, x: np.ndarray, y: np.ndarray):
    grid = rng.randint(0, 256, (6, 7, 3)).astype(np.uint8)
    size = (spec.width, spec.height)
    return np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC))


def _shapes(spec: Picture, rng: np.random.RandomState, x: np.ndarray, y: np.ndarray):
    shade = np.stack([60 + 120 * x, 200 - 150 * y, 90 + 100 * x * y], -1)
    picture = Image.fromarray(shade.astype(np.uint8))
    pen, w, h = ImageDraw.Draw(picture), spec.width, spec.height
    for i in range(9):
        x0, y0 = rng.randint(0, max(2, w - 4)), rng.randint(0, max(2, h - 4))
        x1 = min(w - 1, x0 + 3 + rng.randint(0, max(1, w // 2)))
        y1 = min(h - 1, y0 + 3 + rng.randint(0, max(1, h // 2)))
        colour = tuple(int(v) for v in rng.randint(0, 256, 3))
        (pen.rectangle if i % 2 else pen.ellipse)((x0, y0, x1, y1), fill=colour)
    return np.asarray(picture)


_KINDS = {"gradient": _gradient, "checker": _checker, "clouds": _clouds, "shapes": _shapes}


def draw_clip(spec: Clip) -> list[Image.Image]:
    still = draw(Picture("gradient", spec.width, spec.height, spec.seed))
    w, h, r = spec.width, spec.height, min(spec.width, spec.height) / 5
    frames = []
    for t in range(spec.frames):
        frame = still.copy()
        pen = ImageDraw.Draw(frame)
        cx, cy = (t + 0.5) / spec.frames * w, h * (0.5 + 0.3 * math.sin(2 * t))
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(250, 30 * t % 256, 40))
        pen.rectangle((0, h - 6, w * (t + 1) // spec.frames, h - 1), fill=(10, 220, 90))
        frames.append(frame)
    return frames


def write_picture(spec: Picture, folder: Path) -> str:
    """The file's name relative to the checkpoint folder."""
    name = f"media/{spec.kind}_{spec.width}x{spec.height}_{spec.seed}_{spec.mode}.png"
    _save(draw(spec), folder / name)
    return name


def write_clip(spec: Clip, folder: Path) -> list[str]:
    """One file a frame, in order."""
    stem = f"media/clip_{spec.width}x{spec.height}_{spec.seed}"
    frames = draw_clip(spec)
    names = [f"{stem}_{i:02d}.png" for i in range(len(frames))]
    for frame, name in zip(frames, names, strict=True):
        _save(frame, folder / name)
    return names


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    picture.save(path, optimize=True)
