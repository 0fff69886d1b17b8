"""Pictures and clips as grids of patches, and positions on three axes. Numpy only.

A grid is (t, h, w) in patches; merge x merge patches become one row for the decoder, and one
placeholder token. Every token has a time, a height and a width position; text has them equal.
Source: transformers modeling_qwen2_vl.py, modeling_qwen2_5_vl.py and modeling_qwen3_vl.py
(get_rope_index, rot_pos_emb).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext
from mlx_vlm_pipes.errors import InputError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class GridImage(ImageMetadata):
    """One picture or clip: patches float32 [t*h*w, C*tp*p*p] and its grid (t, h, w) in patches."""

    grid_thw: Grid = (1, 1, 1)
    is_video: bool = False


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


def cu_seqlens(grids: Sequence[Grid]) -> np.ndarray:
    """uint32 [sum of t + 1]: boundaries, in patches, of every frame of every picture and clip."""
    steps = [h * w for t, h, w in grids for _ in range(t)]
    return np.array([0, *steps], np.int64).cumsum().astype(np.uint32)


def longest(boundaries: np.ndarray) -> np.ndarray:
    """uint32 [1]: the longest segment between the boundaries."""
    return np.array([np.diff(boundaries).max()], np.uint32)


def grid_positions(grid: Grid, merge: int, interval: float = 1.0) -> np.ndarray:
    """int64 [3, t*h'*w']: time, row and column of merged patches, from 0.

    interval: time positions from one step of t to the next; times in float32, truncated.
    """
    t, h, w = (int(n) for n in grid)
    times = (np.arange(t, dtype=np.float32) * np.float32(interval)).astype(np.int64)
    axes = np.meshgrid(times, np.arange(h // merge), np.arange(w // merge), indexing="ij")
    return np.stack(axes).reshape(3, -1)


def rope_index(
    input_ids: np.ndarray, media: Mapping[int, Sequence[np.ndarray]]
) -> tuple[np.ndarray, int]:
    """Time, height and width position of every token.

    Args: input_ids [n]; media, by placeholder id, the positions from 0 ([3, m] each, as
    `grid_positions` gives them) of each run of such tokens, in token order.
    Returns: int64 [3, n]; rope_delta = 1 + largest position - number of tokens.
    Raises: InputError when a grid finds no run of placeholders. Placeholders beyond the given
    ones are plain text.
    """
    input_ids = np.asarray(input_ids).reshape(-1)
    parts, here, end = [np.zeros((3, 0), np.int64)], 0, 0
    for start, grid in _runs(input_ids, media):
        text = np.arange(start - end) + here  # [start - end]
        here += start - end
        parts += [np.broadcast_to(text, (3, len(text))), grid + here]
        here += int(grid.max()) + 1
        end = start + grid.shape[1]
    tail = np.arange(len(input_ids) - end) + here
    positions = np.concatenate([*parts, np.broadcast_to(tail, (3, len(tail)))], axis=1)
    largest = int(positions.max()) if positions.size else -1
    return positions.astype(np.int64), largest + 1 - len(input_ids)


def _runs(
    input_ids: np.ndarray, media: Mapping[int, Sequence[np.ndarray]]
) -> list[tuple[int, np.ndarray]]:
    """(first token, positions from 0) of every run of placeholders, by first token."""
    runs = []
    for token, grids in media.items():
        spots, used = np.flatnonzero(input_ids == token), 0
        for positions in grids:
            count = positions.shape[1]
            run = spots[used : used + count]
            if len(run) < count or run[-1] - run[0] != count - 1:
                t, h, w = (positions.max(axis=1) + 1).tolist()
                raise InputError(
                    f"a grid of {t}x{h}x{w} positions needs a run of {count} tokens {token}; "
                    f"{len(run)} are left in the prompt"
                )
            runs.append((int(run[0]), positions))
            used += count
    return sorted(runs, key=lambda run: run[0])


ImageT = TypeVar("ImageT", bound=GridImage)


@dataclass(frozen=True)
class GridData(ABC, Generic[ImageT]):
    """Pictures and clips in token order, and what a vision tower needs to know of their grids.

    The tables describe concatenated_pixel_values; they are made when first read.
    """

    images: tuple[ImageT, ...]

    @property
    @abstractmethod
    def merge(self) -> int:
        """Patches along a side of what becomes one row for the decoder."""

    @property
    def grids(self) -> list[Grid]:
        return [image.grid_thw for image in self.images]

    @property
    def image_grid_thw(self) -> np.ndarray:
        """int64 [number of still pictures, 3]."""
        return grid_array([i.grid_thw for i in self.images if not i.is_video])

    @property
    def video_grid_thw(self) -> np.ndarray:
        """int64 [number of clips, 3]."""
        return grid_array([i.grid_thw for i in self.images if i.is_video])

    @cached_property
    def concatenated_pixel_values(self) -> np.ndarray:
        """float32 [P, C*tp*p*p]."""
        return np.concatenate([image.pixel_values for image in self.images])

    @cached_property
    def vision_position_ids(self) -> np.ndarray:
        return vision_position_ids(self.grids, self.merge)

    @cached_property
    def cu_seqlens(self) -> np.ndarray:
        return cu_seqlens(self.grids)

    @property
    def max_seqlen(self) -> np.ndarray:
        """uint32 [1]: patches of the longest frame."""
        return longest(self.cu_seqlens)

    @property
    def max_grid_size(self) -> np.ndarray:
        """int32 scalar: the largest h or w."""
        return np.array(max(max(h, w) for _, h, w in self.grids), np.int32)


@dataclass(kw_only=True)
class GridContext(TextAndVisionContext, ABC):
    """A request with its three-axis positions. decoder_position_ids: int64 [3, prompt].

    rope_delta: what to add to a token's index behind the last picture to get its position.
    """

    rope_delta: int = 0
    decoder_position_ids: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.int64))

    @abstractmethod
    def media_positions(self) -> Mapping[int, Sequence[np.ndarray]]:
        """What `rope_index` takes: by placeholder id, the positions of each run.

        Raises: InputError for pictures without what their positions depend on.
        """

    @property
    def position_delta(self) -> int:
        return self.rope_delta

    def refresh_positions(self) -> None:
        """Recompute positions and rope_delta over all tokens, generated ones included.

        Raises: InputError if the tokens no longer hold the placeholders.
        """
        made = rope_index(self.tokens.all, self.media_positions())
        self.decoder_position_ids, self.rope_delta = made

    def active_positions(self) -> np.ndarray:
        """int64 [3, active tokens]; made anew if tokens have come since (a reset).

        Raises: as refresh_positions.
        """
        tokens = self.tokens
        if not self.needs_vision_encoding:
            start = tokens.processed_length + self.rope_delta
            text = np.arange(start, start + tokens.active_length)
            return np.broadcast_to(text, (3, len(text)))
        if self.decoder_position_ids.shape[1] != len(tokens):
            self.refresh_positions()
        return self.decoder_position_ids[:, tokens.processed_length : tokens.current_position]


@dataclass(kw_only=True)
class UntimedContext(GridContext):
    """A request whose positions follow from the grids alone: a step of t takes one of them."""

    spatial_merge_size: int
    image_token_id: int
    video_token_id: int

    def media_positions(self) -> Mapping[int, Sequence[np.ndarray]]:
        stills: list[np.ndarray] = []
        clips: list[np.ndarray] = []
        for image in self.grid_images():
            positions = grid_positions(image.grid_thw, self.spatial_merge_size)
            (clips if image.is_video else stills).append(positions)
        return {self.image_token_id: stills, self.video_token_id: clips}

    def grid_images(self) -> list[GridImage]:
        """Raises: InputError for a picture without a grid."""
        own = [image for image in self.images if isinstance(image, GridImage)]
        if len(own) < len(self.images):
            raise InputError(
                f"request {self.request_id!r} has pictures without grids; expected GridImage, as "
                "the model's processor makes them"
            )
        return own


def grid_array(grids: Sequence[Grid]) -> np.ndarray:
    """int64 [N, 3]."""
    return np.array(grids, np.int64).reshape(-1, 3)
