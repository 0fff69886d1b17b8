"""What is to be done to each module: kept, cast, quantised and how."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mlx_vlm_pipes.checkpoint.state import LANGUAGE
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.options import Option, unfit
from mlx_vlm_pipes.weights.quantized import MLX_MODES

Packing = tuple[int, int, str]  # group size, bits, mode

# recipe: (bits of most of the decoder, bits of what hurts most)
RECIPES = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
    "mixed_4_8": (4, 8),
}
DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_SHARD_BYTES = 2 * 2**30
_TYPES = [
    *(Option("", name=name, kind=int, takes_none=True) for name in ("bits", "group_size")),
    *(Option("", name=name, kind=str, takes_none=True) for name in ("mixed", "dtype", "revision")),
    *(Option("", name=n, kind=bool) for n in ("quantize_vision", "dequantize", "measure")),
    Option("", name="mode", kind=str),
    Option("", name="shard_bytes", kind=int, low=1),
]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """One conversion. Without bits, group size, mode and recipe nothing is quantised anew.

    dtype: what floats become, scales included; None keeps the checkpoint's. lora: an adapter
    folder to merge. measure: whether to load both models at the end and compare them.
    Raises: InputError for a value of a wrong type.
    """

    model: str | Path
    out: str | Path
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    mixed: str | None = None
    dtype: str | None = None
    quantize_vision: bool = False
    dequantize: bool = False
    lora: str | Path | None = None
    revision: str | None = None
    measure: bool = True
    shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        for name in ("model", "out", "lora"):
            value = getattr(self, name)
            if not isinstance(value, (str, os.PathLike)) and not (name == "lora" and value is None):
                raise unfit(name, value, "a path")
        for option in _TYPES:
            option.read(getattr(self, option.name))

    @property
    def quantizes(self) -> bool:
        asked = (self.bits, self.group_size, self.mixed)
        return any(value is not None for value in asked) or self.mode != "affine"

    def settings(self) -> Packing | None:
        """(group size, bits, mode) of most modules, None where nothing is to be quantised.

        Raises: InputError for options that contradict each other, or that MLX does not have.
        """
        if self.dtype not in (None, *DTYPES):
            raise InputError(f"dtype {self.dtype!r}; use {', '.join(DTYPES)}")
        if not self.quantizes:
            if self.quantize_vision:
                raise InputError("--quantize-vision needs --bits, --mode or --mixed")
            return None
        if self.dequantize:
            raise InputError("--dequantize writes floats; leave --bits, --mode and --mixed out")
        if self.mixed is not None and self.mixed not in RECIPES:
            raise InputError(f"recipe {self.mixed!r}; there are {', '.join(RECIPES)}")
        if self.mixed is not None and (self.bits is not None or self.mode != "affine"):
            raise InputError("--mixed chooses the bits, in affine mode; leave --bits, --mode out")
        if self.mode not in MLX_MODES:
            raise InputError(f"mode {self.mode!r}; MLX has {', '.join(MLX_MODES)}")
        groups, widths = MLX_MODES[self.mode]
        group = groups[0] if self.group_size is None else self.group_size
        bits = RECIPES[self.mixed][0] if self.mixed else self.bits
        bits = widths[0] if bits is None else bits
        if group not in groups or bits not in widths:
            raise InputError(
                f"{bits} bits in groups of {group}; mode {self.mode} has bits {sorted(widths)}"
                f" and group sizes {sorted(groups)}"
            )
        return group, bits, self.mode


@dataclass(frozen=True)
class Recipe:
    """How each module is quantised: `base` or None for not at all, `mixed` a key of RECIPES."""

    base: Packing | None
    mixed: str | None = None
    num_layers: int = 0
    quantize_vision: bool = False

    def settings_for(self, path: str, shape: tuple[int, ...]) -> Packing | None:
        """The settings of a canonical module path with a plain weight of this shape.

        None: kept as floats. So is what no group divides, and what mlx-vlm skips (fewer than 64
        elements left over).
        """
        if self.base is None or len(shape) != 2 or path.endswith("_embedding"):
            return None
        is_text = path.startswith(LANGUAGE)
        if not is_text and not self.quantize_vision:
            return None
        group, bits, mode = self.base
        if shape[1] % group or shape[0] * shape[1] % 64:
            return None
        if self.mixed is not None and self._is_sensitive(path):
            return group, RECIPES[self.mixed][1], mode
        return group, bits, mode

    def _is_sensitive(self, path: str) -> bool:
        """Embedding and head; values and down projections of the outer and each third layer.

        Source: mlx_vlm/convert.py and mlx_lm/convert.py, after llama.cpp's Q4_K_M.
        """
        parts = path.removeprefix(LANGUAGE).split(".")
        if parts[0] in ("embed_tokens", "lm_head"):
            return True
        if parts[0] != "layers" or parts[-1] not in ("v_proj", "qkv_proj", "down_proj"):
            return False
        layer, eighth = int(parts[1]), self.num_layers // 8
        outer = layer < eighth or layer >= 7 * self.num_layers // 8
        return outer or (layer - eighth) % 3 == 2
