"""How weights may be packed: records (docs/api.md#configuration) that `weights` reads."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from mlx_vlm_pipes.dtypes import DType


class QuantizationEncoding(enum.Enum):
    """Packed encodings; the value is (elements, bytes) of a block. MLX varies by module."""

    Q4_0 = (32, 18)
    Q4_K = (256, 144)
    Q5_K = (256, 176)
    Q6_K = (256, 210)
    GPTQ = (0, 0)
    MLX = (0, 1)

    @property
    def is_gguf(self) -> bool:
        return self.name.startswith("Q")

    @property
    def elements_per_block(self) -> int:
        return self.value[0]

    @property
    def block_size(self) -> int:
        """Bytes of one block."""
        return self.value[1]


@dataclass(frozen=True)
class QuantizationConfig:
    """Integer-packed weights. `overrides`: module path -> settings, or False for not quantised."""

    quant_method: str
    bits: int
    group_size: int
    desc_act: bool = False
    sym: bool = False
    mode: str = "affine"
    overrides: dict[str, dict[str, int | str] | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class ScaleSpec:
    """How a scale covers a tensor. block_size is (rows, columns), required for "block"."""

    granularity: Literal["tensor", "rowwise", "colwise", "block"]
    dtype: DType
    block_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class QuantConfig:
    """Scaled float weights (FP8, FP4): on MLX a record of what was expanded while loading."""

    input_scale: ScaleSpec | None
    weight_scale: ScaleSpec
    mlp_quantized_layers: set[int]
    attn_quantized_layers: set[int]
    format: str
    embedding_output_dtype: DType | None = None
    bias_dtype: DType | None = None


@dataclass(frozen=True)
class LoRAConfig:
    """Which adapters to load; a path may be written `name=path`."""

    enable_lora: bool = False
    lora_paths: list[str] = field(default_factory=list)
    max_lora_rank: int = 16
    max_num_loras: int = 1
