"""Prompts of the Idefics3 and SmolVLM fixtures as the processor would hand them over."""

from pathlib import Path

import numpy as np

from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from tests.architectures.driving import load
from tests.fixtures_helper import cases, reference

CASES = [*cases("idefics3"), *cases("smolvlm")]
PROMPTS = [(path, p["name"]) for path in CASES for p in reference(path)[0]["prompts"]]


def context(ids: np.ndarray, frames: np.ndarray, token: int) -> TextAndVisionContext:
    """A request whose image tokens are shared out equally among frames [N, 3, S, S]."""
    where = np.flatnonzero(ids == token)
    runs = where.reshape(len(frames), -1) if len(frames) else []
    images = [
        ImageMetadata(int(run[0]), int(run[-1]) + 1, frame)
        for run, frame in zip(runs, frames, strict=True)
    ]
    return TextAndVisionContext(
        max_length=2048, tokens=TokenBuffer(ids), vision_token_ids=[token], images=images
    )


def stored(path: Path, prompt: str) -> TextAndVisionContext:
    arrays = reference(path)[1]
    frames = np.zeros((0, 3, 1, 1), np.float32)
    if f"{prompt}/pixel_values" in arrays:
        batch = arrays[f"{prompt}/pixel_values"]
        frames = batch.reshape(-1, *batch.shape[2:])
    return context(arrays[f"{prompt}/input_ids"], frames, load(path).model_config.image_token_id)
