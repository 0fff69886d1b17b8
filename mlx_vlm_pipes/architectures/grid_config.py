"""What the towers' configurations share whose pictures are grids of patches of any size."""

from __future__ import annotations

from typing import Any, ClassVar

from mlx_vlm_pipes.checkpoint.state import VISION
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import AutoConfig, axial_theta, optional_int, require_int
from mlx_vlm_pipes.weights.layout import (
    DECODER_CANONICAL,
    DECODER_HF,
    DECODER_MLX_VLM,
    ConvToMatrix,
    Layout,
    Prefix,
    Transform,
    decoder,
)

GRID_LAYOUTS = (
    Layout(
        "huggingface",  # of transformers 5, and of Qwen3-VL from the beginning
        (*decoder("model.language_model.", "lm_head."), Prefix("model.visual.", VISION)),
    ),
    # mlx-lm names the decoder alike and drops the tower
    Layout("mlx-vlm", (*DECODER_MLX_VLM, Prefix("vision_tower.", VISION))),
    Layout("canonical", (*DECODER_CANONICAL, Prefix(VISION, VISION))),
)
# as Qwen2-VL and Qwen2.5-VL were released: the decoder alone below `model.`
FLAT_GRID_LAYOUTS = (
    Layout("huggingface 4", (*DECODER_HF, Prefix("visual.", VISION))),
    *GRID_LAYOUTS,
)


class GridTowerConfig:
    """Sizes that follow from a tower's fields. patch_size in pixels.

    Each dataclass has these fields in its own documented order. width_key, rows_key: how its
    config.json spells hidden_size and out_hidden_size.
    """

    width_key: ClassVar[str] = "hidden_size"
    rows_key: ClassVar[str] = "out_hidden_size"
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    out_hidden_size: int
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

    @classmethod
    def inner_width(cls, vision_config: AutoConfig) -> int:
        """Width within a block's MLP. Raises: ConfigError if config.json does not say it."""
        return require_int(vision_config, "intermediate_size")

    @classmethod
    def shared_fields(cls, vision_config: AutoConfig) -> dict[str, Any]:
        """The values of fields that all rooms read alike.

        Raises: ConfigError for missing keys, or a type of rope that we do not have.
        """
        cfg = vision_config
        return {
            "dtype": DType.bfloat16,  # both until `finalize`
            "llm_dtype": DType.bfloat16,
            "in_channels": optional_int(cfg, "in_channels", "in_chans", default=3),
            "hidden_size": require_int(cfg, cls.width_key),
            "num_attention_heads": require_int(cfg, "num_heads", "num_attention_heads"),
            "depth": require_int(cfg, "depth", "num_hidden_layers"),
            "intermediate_size": cls.inner_width(cfg),
            "out_hidden_size": require_int(cfg, cls.rows_key),
            "rope_theta": axial_theta(cfg),
        }

    def check_heads(self) -> None:
        """Raises: ConfigError for heads that do not divide the width, or by row and column."""
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ConfigError(
                f"vision {self.width_key} {self.hidden_size} with {self.num_attention_heads} heads;"
                " expected heads of a multiple of 4 elements"
            )

    def check_width(self, text_width: int) -> None:
        """Raises: ConfigError unless the tower's rows fit among the decoder's embeddings."""
        if self.out_hidden_size != text_width:
            raise ConfigError(
                f"vision {self.rows_key} {self.out_hidden_size}, expected the text hidden_size "
                f"{text_width}"
            )

    def transforms(self) -> tuple[Transform, ...]:
        """The patch convolution becomes a matrix in the order of `pixel_values`."""
        kernel = (self.temporal_patch_size, self.patch_size, self.patch_size)
        return (ConvToMatrix(f"{VISION}patch_embed.proj.weight", self.in_channels, kernel),)
