"""Tensor names of Qwen2.5-VL checkpoints."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.qwen2_5vl.model_config import VisionConfig
from mlx_vlm_pipes.checkpoint.state import VISION
from mlx_vlm_pipes.weights import ConvToMatrix, Layout, Prefix
from mlx_vlm_pipes.weights.layout import (
    DECODER_CANONICAL,
    DECODER_HF,
    DECODER_MLX_VLM,
    MLXForm,
    Transform,
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


def transforms(vision_config: VisionConfig) -> tuple[Transform, ...]:
    """The patch convolution becomes a matrix in the order of `pixel_values`."""
    side = vision_config.patch_size
    kernel = (vision_config.temporal_patch_size, side, side)
    return (ConvToMatrix(f"{VISION}patch_embed.proj.weight", vision_config.in_channels, kernel),)
