"""Windows, positions and the context of Qwen2.5-VL. Numpy only.

Source: transformers modeling_qwen2_5_vl.py (get_rope_index, get_window_index); text after a clip
continues behind the largest position, as in the original code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlx_vlm_pipes.architectures.qwen2_5vl.sizes import VisionSizes
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.processing.grids import (
    Grid,
    GridContext,
    GridData,
    GridImage,
    grid_positions,
    longest,
)


@dataclass(frozen=True)
class Qwen2_5VLImage(GridImage):
    """One picture or clip. second_per_grid: seconds of a clip that one step of t covers."""

    second_per_grid: float = 1.0


@dataclass(frozen=True)
class RopeTokens:
    """What decoder positions depend on besides tokens and grids."""

    spatial_merge_size: int
    tokens_per_second: float
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int

    def positions(self, image: Qwen2_5VLImage) -> np.ndarray:
        """int64 [3, m]: time, row and column of each row that a picture or clip becomes."""
        interval = np.float32(0)
        if image.is_video:
            interval = np.float32(self.tokens_per_second) * np.float32(image.second_per_grid)
        return grid_positions(image.grid_thw, self.spatial_merge_size, float(interval))


def window_index(grids: Sequence[Grid], sizes: VisionSizes) -> tuple[np.ndarray, np.ndarray]:
    """The order of merged patches in the windowed layers, and the windows' boundaries.

    Returns: int64 [P/u], u = merge**2; uint32 [windows + 1], in patches, strictly increasing.
    """
    merge, side = sizes.spatial_merge_size, max(sizes.window_side, 1)
    order, lengths, offset = [], [], 0
    for t, h, w in grids:
        rows, columns = h // merge, w // merge
        numbers = np.arange(t * rows * columns).reshape(t, rows, columns)
        padding = ((0, 0), (0, -rows % side), (0, -columns % side))
        padded = np.pad(numbers, padding, constant_values=-1)
        cut = padded.reshape(t, padded.shape[1] // side, side, padded.shape[2] // side, side)
        windows = cut.transpose(0, 1, 3, 2, 4).reshape(-1, side * side)
        lengths.append((windows >= 0).sum(axis=1) * merge**2)
        order.append(windows[windows >= 0] + offset)
        offset += t * rows * columns
    starts = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
    return np.concatenate([np.zeros(0, np.int64), *order]), starts.astype(np.uint32)


@dataclass(frozen=True)
class VisionData(GridData[Qwen2_5VLImage]):
    """All pictures and clips of a request, in token order, and the tables of the vision tower.

    The same tables for some of the images: VisionData(images[i:j], sizes).
    """

    sizes: VisionSizes

    @property
    def merge(self) -> int:
        return self.sizes.spatial_merge_size

    @property
    def second_per_grid_ts(self) -> np.ndarray:
        """float32 [number of clips]."""
        return np.array([i.second_per_grid for i in self.images if i.is_video], np.float32)

    @cached_property
    def _windows(self) -> tuple[np.ndarray, np.ndarray]:
        return window_index(self.grids, self.sizes)

    @property
    def window_index(self) -> np.ndarray:
        return self._windows[0]

    @property
    def cu_window_seqlens_unique(self) -> np.ndarray:
        return self._windows[1]

    @property
    def window_max_seqlen(self) -> np.ndarray:
        """uint32 [1]: patches of the longest window."""
        return longest(self.cu_window_seqlens_unique)


@dataclass(kw_only=True)
class Qwen2_5VLTextAndVisionContext(GridContext):
    """A request with its three-axis positions. vision_data: None without pictures."""

    rope: RopeTokens
    vision_data: VisionData | None = None

    @property
    def spatial_merge_size(self) -> int:
        return self.rope.spatial_merge_size

    @property
    def image_token_id(self) -> int:
        return self.rope.image_token_id

    @property
    def video_token_id(self) -> int:
        return self.rope.video_token_id

    @property
    def vision_start_token_id(self) -> int:
        return self.rope.vision_start_token_id

    @property
    def tokens_per_second(self) -> float:
        return self.rope.tokens_per_second

    def media_positions(self) -> Mapping[int, Sequence[np.ndarray]]:
        images = self.require_vision_data().images if self.images else ()
        return {
            self.rope.image_token_id: [self.rope.positions(i) for i in images if not i.is_video],
            self.rope.video_token_id: [self.rope.positions(i) for i in images if i.is_video],
        }

    def require_vision_data(self) -> VisionData:
        """Raises: InputError if there is none."""
        if self.vision_data is None:
            raise InputError(
                f"request {self.request_id!r} has pictures to encode but no vision_data"
            )
        return self.vision_data
