"""Every layout of Qwen3-VL's tensors leads to the same names and numbers."""

import mlx.core as mx
import pytest

from mlx_vlm_pipes.architectures.qwen3_vl.vision_model import VisionModel
from mlx_vlm_pipes.architectures.qwen3_vl.weight_adapters import LAYOUTS
from mlx_vlm_pipes.checkpoint.state import below
from mlx_vlm_pipes.weights import WeightData, adapt, detect_layout, map_names, parameter_shapes
from tests.architectures.qwen3_vl.test_vision_model import tiny_config

# layout: (prefix of the decoder, of its head, of the vision tower)
PREFIXES = {
    "huggingface": ("model.language_model.", "lm_head.", "model.visual."),
    "mlx-vlm": ("language_model.model.", "language_model.lm_head.", "vision_tower."),
    "canonical": ("language_model.", "language_model.lm_head.", "vision_model."),
}
CONV = mx.arange(16 * 24, dtype=mx.float32).reshape(16, 3, 2, 2, 2)  # [E, C, tp, p, p]
NAMES = ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "norm.weight")


def checkpoint(layout: str) -> dict[str, WeightData]:
    decoder, head, vision = PREFIXES[layout]
    shapes = parameter_shapes(VisionModel(tiny_config()))
    arrays = {vision + name: mx.zeros(shape) for name, shape in shapes.items()}
    conv = mx.moveaxis(CONV, 1, -1) if layout == "mlx-vlm" else CONV
    arrays[f"{vision}patch_embed.proj.weight"] = conv
    arrays |= {decoder + name: mx.zeros((1,)) for name in NAMES}
    arrays[f"{head}weight"] = mx.zeros((1,))
    return {name: WeightData.from_array(array, name) for name, array in arrays.items()}


@pytest.mark.parametrize("name", PREFIXES)
def test_layouts(name: str) -> None:
    weights = checkpoint(name)
    layout = detect_layout(weights, LAYOUTS)
    if name != "canonical":
        assert layout.name == name
    once = adapt(weights, layout, tiny_config().transforms(), file_format="pt")
    assert set(below(once, "vision_model.")) == set(parameter_shapes(VisionModel(tiny_config())))
    assert set(below(once, "language_model.")) == {*NAMES, "lm_head.weight"}
    matrix = once["vision_model.patch_embed.proj.weight"].data
    assert mx.array_equal(matrix, CONV.reshape(16, 24))
    twice = adapt(once, layout, tiny_config().transforms(), file_format="pt")
    assert twice.keys() == once.keys()
    assert all(mx.array_equal(twice[k].data, once[k].data) for k in once)


def test_names_that_mlx_lm_and_mlx_vlm_write() -> None:
    """What their `sanitize` makes of the released names (mlx-lm keeps the decoder only)."""
    text = {
        "language_model.model.layers.3.mlp.up_proj.weight": "layers.3.mlp.up_proj.weight",
        "language_model.model.embed_tokens.scales": "embed_tokens.scales",
        "language_model.lm_head.weight": "lm_head.weight",
    }
    tower = {
        "vision_tower.deepstack_merger_list.2.linear_fc1.biases":
            "vision_model.deepstack_merger_list.2.linear_fc1.biases",
        "vision_tower.pos_embed.weight": "vision_model.pos_embed.weight",
    }  # fmt: skip
    wanted = {name: f"language_model.{ours}" for name, ours in text.items()}
    for names, expected in ((text, wanted), (text | tower, wanted | tower)):
        assert map_names(names, detect_layout(names, LAYOUTS)) == expected
