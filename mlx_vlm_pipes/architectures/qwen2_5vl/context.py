"""Positions and window tables of Qwen2.5-VL, and the context that carries them. Numpy only.

Source: transformers modeling_qwen2_5_vl.py (get_rope_index, get_window_index, rot_pos_emb); text
after a clip continues behind the largest position, as in the original code (spec, section 15).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlx_vlm_pipes.contexts import ImageMetadata, MRopeContext
from mlx_vlm_pipes.errors import InputError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Qwen2_5VLImage(ImageMetadata):
    """One picture or clip: patches float32 [t*h*w, C*tp*p*p] and its grid (t, h, w) in patches.

    second_per_grid: seconds of a clip that one step of t covers.
    """

    grid_thw: Grid = (1, 1, 1)
    is_video: bool = False
    second_per_grid: float = 1.0


@dataclass(frozen=True)
class VisionSizes:
    """What the tables depend on. window_size and patch_size in pixels."""

    spatial_merge_size: int = 2
    patch_size: int = 14
    window_size: int = 112

    @property
    def window_side(self) -> int:
        """Merged patches along a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True)
class RopeTokens:
    """What decoder positions depend on besides tokens and grids."""

    spatial_merge_size: int
    tokens_per_second: float
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int


def vision_position_ids(grids: Sequence[Grid], merge: int) -> np.ndarray:
    """int64 [P, 2]: row and column of each patch, in blocks of merge x merge, for each t."""
    parts = []
    for t, h, w in grids:
        rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
        blocks = [
            axis.reshape(h // merge, merge, w // merge, merge).transpose(0, 2, 1, 3).reshape(-1)
            for axis in (rows, columns)
        ]
        parts.append(np.tile(np.stack(blocks, axis=-1), (t, 1)))
    return np.concatenate([np.zeros((0, 2), np.int64), *parts]).astype(np.int64)


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


def cu_seqlens(grids: Sequence[Grid]) -> np.ndarray:
    """uint32 [sum of t + 1]: boundaries, in patches, of every frame of every picture and clip."""
    steps = [h * w for t, h, w in grids for _ in range(t)]
    return np.array([0, *steps], np.int64).cumsum().astype(np.uint32)


def get_rope_index(
    input_ids: np.ndarray,
    tokens: RopeTokens,
    image_grid_thw: Sequence[Grid] = (),
    video_grid_thw: Sequence[Grid] = (),
    second_per_grid_ts: Sequence[float] = (),
    attention_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Time, height and width position of every token.

    Args: input_ids [n]; grids in token order, each of its kind; second_per_grid_ts, one for each
    clip (1.0 where missing); attention_mask [n], 0 for padding, whose positions are 1.
    Returns: int64 [3, n]; rope_delta = 1 + largest position - number of tokens.
    Raises: InputError when a grid finds no run of placeholders. Placeholder ids beyond the given
    grids are plain text.
    """
    input_ids = np.asarray(input_ids).reshape(-1)
    if attention_mask is not None:
        kept = np.asarray(attention_mask).reshape(-1).astype(bool)
        inner, delta = get_rope_index(
            input_ids[kept], tokens, image_grid_thw, video_grid_thw, second_per_grid_ts
        )
        positions = np.ones((3, len(input_ids)), np.int64)
        positions[:, kept] = inner
        return positions, delta
    runs = _media_runs(input_ids, tokens, image_grid_thw, video_grid_thw, second_per_grid_ts)
    parts, here, end = [np.zeros((3, 0), np.int64)], 0, 0
    for start, grid in runs:
        text = np.arange(start - end) + here  # [start - end]
        here += start - end
        parts += [np.broadcast_to(text, (3, len(text))), grid + here]
        here += int(grid.max()) + 1
        end = start + grid.shape[1]
    tail = np.arange(len(input_ids) - end) + here
    positions = np.concatenate([*parts, np.broadcast_to(tail, (3, len(tail)))], axis=1)
    largest = int(positions.max()) if positions.size else -1
    return positions.astype(np.int64), largest + 1 - len(input_ids)


def _media_runs(
    input_ids: np.ndarray,
    tokens: RopeTokens,
    image_grids: Sequence[Grid],
    video_grids: Sequence[Grid],
    seconds: Sequence[float],
) -> list[tuple[int, np.ndarray]]:
    """(first token, relative positions [3, m]) of every picture and clip, by first token."""
    runs = []
    for kind, grids in ((tokens.image_token_id, image_grids), (tokens.video_token_id, video_grids)):
        spots, used = np.flatnonzero(input_ids == kind), 0
        for i, grid in enumerate(grids):
            interval = np.float32(0)
            if kind == tokens.video_token_id:
                second = np.float32(seconds[i] if i < len(seconds) else 1.0)
                interval = np.float32(tokens.tokens_per_second) * second
            positions = _grid_positions(grid, tokens.spatial_merge_size, interval)
            count = positions.shape[1]
            run = spots[used : used + count]
            if len(run) < count or run[-1] - run[0] != count - 1:
                raise InputError(
                    f"grid {tuple(grid)} needs a run of {count} tokens {kind}; "
                    f"{len(run)} are left in the prompt"
                )
            runs.append((int(run[0]), positions))
            used += count
    return sorted(runs, key=lambda run: run[0])


def _grid_positions(grid: Grid, merge: int, interval: np.float32) -> np.ndarray:
    """int64 [3, t*h'*w']: time, row and column of merged patches; time in float32, truncated."""
    t, h, w = (int(n) for n in grid)
    times = (np.arange(t, dtype=np.float32) * interval).astype(np.int64)
    axes = np.meshgrid(times, np.arange(h // merge), np.arange(w // merge), indexing="ij")
    return np.stack(axes).reshape(3, -1)


@dataclass(frozen=True)
class VisionData:
    """All pictures and clips of a request, in token order, and the tables of the vision tower.

    The tables describe concatenated_pixel_values; they are made when first read. The same tables
    for some of the images: VisionData(images[i:j], sizes).
    """

    images: tuple[Qwen2_5VLImage, ...]
    sizes: VisionSizes

    @property
    def grids(self) -> list[Grid]:
        return [image.grid_thw for image in self.images]

    @property
    def image_grid_thw(self) -> np.ndarray:
        """int64 [number of still pictures, 3]."""
        return _grid_array([i.grid_thw for i in self.images if not i.is_video])

    @property
    def video_grid_thw(self) -> np.ndarray:
        """int64 [number of clips, 3]."""
        return _grid_array([i.grid_thw for i in self.images if i.is_video])

    @property
    def second_per_grid_ts(self) -> np.ndarray:
        """float32 [number of clips]."""
        return np.array([i.second_per_grid for i in self.images if i.is_video], np.float32)

    @cached_property
    def concatenated_pixel_values(self) -> np.ndarray:
        """float32 [P, C*tp*p*p]."""
        return np.concatenate([image.pixel_values for image in self.images])

    @cached_property
    def vision_position_ids(self) -> np.ndarray:
        return vision_position_ids(self.grids, self.sizes.spatial_merge_size)

    @cached_property
    def _windows(self) -> tuple[np.ndarray, np.ndarray]:
        return window_index(self.grids, self.sizes)

    @property
    def window_index(self) -> np.ndarray:
        return self._windows[0]

    @property
    def cu_window_seqlens_unique(self) -> np.ndarray:
        return self._windows[1]

    @cached_property
    def cu_seqlens(self) -> np.ndarray:
        return cu_seqlens(self.grids)

    @property
    def max_seqlen(self) -> np.ndarray:
        """uint32 [1]: patches of the longest frame."""
        return _longest(self.cu_seqlens)

    @property
    def window_max_seqlen(self) -> np.ndarray:
        """uint32 [1]: patches of the longest window."""
        return _longest(self.cu_window_seqlens_unique)

    @property
    def max_grid_size(self) -> np.ndarray:
        """int32 scalar: the largest h or w."""
        return np.array(max(max(h, w) for _, h, w in self.grids), np.int32)


@dataclass(kw_only=True)
class Qwen2_5VLTextAndVisionContext(MRopeContext):
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

    def refresh_positions(self) -> None:
        """Recompute positions and rope_delta over all tokens, generated ones included.

        Raises: InputError if the tokens no longer hold the placeholders.
        """
        data = self.vision_data
        media = () if data is None else data.images
        self.decoder_position_ids, self.rope_delta = get_rope_index(
            self.tokens.all,
            self.rope,
            [image.grid_thw for image in media if not image.is_video],
            [image.grid_thw for image in media if image.is_video],
            [image.second_per_grid for image in media if image.is_video],
        )

    def require_pixels(self) -> None:
        """Raises: InputError for a request whose pictures came without their tables."""
        if self.vision_data is None:
            raise InputError(
                f"request {self.request_id!r} has pictures to encode but no vision_data"
            )


def _grid_array(grids: Sequence[Grid]) -> np.ndarray:
    return np.array(grids, np.int64).reshape(-1, 3)


def _longest(boundaries: np.ndarray) -> np.ndarray:
    return np.array([np.diff(boundaries).max()], np.uint32)
