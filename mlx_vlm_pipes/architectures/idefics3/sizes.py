"""What processor, tower and configuration read from Idefics3's config.json alike. No MLX."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_vlm_pipes.errors import ConfigError, ProcessorError
from mlx_vlm_pipes.hf_config import AutoConfig, optional_int, require_int, require_vision_config


@dataclass(frozen=True)
class FrameSizes:
    """image_size and patch_size in pixels; scale_factor: patches a side that become one token."""

    image_size: int
    patch_size: int
    scale_factor: int

    @classmethod
    def read(cls, huggingface_config: AutoConfig) -> FrameSizes:
        """Raises: ConfigError for missing sizes, and for sizes that do not divide."""
        vision = require_vision_config(huggingface_config)
        sizes = cls(
            require_int(vision, "image_size"),
            require_int(vision, "patch_size"),
            optional_int(huggingface_config, "scale_factor", default=2),
        )
        side = sizes.patches_per_side
        if side == 0 or side % sizes.scale_factor:
            raise ConfigError(
                f"{side} patches a side do not divide by scale_factor {sizes.scale_factor}; "
                "image_size, patch_size and scale_factor do not fit together"
            )
        return sizes

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    def tokens_of(self, frame_px: int, source: str) -> int:
        """Tokens of one square frame, which need not have the size that the tower was trained on.

        Raises: ProcessorError for frames that do not fold into tokens.
        """
        side = frame_px // self.patch_size
        if side == 0 or side % self.scale_factor:
            raise ProcessorError(
                f"{source}: max_image_size is {frame_px}, which makes {side}x{side} patches of "
                f"{self.patch_size} pixels; expected a multiple of scale_factor {self.scale_factor}"
            )
        return side**2 // self.scale_factor**2
