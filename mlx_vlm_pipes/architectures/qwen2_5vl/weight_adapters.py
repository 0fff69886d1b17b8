"""Tensor names of Qwen2.5-VL checkpoints."""

from __future__ import annotations

from mlx_vlm_pipes.checkpoint.state import VISION
from mlx_vlm_pipes.weights import Layout, Prefix
from mlx_vlm_pipes.weights.layout import (
    DECODER_CANONICAL,
    DECODER_HF,
    DECODER_MLX_VLM,
    MLXForm,
    decoder,
)

LAYOUTS = (
    Layout("huggingface 4", (*DECODER_HF, Prefix("visual.", VISION))),
    Layout(
        "huggingface 5",
        (*decoder("model.language_model.", "lm_head."), Prefix("model.visual.", VISION)),
    ),
    Layout("mlx-vlm", (*DECODER_MLX_VLM, Prefix("vision_tower.", VISION))),
    Layout("canonical", (*DECODER_CANONICAL, Prefix(VISION, VISION))),
)
MLX_FORM = MLXForm(("mlx-vlm",), model_types={"qwen2_5_vl_vision": "qwen2_5_vl"}, flat_text=True)
