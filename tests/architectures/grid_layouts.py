"""Every layout of Qwen2-VL's and Qwen2.5-VL's tensors leads to the same names and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.architectures.grid_config import GridTowerConfig
from mlx_vlm_pipes.checkpoint.state import below
from mlx_vlm_pipes.weights import WeightData, adapt, detect_layout, parameter_shapes
from mlx_vlm_pipes.weights.layout import Layout

# layout: (prefix of the decoder, of its head, of the vision tower)
PREFIXES = {
    "huggingface 4": ("model.", "lm_head.", "visual."),
    "huggingface": ("model.language_model.", "lm_head.", "model.visual."),
    "mlx-vlm": ("language_model.model.", "language_model.lm_head.", "vision_tower."),
    "canonical": ("language_model.", "language_model.lm_head.", "vision_model."),
}
CONV = mx.arange(16 * 24, dtype=mx.float32).reshape(16, 3, 2, 2, 2)  # [E, C, tp, p, p]


def checkpoint(layout: str, tower: nn.Module) -> dict[str, WeightData]:
    decoder, head, vision = PREFIXES[layout]
    arrays = {vision + name: mx.zeros(shape) for name, shape in parameter_shapes(tower).items()}
    conv = mx.moveaxis(CONV, 1, -1) if layout == "mlx-vlm" else CONV
    arrays[f"{vision}patch_embed.proj.weight"] = conv
    for name in ("embed_tokens.weight", "layers.0.self_attn.q_proj.bias", "norm.weight"):
        arrays[decoder + name] = mx.zeros((1,))
    arrays[f"{head}weight"] = mx.zeros((1,))
    arrays[f"{decoder}layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros((1,))
    return {name: WeightData.from_array(array, name) for name, array in arrays.items()}


def check_layout(
    name: str, layouts: Sequence[Layout], tower: nn.Module, config: GridTowerConfig
) -> None:
    """config: of the tower, 16 wide with patches of 2 pixels and 2 frames."""
    weights = checkpoint(name, tower)
    layout = detect_layout(weights, layouts)
    if name != "canonical":
        assert layout.name == name
    once = adapt(weights, layout, config.transforms(), file_format="pt")
    assert set(below(once, "vision_model.")) == set(parameter_shapes(tower))
    assert set(below(once, "language_model.")) == {
        "embed_tokens.weight", "layers.0.self_attn.q_proj.bias", "norm.weight", "lm_head.weight",
    }  # fmt: skip
    matrix = once["vision_model.patch_embed.proj.weight"].data
    assert mx.array_equal(matrix, CONV.reshape(16, 24))
    twice = adapt(once, layout, config.transforms(), file_format="pt")
    assert twice.keys() == once.keys()
    assert all(mx.array_equal(twice[k].data, once[k].data) for k in once)
