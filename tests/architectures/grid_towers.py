"""Weights and pixels that need no file, for towers that read pictures as grids of patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_vlm_pipes.processing.grids import Grid
from tests.device import bar

GRIDS = [(1, 6, 10), (2, 4, 4), (1, 10, 2)]


def wave(name: str, shape: tuple[int, ...]) -> mx.array:
    """A weight: a sine, shifted by the letters of the name."""
    values = np.sin(np.arange(np.prod(shape)) * 0.7 + sum(map(ord, name)))
    is_norm = ("norm" in name or "ln_q" in name) and name.endswith("weight")
    values = values * (0.3 if len(shape) > 1 else 0.1) + is_norm
    return mx.array(values.reshape(shape).astype(np.float32))


def fill_with_waves(model: nn.Module, spelled: Callable[[str], str] = str) -> None:
    """spelled: the names by which the stored numbers were made."""
    named = [
        (name, wave(spelled(name), value.shape))  # pyright: ignore[reportAttributeAccessIssue]  # arrays
        for name, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(named))  # pyright: ignore[reportArgumentType]  # a dict


def pixels(grids: Sequence[Grid]) -> np.ndarray:
    """float32 [P, 24]: patches of 2 x 2 pixels, 2 frames, 3 channels."""
    count = sum(t * h * w for t, h, w in grids)
    return np.cos(np.arange(count * 24) * 0.37).reshape(count, 24).astype(np.float32)


def check_frames_are_apart(encode: Callable[[np.ndarray, list[Grid]], mx.array]) -> None:
    """Pictures and frames that are encoded together get the rows that they get alone."""
    values, begin, alone = pixels(GRIDS), 0, []
    for t, h, w in GRIDS:
        for _ in range(t):
            end = begin + h * w
            alone.append(np.array(encode(values[begin:end], [(1, h, w)])))
            begin = end
    together = np.array(encode(values, GRIDS))
    np.testing.assert_allclose(np.concatenate(alone), together, atol=bar(1e-5))
