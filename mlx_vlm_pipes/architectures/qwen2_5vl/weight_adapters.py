"""Tensor names of Qwen2.5-VL checkpoints. Source: transformers 4 and 5, mlx-vlm."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.grid_config import FLAT_GRID_LAYOUTS
from mlx_vlm_pipes.weights.layout import MLXForm

LAYOUTS = FLAT_GRID_LAYOUTS
MLX_FORM = MLXForm(("mlx-vlm",), model_types={"qwen2_5_vl_vision": "qwen2_5_vl"}, flat_text=True)
