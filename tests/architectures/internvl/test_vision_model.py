"""The tower's parts against torch's numbers, and independence of an image from its neighbours."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.internvl import InternVLConfig
from mlx_vlm_pipes.architectures.internvl import vision_model as rooms
from mlx_vlm_pipes.architectures.internvl.vision_model import (
    Attention,
    VisionModel,
    as_patches,
    bicubic_matrix,
    resize_positions,
)
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.processing.transforms import cut_tiles
from tests.architectures.driving import relative
from tests.architectures.internvl.driving import NATIVE, VISION, pipeline_config, tiles
from tests.device import bar


def build(**changes: object) -> tuple[InternVLConfig, VisionModel]:
    """A tower with random weights; `changes` go to the vision configuration."""
    vision = {**NATIVE["vision_config"], **changes}
    config = HuggingFaceConfig({**NATIVE, "vision_config": vision})
    config = InternVLConfig.initialize(pipeline_config(config))
    config.vision_config.o_proj_bias = True
    mx.random.seed(0)
    model = VisionModel(config)
    model.apply(lambda a: mx.random.normal(a.shape, scale=0.3))
    return config, model


def test_bicubic_rows_are_torchs() -> None:
    """torch.nn.functional.interpolate(mode="bicubic"), 4 to 8: borders repeat."""
    half = [
        [1.10546875, -0.10546875, 0, 0],
        [0.7734375, 0.26171875, -0.03515625, 0],
        [0.2265625, 0.87890625, -0.10546875, 0],
        [-0.10546875, 0.87890625, 0.26171875, -0.03515625],
    ]
    expected = np.array(half + [row[::-1] for row in half[::-1]])
    assert np.allclose(bicubic_matrix(4, 8), expected, atol=1e-7)
    assert np.allclose(bicubic_matrix(32, 24).sum(axis=1), 1)
    assert np.array_equal(bicubic_matrix(5, 5), np.eye(5, dtype=np.float32))


def test_positions_of_another_grid() -> None:
    table = mx.random.normal((17, 6))
    assert resize_positions(table, 4, 4) is table
    wide = np.array(resize_positions(table, 4, 8))
    assert wide.shape == (33, 6)
    assert np.array_equal(wide[0], np.array(table[0]))  # the class token's row stays
    row = bicubic_matrix(4, 8) @ np.array(table[1:5])
    assert np.allclose(wide[1:9], row, atol=bar(1e-5))


def test_both_pixel_layouts() -> None:
    pixels = tiles(2)
    cut = mx.array(cut_tiles(pixels, 4))
    assert mx.array_equal(as_patches(mx.array(pixels), 4), cut).item()
    assert as_patches(cut, 4) is cut
    for shape in ((2, 3, 16, 15), (2, 1, 16, 16), (2, 4, 4, 3, 4, 2)):
        with pytest.raises(InputError, match="pixel_values"):
            as_patches(mx.zeros(shape), 4)


def test_neighbours_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = build()
    pixels = tiles(5)
    alone = np.array(mx.concatenate([model(mx.array(pixels[i : i + 1])) for i in range(5)]))
    together = np.array(model(mx.array(pixels)))
    assert together.shape == (5 * 4, 32)
    assert relative(together, alone) < bar(1e-6)
    monkeypatch.setattr(rooms, "PASS_TOKENS", 2 * 17)  # two tiles a pass
    assert relative(np.array(model(mx.array(pixels))), alone) < bar(1e-6)


def test_query_norm_covers_all_features() -> None:
    """One mean square over all heads, taken before the split."""
    config, _ = build(use_qk_norm=True)
    attention = Attention(config.vision_config)
    x = mx.random.normal((17, VISION["hidden_size"]))
    expected = np.array(attention.q_proj(x))
    expected = expected / np.sqrt((expected**2).mean(axis=-1, keepdims=True) + 1e-6)
    assert relative(np.array(attention.q_norm(attention.q_proj(x))), expected) < bar(1e-5)


@pytest.mark.parametrize(("layer", "depth"), [(-1, 2), (-2, 1), (0, 0), (2, 2), (1, 1)])
def test_feature_layer(layer: int, depth: int) -> None:
    """Hidden state 0 is the embeddings; only the last one passes the final norm."""
    values = {**NATIVE, "vision_feature_layer": layer}
    values["vision_config"] = {**NATIVE["vision_config"], "use_mean_pooling": False}
    config = InternVLConfig.initialize(pipeline_config(HuggingFaceConfig(values)))
    tower = VisionModel(config).vision_model
    assert (tower.depth, tower.normed) == (depth, layer == -1)


def test_a_grid_that_does_not_divide() -> None:
    _, model = build()
    with pytest.raises(InputError, match="3 x 3 patches"):
        model(mx.zeros((1, 3, 12, 12)))


def test_true_size_unevaluated() -> None:
    """InternVL3's tower at 13 tiles of 448 pixels: shapes only, in milliseconds."""
    vision = {"model_type": "internvl_vision", "attention_bias": True}
    config = HuggingFaceConfig({**NATIVE, "vision_config": vision})
    model = VisionModel(InternVLConfig.initialize(pipeline_config(config)))
    assert model(mx.zeros((13, 32, 32, 3, 14, 14))).shape == (13 * 256, 32)
