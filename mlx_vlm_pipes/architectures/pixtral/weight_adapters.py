"""Tensor names of Pixtral checkpoints in the LLaVA layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_vlm_pipes.weights.layout import (
    DECODER_CANONICAL,
    DECODER_MLX_VLM,
    ConvToMatrix,
    Layout,
    MLXForm,
    Prefix,
    Transform,
    decoder,
)

if TYPE_CHECKING:
    from mlx_vlm_pipes.architectures.pixtral.model_config import PixtralConfig

_VISION_CHILDREN = ("patch_conv.", "ln_pre.", "transformer.layers.")
_PROJECTOR_CHILDREN = ("linear_1.", "act.", "linear_2.")


def _vision(tower: str, projector: str) -> tuple[Prefix, ...]:
    """The tower's and the projector's rules, for a checkpoint that keeps them below these."""
    return (
        *(Prefix(tower + child, "vision_model." + child) for child in _VISION_CHILDREN),
        *(
            Prefix(projector + child, "multi_modal_projector." + child)
            for child in _PROJECTOR_CHILDREN
        ),
    )


LAYOUTS = (
    Layout(
        "huggingface 4",  # its text names are mlx-vlm's
        (*DECODER_MLX_VLM, *_vision("vision_tower.", "multi_modal_projector.")),
    ),
    Layout(
        "huggingface 5",
        (
            *decoder("model.language_model.", "lm_head."),
            *_vision("model.vision_tower.", "model.multi_modal_projector."),
            *_vision("model.vision_encoder.", "model.vision_projection."),
        ),
    ),
    Layout(
        "mlx-vlm",
        (*DECODER_MLX_VLM, *_vision("vision_tower.vision_model.", "multi_modal_projector.")),
    ),
    Layout("canonical", (*DECODER_CANONICAL, *_vision("vision_model.", "multi_modal_projector."))),
)
MLX_FORM = MLXForm(("mlx-vlm",), head=True, model_types={"llava": "pixtral"})


def transforms(config: PixtralConfig) -> tuple[Transform, ...]:
    """The patch convolution as a matrix over flattened patches."""
    kernel = (config.patch_size, config.patch_size)
    return (ConvToMatrix("vision_model.patch_conv.weight", config.num_channels, kernel),)
