"""What processor, tower and configuration read from Qwen2.5-VL's config.json alike. No MLX.

Source: transformers configuration_qwen2_5_vl.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_vlm_pipes.hf_config import AutoConfig, optional_int


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of patches and windows. window_size and patch_size in pixels.

    tokens_per_second: time positions that a second of a clip takes.
    """

    spatial_merge_size: int = 2
    patch_size: int = 14
    window_size: int = 112
    temporal_patch_size: int = 2
    tokens_per_second: int = 4

    @property
    def window_side(self) -> int:
        """Merged patches along a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @classmethod
    def read(cls, vision_config: AutoConfig) -> VisionSizes:
        """Raises: ConfigError for values that are no sizes."""
        return cls(
            optional_int(vision_config, "spatial_merge_size", default=2),
            optional_int(vision_config, "patch_size", default=14),
            optional_int(vision_config, "window_size", default=112),
            optional_int(vision_config, "temporal_patch_size", default=2),
            optional_int(vision_config, "tokens_per_second", default=4),
        )
