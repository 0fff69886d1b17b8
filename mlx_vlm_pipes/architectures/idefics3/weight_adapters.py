"""Tensor names of Idefics3 and SmolVLM checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_vlm_pipes.weights.layout import (
    DECODER_CANONICAL,
    ConvToMatrix,
    Layout,
    MLXForm,
    Prefix,
    Transform,
    decoder,
)

if TYPE_CHECKING:
    from mlx_vlm_pipes.architectures.idefics3.model_config import Idefics3VisionConfig

_VISION_CHILDREN = (
    "embeddings.patch_embedding.",
    "embeddings.position_embedding.",
    "encoder.layers.",
    "post_layernorm.",
)
_PROJECTION = "connector.modality_projection.proj."


def _vision(source: str) -> tuple[Prefix, ...]:
    """Tower and connector, for a checkpoint that keeps both below `source`."""
    return (
        *(
            Prefix(f"{source}vision_model.{child}", f"vision_model.{child}")
            for child in _VISION_CHILDREN
        ),
        Prefix(source + _PROJECTION, _PROJECTION),
    )


LAYOUTS = (
    Layout("huggingface", (*decoder("model.text_model.", "lm_head."), *_vision("model."))),
    Layout("mlx-vlm", (*DECODER_CANONICAL, *_vision(""))),  # its names are the canonical ones
)
MLX_FORM = MLXForm(("mlx-vlm",), head=True)


def transforms(vision_config: Idefics3VisionConfig) -> tuple[Transform, ...]:
    """The patch convolution as a matrix over flattened patches."""
    patch = vision_config.patch_size
    name = "vision_model.embeddings.patch_embedding.weight"
    return (ConvToMatrix(name, vision_config.num_channels, (patch, patch)),)
