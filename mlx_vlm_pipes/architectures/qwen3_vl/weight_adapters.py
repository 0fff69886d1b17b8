"""Tensor names of Qwen3-VL checkpoints. Source: transformers 4.57 and 5, mlx-vlm, mlx-lm."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.qwen3_vl.model_config import VisionConfig
from mlx_vlm_pipes.checkpoint.state import VISION
from mlx_vlm_pipes.weights import ConvToMatrix, Layout, Prefix
from mlx_vlm_pipes.weights.layout import (
    DECODER_CANONICAL,
    DECODER_MLX_VLM,
    MLXForm,
    Transform,
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


def transforms(vision_config: VisionConfig) -> tuple[Transform, ...]:
    """The patch convolution becomes a matrix in the order of `pixel_values`."""
    side = vision_config.patch_size
    kernel = (vision_config.temporal_patch_size, side, side)
    return (ConvToMatrix(f"{VISION}patch_embed.proj.weight", vision_config.in_channels, kernel),)
