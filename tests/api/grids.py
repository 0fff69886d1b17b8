"""What tests of models share whose pictures are grids of patches, and whose positions turn."""

from __future__ import annotations

from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import TokenBuffer
from mlx_vlm_pipes.processing.grids import GridImage, UntimedContext
from tests.api.driving import Arrays, model_of
from tests.api.vision_contract import VisionContract

MERGE = 2
KINDS = (
    ("pixel_values", "image_grid_thw", "image_token_id"),
    ("pixel_values_videos", "video_grid_thw", "video_token_id"),
)
ContextT = TypeVar("ContextT", bound=UntimedContext)


class GridContract(VisionContract):
    """The tower takes all vision fields but the places of the rows, the decoder positions too."""

    plain_positions = False

    def vision_arguments(self, inputs: Any) -> list[mx.array]:
        return [getattr(inputs, name)[0] for name in self.vision_fields[:-1]]

    def language_arguments(self, inputs: Any, rows: mx.array) -> list[Any]:
        return [*super().language_arguments(inputs, rows), inputs.position_ids]

    def test_positions_are_transformers(self) -> None:
        ids = model_of(self.room).prepare_decoder_position_ids(self.room.contexts(), [])
        want = [self.room.arrays[f"{prompt}/position_ids"] for prompt in self.room.prompts]
        np.testing.assert_array_equal(np.array(ids), np.concatenate(want, axis=1))


def grid_context(
    kind: type[ContextT], config: dict[str, Any], arrays: Arrays, prompt: str
) -> ContextT:
    """From a fixture's stored arrays: pictures, and clips that are one run of placeholders each."""
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
