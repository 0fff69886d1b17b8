"""The records of pictures and clips, as processors make them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_vlm_pipes.media.previews import Preview
from mlx_vlm_pipes.media.records import Cap, MediaRecord, Tiles
from mlx_vlm_pipes.processing.images import Picture
from mlx_vlm_pipes.processing.video import Clip

if TYPE_CHECKING:
    from PIL.Image import Image


def picture_record(
    picture: Picture, resized: Image, grid: tuple[int, ...], tiles: Tiles, cap: Cap | None
) -> MediaRecord:
    """A picture's record, before its tokens are known. resized: what was cut."""
    return MediaRecord(
        kind="image",
        source_size=picture.source_size,
        resized_size=resized.size,
        grid=grid,
        tiles=tiles,
        orientation=picture.orientation,
        cap=cap,
        preview=Preview([resized]),
    )


def clip_record(
    clip: Clip, grid: tuple[int, ...], tokens: tuple[int, int], cap: Cap | None
) -> MediaRecord:
    """A clip's record, before its tokens are known. tokens: rows and columns of a frame's."""
    size = clip.frames[0].size
    return MediaRecord(
        kind="video",
        source_size=clip.source_size,
        resized_size=size,
        grid=grid,
        tiles=Tiles(1, 1, size, tokens),
        cap=cap,
        num_frames=len(clip.frames),
        total_frames=clip.total_frames,
        times_s=tuple(clip.timestamps_s),
        preview=Preview(clip.frames),
    )
