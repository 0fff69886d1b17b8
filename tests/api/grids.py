"""Contexts of models whose pictures are grids of patches, from a fixture's stored arrays."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from mlx_vlm_pipes.contexts import TokenBuffer
from mlx_vlm_pipes.processing.grids import GridImage, UntimedContext
from tests.api.driving import Arrays

MERGE = 2
KINDS = (
    ("pixel_values", "image_grid_thw", "image_token_id"),
    ("pixel_values_videos", "video_grid_thw", "video_token_id"),
)
ContextT = TypeVar("ContextT", bound=UntimedContext)


def grid_context(
    kind: type[ContextT], config: dict[str, Any], arrays: Arrays, prompt: str
) -> ContextT:
    """Pictures, and clips that are one run of placeholders each."""
    ids, images = arrays[f"{prompt}/input_ids"], []
    for values, grids, token in KINDS:
        found = arrays[f"{prompt}/{grids}"].tolist() if f"{prompt}/{grids}" in arrays else []
        spots, first = np.flatnonzero(ids == config[token]), 0
        for t, h, w in found:
            patches = arrays[f"{prompt}/{values}"][first : first + t * h * w]
            start = int(spots[first // MERGE**2])
            end = start + len(patches) // MERGE**2
            is_video = token == "video_token_id"
            images.append(GridImage(start, end, patches, grid_thw=(t, h, w), is_video=is_video))
            first += len(patches)
    made = kind(
        max_length=2048,
        tokens=TokenBuffer(ids),
        vision_token_ids=[config["image_token_id"], config["video_token_id"]],
        images=sorted(images, key=lambda image: image.start_idx),
        spatial_merge_size=MERGE,
        image_token_id=config["image_token_id"],
        video_token_id=config["video_token_id"],
    )
    made.refresh_positions()
    return made
