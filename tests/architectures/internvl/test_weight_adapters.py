"""Every layout leads to the same canonical names, and a second run changes nothing."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.internvl import VisionConfig
from mlx_vlm_pipes.architectures.internvl.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.weights import WeightData, adapt, detect_layout
from tests.architectures.internvl.driving import VISION

LAYER, TEXT_LAYER = "vision_model.encoder.layers.1.", "language_model.layers.1."
# canonical name: (original, transformers 4)
TOWER = {
    "vision_model.embeddings.class_embedding": (
        "vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token",
    ),
    "vision_model.embeddings.position_embedding": (
        "vision_model.embeddings.position_embedding",
        "vision_tower.embeddings.position_embeddings",
    ),
    "vision_model.embeddings.patch_embedding.weight": (
        "vision_model.embeddings.patch_embedding.weight",
        "vision_tower.embeddings.patch_embeddings.projection.weight",
    ),
    LAYER + "attn.proj.bias": (
        LAYER + "attn.proj.bias", "vision_tower.encoder.layer.1.attention.projection_layer.bias",
    ),
    LAYER + "attn.q_norm.weight": (
        LAYER + "attn.q_norm.weight", "vision_tower.encoder.layer.1.attention.q_norm.weight",
    ),
    LAYER + "norm2.weight": (
        LAYER + "norm2.weight", "vision_tower.encoder.layer.1.layernorm_after.weight",
    ),
    LAYER + "ls1": (LAYER + "ls1", "vision_tower.encoder.layer.1.lambda_1"),
    LAYER + "mlp.fc1.weight": (
        LAYER + "mlp.fc1.weight", "vision_tower.encoder.layer.1.mlp.fc1.weight",
    ),
    "multi_modal_projector.layer_norm.weight": (
        "mlp1.0.weight", "multi_modal_projector.layer_norm.weight",
    ),
    "multi_modal_projector.linear_1.weight": (
        "mlp1.1.weight", "multi_modal_projector.linear_1.weight",
    ),
    "multi_modal_projector.linear_2.bias": (
        "mlp1.3.bias", "multi_modal_projector.linear_2.bias",
    ),
}  # fmt: skip
TEXT = ("embed_tokens.weight", "layers.1.self_attn.q_norm.weight", "norm.weight")
SHAPES = {
    "vision_model.embeddings.class_embedding": (1, 1, 24),
    "vision_model.embeddings.position_embedding": (1, 17, 24),
    "vision_model.embeddings.patch_embedding.weight": (24, 3, 4, 4),
}


def text_names(decoder: str, head: str) -> dict[str, str]:
    """Canonical name -> the name in a checkpoint that keeps its decoder below `decoder`."""
    names = {f"language_model.{name}": decoder + name for name in TEXT}
    return {**names, "language_model.lm_head.weight": head + "lm_head.weight"}


FUSED, SPLIT = "attn.qkv.weight", "attn.q_proj.weight"
ORIGINAL = {k: v[0] for k, v in TOWER.items()} | {LAYER + FUSED: LAYER + FUSED}
NATIVE = {k: v[1] for k, v in TOWER.items()} | {
    LAYER + SPLIT: "vision_tower.encoder.layer.1.attention.q_proj.weight",
    "vision_model.layernorm.weight": "vision_tower.layernorm.weight",
}
V4 = text_names("language_model.model.", "language_model.")
DOUBLED = text_names("language_model.model.model.", "language_model.model.")
NAMES = {
    "original": ORIGINAL | V4,
    "original, doubled": ORIGINAL | DOUBLED,
    "transformers 4": NATIVE | V4,
    "mlx-vlm, doubled": NATIVE | DOUBLED,
    "transformers 5": {k: "model." + v for k, v in NATIVE.items()}
    | text_names("model.language_model.", ""),
}


def weight(name: str, shape: tuple[int, ...]) -> WeightData:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return WeightData.from_array(mx.array(values), name)


def canonical(state: dict[str, WeightData], file_format: str = "pt") -> dict[str, WeightData]:
    config = VisionConfig.initialize_from_config(HuggingFaceConfig(VISION))
    layout = detect_layout(state, LAYOUTS)
    return adapt(state, layout, transforms(config), file_format=file_format)


@pytest.mark.parametrize("case", list(NAMES))
def test_layout(case: str) -> None:
    names = NAMES[case]
    extra = {"model.vision_tower.embeddings.mask_token": (1, 1, 24)} if "5" in case else {}
    state = {theirs: weight(theirs, SHAPES.get(ours, (4,))) for ours, theirs in names.items()}
    state |= {name: weight(name, shape) for name, shape in extra.items()}
    once = canonical(state)
    assert set(once) == set(names)
    assert once["vision_model.embeddings.position_embedding"].shape == (17, 24)
    twice = canonical(once)
    assert set(twice) == set(once)
    for name, w in once.items():
        assert np.array_equal(np.array(twice[name].data), np.array(w.data))


def test_patch_convolution_of_either_tool() -> None:
    """torch keeps channels first, mlx-vlm last: both become the matrix (channel, y, x)."""
    name = "vision_model.embeddings.patch_embedding.weight"
    torch = weight(name, (24, 3, 4, 4))
    mlx = WeightData.from_array(mx.moveaxis(torch.data, 1, -1), name)
    matrix = np.array(torch.data).reshape(24, -1)
    for w, file_format in ((torch, "pt"), (mlx, "mlx")):
        found = canonical({name: w}, file_format)[name]
        assert np.array_equal(np.array(found.data), matrix)
