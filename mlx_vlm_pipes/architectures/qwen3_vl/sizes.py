"""What processor, tower and configuration read from Qwen3-VL's config.json alike. No MLX.

Source: transformers configuration_qwen3_vl.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import AutoConfig, optional_int


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of patches, in pixels, and of the square table of learned places, in patches."""

    spatial_merge_size: int = 2
    patch_size: int = 16
    temporal_patch_size: int = 2
    table_side: int = 48

    @classmethod
    def read(cls, vision_config: AutoConfig) -> VisionSizes:
        """Raises: ConfigError for values that are no sizes, or a table that is no square."""
        places = optional_int(vision_config, "num_position_embeddings", default=48**2)
        side = math.isqrt(places)
        if side**2 != places:
            raise ConfigError(f"vision num_position_embeddings {places}; expected a square number")
        return cls(
            optional_int(vision_config, "spatial_merge_size", default=2),
            optional_int(vision_config, "patch_size", default=16),
            optional_int(vision_config, "temporal_patch_size", default=2),
            side,
        )
