"""What processor, tower and configuration read from a Pixtral tower's config.json alike. No MLX."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import AutoConfig, optional_int, require_vision_config


@dataclass(frozen=True)
class PatchSizes:
    """In pixels. image_size: what the tower was trained for, no limit."""

    image_size: int
    patch_size: int

    @classmethod
    def read(cls, huggingface_config: AutoConfig) -> PatchSizes:
        """Raises: ConfigError without a tower, or for a picture smaller than a patch."""
        vision = require_vision_config(huggingface_config)
        image = optional_int(vision, "image_size", default=1024)
        patch = optional_int(vision, "patch_size", default=16)
        if image < patch:
            raise ConfigError(f"vision image_size {image} is smaller than patch_size {patch}")
        return cls(image, patch)
