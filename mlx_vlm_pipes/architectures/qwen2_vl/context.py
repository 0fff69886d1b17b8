"""The tables of Qwen2-VL's tower, and the context of a request. Numpy only.

Source: transformers modeling_qwen2_vl.py; text after a clip continues behind the largest position,
as in the original code.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_vlm_pipes.processing.grids import GridData, GridImage, UntimedContext


@dataclass(frozen=True)
class VisionData(GridData[GridImage]):
    """Pictures and clips in token order, and the tables of the vision tower."""

    spatial_merge_size: int

    @property
    def merge(self) -> int:
        return self.spatial_merge_size


@dataclass(kw_only=True)
class Qwen2VLTextAndVisionContext(UntimedContext):
    """A request with its three-axis positions; how fast a clip runs does not change them."""
