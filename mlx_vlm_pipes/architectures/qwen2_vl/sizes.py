"""What processor and configuration read from Qwen2-VL's config.json alike. No MLX.

Source: transformers configuration_qwen2_vl.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_vlm_pipes.hf_config import AutoConfig, optional_int


@dataclass(frozen=True)
class VisionSizes:
    """patch_size: pixels along a side; spatial_merge_size: patches; temporal_patch_size: frames."""

    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    @classmethod
    def read(cls, vision_config: AutoConfig) -> VisionSizes:
        """Raises: ConfigError for values that are no sizes."""
        return cls(
            optional_int(vision_config, "patch_size", default=14),
            optional_int(vision_config, "spatial_merge_size", default=2),
            optional_int(vision_config, "temporal_patch_size", default=2),
        )
