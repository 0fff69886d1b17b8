"""Every layout of Qwen2.5-VL's tensors leads to the same names and numbers."""

import mlx.core as mx
import pytest

from mlx_vlm_pipes.architectures.qwen2_5vl.vision_model import VisionModel
from mlx_vlm_pipes.architectures.qwen2_5vl.weight_adapters import LAYOUTS
from mlx_vlm_pipes.checkpoint.state import part
from mlx_vlm_pipes.weights import WeightData, adapt, detect_layout, parameter_shapes
from tests.architectures.qwen2_5vl.test_vision_model import tiny_config

# layout: (prefix of the decoder, of its head, of the vision tower)
PREFIXES = {
    "huggingface 4": ("model.", "lm_head.", "visual."),
    "huggingface": ("model.language_model.", "lm_head.", "model.visual."),
    "mlx-vlm": ("language_model.model.", "language_model.lm_head.", "vision_tower."),
    "canonical": ("language_model.", "language_model.lm_head.", "vision_model."),
}
CONV = mx.arange(16 * 24, dtype=mx.float32).reshape(16, 3, 2, 2, 2)  # [E, C, tp, p, p]


def checkpoint(layout: str) -> dict[str, WeightData]:
    decoder, head, vision = PREFIXES[layout]
    shapes = parameter_shapes(VisionModel(tiny_config()))
    arrays = {vision + name: mx.zeros(shape) for name, shape in shapes.items()}
    conv = mx.moveaxis(CONV, 1, -1) if layout == "mlx-vlm" else CONV
    arrays[f"{vision}patch_embed.proj.weight"] = conv
    for name in ("embed_tokens.weight", "layers.0.self_attn.q_proj.bias", "norm.weight"):
        arrays[decoder + name] = mx.zeros((1,))
    arrays[f"{head}weight"] = mx.zeros((1,))
    arrays[f"{decoder}layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros((1,))
    return {name: WeightData.from_array(array, name) for name, array in arrays.items()}


@pytest.mark.parametrize("name", PREFIXES)
def test_layouts(name: str) -> None:
    weights = checkpoint(name)
    layout = detect_layout(weights, LAYOUTS)
    if name != "canonical":
        assert layout.name == name
    once = adapt(weights, layout, tiny_config().transforms(), file_format="pt")
    assert set(part(once, "vision_model.")) == set(parameter_shapes(VisionModel(tiny_config())))
    assert set(part(once, "language_model.")) == {
        "embed_tokens.weight", "layers.0.self_attn.q_proj.bias", "norm.weight", "lm_head.weight",
    }  # fmt: skip
    matrix = once["vision_model.patch_embed.proj.weight"].data
    assert mx.array_equal(matrix, CONV.reshape(16, 24))
    twice = adapt(once, layout, tiny_config().transforms(), file_format="pt")
    assert twice.keys() == once.keys()
    assert all(mx.array_equal(twice[k].data, once[k].data) for k in once)
