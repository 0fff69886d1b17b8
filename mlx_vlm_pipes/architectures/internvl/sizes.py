"""What processor, tower and configuration read from InternVL's config.json alike. No MLX.

The original InternVLChatModel has `llm_config` and keys such as `qk_normalization`; transformers
has `text_config` and `use_qk_norm`, with other defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.architectures.internvl.facts import FACTS
from mlx_vlm_pipes.errors import ConfigError, UnsupportedModel, shown
from mlx_vlm_pipes.hf_config import AutoConfig, lookup, optional_int, require_vision_config

ORIGINAL = "InternVLChatModel"


def is_original(config: AutoConfig) -> bool:
    """Whether a whole configuration is written in the dialect of InternVLChatModel."""
    if lookup(config, "llm_config") is not None:
        return True
    if ORIGINAL in lookup(config, "architectures", default=[]):
        return True
    if lookup(config, "model_type") == "internvl":
        return False
    return has_original_keys(lookup(config, "vision_config"))


def has_original_keys(vision: AutoConfig) -> bool:
    """The same for a vision part alone, by its keys."""
    if lookup(vision, "model_type") == "internvl_vision":
        return False
    if lookup(vision, "qk_normalization", "qkv_bias") is not None:
        return True
    return lookup(vision, "use_qk_norm", "attention_bias") is None


def square(config: AutoConfig, key: str, default: int) -> int:
    """A side in pixels. Raises: UnsupportedModel where height and width differ."""
    value = lookup(config, key, default=default)
    if isinstance(value, (list, tuple)) and len(set(value)) > 1:
        raise UnsupportedModel(f"vision {key} {list(value)}; only square ones are supported")
    return optional_int(config, key, default=default)


@dataclass(frozen=True)
class TileSizes:
    """side_px and patch_px: of a tile and its patches, as the model is configured.

    downsample_ratio: 1 over the patches in a row of the block that becomes one vision row.
    min_tiles, max_tiles: of a picture; None where config.json leaves it to the processor's files.
    """

    side_px: int
    patch_px: int
    downsample_ratio: float
    min_tiles: int | None
    max_tiles: int | None
    use_thumbnail: bool

    @classmethod
    def read(cls, huggingface_config: AutoConfig, overrides: Mapping[str, Any]) -> TileSizes:
        """From the outer configuration; overrides: `vision_config_overrides`, which win.

        Raises: ConfigError for a ratio or sizes that do not fit each other, for an override that
        there is not; UnsupportedModel for tiles that are not square.
        """
        FACTS.check_overrides(overrides)
        cfg, vision = huggingface_config, require_vision_config(huggingface_config)
        tiles: dict[str, int | None] = {
            key: overrides.get(key, lookup(cfg, key))
            for key in ("min_dynamic_patch", "max_dynamic_patch")
        }
        if lookup(cfg, "dynamic_image_size", default=True) is False:
            tiles = {**dict.fromkeys(tiles, 1), **overrides}
        sizes = cls(
            side_px=optional_int(
                cfg, "force_image_size", default=square(vision, "image_size", 448)
            ),
            patch_px=square(vision, "patch_size", 14),
            downsample_ratio=_downsample_ratio(cfg),
            min_tiles=tiles["min_dynamic_patch"],
            max_tiles=tiles["max_dynamic_patch"],
            use_thumbnail=lookup(cfg, "use_thumbnail", default=True) is True,
        )
        tokens = sizes.tokens(sizes.side_px)
        # transformers writes image_seq_length 256 for tiles of any size, and its model ignores it.
        if optional_int(cfg, "num_image_token", default=tokens) != tokens:
            raise ConfigError(
                f"num_image_token {cfg.num_image_token}; tiles of {sizes.side_px} pixels in "
                f"patches of {sizes.patch_px} make {tokens} tokens"
            )
        return sizes

    @property
    def shuffle_factor(self) -> int:
        return round(1 / self.downsample_ratio)

    def tokens(self, side_px: int) -> int:
        """Vision rows of a tile. Raises: ConfigError if it does not divide into whole blocks."""
        factor = self.shuffle_factor
        if side_px % self.patch_px or side_px // self.patch_px % factor:
            raise ConfigError(
                f"tiles of {side_px} pixels in patches of {self.patch_px} do not divide into "
                f"blocks of {factor} x {factor} patches (downsample_ratio {self.downsample_ratio})"
            )
        return (side_px // self.patch_px // factor) ** 2


def _downsample_ratio(config: AutoConfig) -> float:
    """Raises: ConfigError unless 1 / ratio is whole."""
    ratio = number(config, "downsample_ratio", 0.5)
    factor = round(1 / ratio) if ratio > 0 else 0
    if factor < 1 or abs(1 / ratio - factor) > 1e-6:
        raise ConfigError(f"downsample_ratio {ratio}; expected 1 over a whole number, e.g. 0.5")
    return ratio


def number(config: AutoConfig, key: str, default: float) -> float:
    """Raises: ConfigError for a value that is no number."""
    value = lookup(config, key, default=default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"config.json: {key!r} is {shown(value)}, expected a number")
    return float(value)
