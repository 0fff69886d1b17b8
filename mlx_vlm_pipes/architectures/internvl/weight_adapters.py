"""Tensor names of InternVL checkpoints. Ours: the original's tower, transformers' projector.

A checkpoint's own `attn.qkv` stays one matrix, and separate projections stay separate.
"""

from __future__ import annotations

from mlx_vlm_pipes.architectures.internvl.model_config import CHANNELS, VisionConfig
from mlx_vlm_pipes.weights.layout import (
    DECODER_MLX_VLM,
    ConvToMatrix,
    Layout,
    MLXForm,
    Prefix,
    Reshape,
    Transform,
    decoder,
)

PATCH_EMBEDDING = "vision_model.embeddings.patch_embedding.weight"
CLASS_EMBEDDING = "vision_model.embeddings.class_embedding"
POSITION_EMBEDDING = "vision_model.embeddings.position_embedding"
IGNORE = ("*.embeddings.mask_token",)  # for training by masking, never read here

# some mlx-vlm conversions repeat a level
_DECODER_DOUBLED = decoder("language_model.model.model.", "language_model.model.lm_head.")
_DECODERS = (*DECODER_MLX_VLM, *_DECODER_DOUBLED)


def _native(prefix: str) -> tuple[Prefix, ...]:
    """Tower and projector of transformers' layout below `prefix`."""
    tower, layer = prefix + "vision_tower.", "vision_tower.encoder.layer.*."
    ours = "vision_model.encoder.layers.*."
    children = {
        "attention.projection_layer.": "attn.proj.",
        "attention.": "attn.",
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "lambda_1": "ls1",
        "lambda_2": "ls2",
        "mlp.": "mlp.",
    }
    return (
        Prefix(tower + "embeddings.cls_token", CLASS_EMBEDDING),
        Prefix(tower + "embeddings.position_embeddings", POSITION_EMBEDDING),
        Prefix(
            tower + "embeddings.patch_embeddings.projection.",
            "vision_model.embeddings.patch_embedding.",
        ),
        *(Prefix(prefix + layer + theirs, ours + name) for theirs, name in children.items()),
        Prefix(tower + "layernorm.", "vision_model.layernorm."),
        *(
            Prefix(f"{prefix}multi_modal_projector.{name}.", f"multi_modal_projector.{name}.")
            for name in ("layer_norm", "linear_1", "act", "linear_2")
        ),
    )


_ORIGINAL = (
    Prefix("vision_model.embeddings.", "vision_model.embeddings."),
    Prefix("vision_model.encoder.layers.*.", "vision_model.encoder.layers.*."),
    Prefix(
        "vision_model.encoder.layers.*.mlp.act.", "vision_model.encoder.layers.*.mlp.activation_fn."
    ),
    Prefix("mlp1.0.", "multi_modal_projector.layer_norm."),
    Prefix("mlp1.1.", "multi_modal_projector.linear_1."),
    Prefix("mlp1.3.", "multi_modal_projector.linear_2."),
)
LAYOUTS = (
    Layout("huggingface v4", (*_native(""), *_DECODERS), IGNORE),
    Layout(
        "huggingface v5",
        (*_native("model."), *decoder("model.language_model.", "lm_head.")),
        IGNORE,
    ),
    Layout("original InternVLChatModel", (*_ORIGINAL, *_DECODERS), IGNORE),
)
MLX_FORM = MLXForm(("huggingface v4", "original InternVLChatModel"))


def transforms(vision_config: VisionConfig) -> tuple[Transform, ...]:
    """Changes of values by canonical name: the patch convolution becomes a matrix."""
    patch, size = vision_config.patch_size, vision_config.hidden_size
    grid = vision_config.image_size // patch
    return (
        ConvToMatrix(PATCH_EMBEDDING, CHANNELS, (patch, patch)),
        Reshape(CLASS_EMBEDDING, (size,)),
        Reshape(POSITION_EMBEDDING, (grid * grid + 1, size)),
    )
