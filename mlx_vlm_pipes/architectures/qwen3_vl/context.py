"""Places and positions of Qwen3-VL, and the context that carries them. Numpy only.

Every frame of a clip is a picture of its own, behind its time as text: positions count no time.
Source: transformers modeling_qwen3_vl.py (get_rope_index) and vision_utils.py
(get_vision_interpolation_indices_and_weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlx_vlm_pipes.architectures.qwen3_vl.sizes import VisionSizes
from mlx_vlm_pipes.processing.grids import (
    Grid,
    GridData,
    GridImage,
    UntimedContext,
    vision_position_ids,
)


def interpolation(grids: Sequence[Grid], sizes: VisionSizes) -> tuple[np.ndarray, np.ndarray]:
    """Where each patch lies in the learned table, whose corners are the picture's.

    Returns: the four places around it, int32 [P, 4], and their shares, float32 [P, 4].
    """
    spots = vision_position_ids(grids, sizes.spatial_merge_size)
    extents = [np.broadcast_to((h, w), (t * h * w, 2)) for t, h, w in grids]
    last = np.concatenate([np.zeros((0, 2), np.int64), *extents]) - 1
    top = np.float32(sizes.table_side - 1)
    source = spots.astype(np.float32) * top / np.maximum(last, 1).astype(np.float32)
    low = np.floor(source)  # [P, 2]
    step = np.arange(2, dtype=np.float32)
    shares = 1 - np.abs((source - low)[:, :, None] - step)  # [P, 2, 2]
    places = np.clip(low[:, :, None] + step, 0, top).astype(np.int32)
    indices = places[:, 0, :, None] * sizes.table_side + places[:, 1, None, :]
    weights = shares[:, 0, :, None] * shares[:, 1, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4)


@dataclass(frozen=True)
class VisionData(GridData[GridImage]):
    """Pictures and frames in token order, and the tables of the vision tower."""

    sizes: VisionSizes

    @property
    def merge(self) -> int:
        return self.sizes.spatial_merge_size

    @cached_property
    def interpolation(self) -> tuple[np.ndarray, np.ndarray]:
        """As the function: int32 [P, 4] and float32 [P, 4]."""
        return interpolation(self.grids, self.sizes)


@dataclass(kw_only=True)
class Qwen3VLTextAndVisionContext(UntimedContext):
    """A request with its three-axis positions; every frame of a clip is an image of one step."""
