"""Tensor names of Qwen3-VL checkpoints. Source: transformers 4.57 and 5, mlx-vlm, mlx-lm."""

from __future__ import annotations

from mlx_vlm_pipes.checkpoint.state import VISION
from mlx_vlm_pipes.weights import Layout, Prefix
from mlx_vlm_pipes.weights.layout import (
    DECODER_CANONICAL,
    DECODER_MLX_VLM,
    MLXForm,
    decoder,
)

LAYOUTS = (
    Layout(
        "huggingface",
        (*decoder("model.language_model.", "lm_head."), Prefix("model.visual.", VISION)),
    ),
    # mlx-lm names the decoder alike and drops the tower
    Layout("mlx-vlm", (*DECODER_MLX_VLM, Prefix("vision_tower.", VISION))),
    Layout("canonical", (*DECODER_CANONICAL, Prefix(VISION, VISION))),
)
MLX_FORM = MLXForm(("mlx-vlm",), model_types={"qwen3_vl_vision": "qwen3_vl"})
