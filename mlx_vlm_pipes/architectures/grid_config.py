"""What the towers' configurations share whose pictures are grids of patches of any size."""

from __future__ import annotations

from mlx_vlm_pipes.errors import ConfigError


class GridTowerConfig:
    """Sizes that follow from a tower's fields. patch_size in pixels."""

    hidden_size: int
    num_attention_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_elements(self) -> int:
        """Numbers in one patch: channels, frames, rows and columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one row for the decoder."""
        return self.spatial_merge_size**2

    def check_heads(self) -> None:
        """Raises: ConfigError for heads that do not divide the width, or by row and column."""
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ConfigError(
                f"vision hidden_size {self.hidden_size} with {self.num_attention_heads} heads; "
                "expected heads of a multiple of 4 elements"
            )
