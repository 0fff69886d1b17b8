"""Tensor names of Qwen3-VL checkpoints. Source: transformers 4.57 and 5, mlx-vlm, mlx-lm."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.grid_config import GRID_LAYOUTS
from mlx_vlm_pipes.weights.layout import MLXForm

LAYOUTS = GRID_LAYOUTS
MLX_FORM = MLXForm(("mlx-vlm",), model_types={"qwen3_vl_vision": "qwen3_vl"})
