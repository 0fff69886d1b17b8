"""How far a converted model is from its source: next-token distributions on one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_pipes.errors import InputError, ProcessorError

PROBE = (
    "Describe the picture: its shapes and colours, what lies above what, and what you would call "
    "it. Then count the objects, and say in one sentence where a picture like this may come from."
)
SIDE = 224


@dataclass(frozen=True)
class Difference:
    """Means over the prompt's text positions. KL of source to result, in nats."""

    mean_kl: float
    same_top: float  # share of positions with the same likeliest token
    positions: int
    with_image: bool


def probe_image() -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]: a gradient with a disc, a square and a ring; always the same."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    picture = np.stack([255 - y // 2, 190 + x // 8, 150 + (x + y) // 8], axis=-1)
    disc = np.hypot(x - 70, y - 80)
    picture[disc < 40] = (210, 40, 40)
    picture[(disc > 50) & (disc < 54)] = (30, 30, 30)
    picture[130:190, 120:200] = (40, 70, 200)
    return picture.clip(0, 255).astype(np.uint8)


def text_logits(folder: Path, adapter: str | Path | None = None) -> tuple[np.ndarray, bool]:
    """Logits float32 [n, V] of a model at the probe's text positions, and whether it saw a picture.

    Loads the model and lets it go.
    """
    from mlx_vlm_pipes.loading import load

    pipe = load(folder, adapter=adapter)
    try:
        images: list[Any] = [probe_image()] if hasattr(pipe.processor, "encode_image") else []
        options: dict[str, Any] = {}
        try:
            prompt = pipe.encode(PROBE, images)
        except ProcessorError:  # no chat template: a base model
            if images:
                raise
            options = {"raw": True}
            prompt = pipe.encode(PROBE, images, raw=True)
        logits = pipe.logits(PROBE, images, **options)
        keep = np.ones(len(prompt.input_ids), bool)
        for image in prompt.images:
            keep[image.start_idx : image.end_idx - 1] = False
        return logits[keep], bool(images)
    finally:
        pipe.close()


def compare(source: np.ndarray, result: np.ndarray, *, with_image: bool) -> Difference:
    """Args: logits [n, V] of both, at the same positions. Raises: InputError for other shapes."""
    if source.shape != result.shape:
        raise InputError(f"logits {source.shape} and {result.shape} cannot be compared")
    kl = 0.0
    for old, new in zip(source, result, strict=True):
        old_log, new_log = _log_softmax(old), _log_softmax(new)
        kl += float(np.sum(np.exp(old_log) * (old_log - new_log)))
    same = float(np.mean(source.argmax(axis=-1) == result.argmax(axis=-1)))
    return Difference(max(kl / max(len(source), 1), 0.0), same, len(source), with_image)


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row.astype(np.float64) - row.max()
    return shifted - np.log(np.exp(shifted).sum())
