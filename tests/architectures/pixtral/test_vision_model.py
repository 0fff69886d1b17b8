"""Patches, positions, 2-D rotation, and images that do not see each other."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.pixtral.vision_model import (
    PatchRotary,
    PixtralVision,
    image_grids,
    position_ids,
    split_positions,
    to_patches,
)
from mlx_vlm_pipes.contexts import ImageMetadata
from tests.architectures.driving import load, relative
from tests.architectures.pixtral.stored import CASES
from tests.architectures.pixtral.test_model_config import V4, initialize
from tests.device import bar


def pictures(path: Path, *sizes: tuple[int, int]) -> list[ImageMetadata]:
    """Random images of these sizes in patches."""
    random, p = np.random.default_rng(0), load(path).model_config.patch_size
    return [
        ImageMetadata(0, 1, random.normal(size=(3, h * p, w * p)).astype(np.float32))
        for h, w in sizes
    ]


def test_patches_are_row_major_channel_first() -> None:
    image = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    patches = to_patches(image, 2)
    assert patches.shape == (6, 8)
    assert np.array_equal(patches[4], image[:, 2:4, 2:4].reshape(-1))  # row 1, column 1


def test_positions_and_back() -> None:
    grids = image_grids([(3, 16, 24), (3, 8, 80), (3, 24, 8)], 8)
    assert grids.tolist() == [[2, 3], [1, 10], [3, 1]]
    ids = position_ids(grids, 4)
    assert ids[:6].tolist() == [0, 1, 2, 4, 5, 6]  # row * 4 + column
    assert ids[6:16].tolist() == list(range(10))  # wider than the side
    rows, columns = split_positions(ids, grids, 4)
    assert rows.tolist() == [0, 0, 0, 1, 1, 1] + [0] * 10 + [0, 1, 2]
    assert columns.tolist() == [0, 1, 2, 0, 1, 2, *range(10), 0, 0, 0]


def test_rotary_angles_alternate_between_axes() -> None:
    first, second = PatchRotary(8, 16.0)(np.array([2]), np.array([3]))
    angles = np.array([2 * 1.0, 2 * 16**-0.5, 3 * 16**-0.25, 3 * 16**-0.75])
    assert np.allclose(np.array(first)[0], [np.cos(angles), np.sin(angles)], atol=bar(1e-6))
    assert np.allclose(np.array(second)[0], [-np.sin(angles), np.cos(angles)], atol=bar(1e-6))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_images_do_not_see_their_neighbours(path: Path) -> None:
    model, images = load(path), pictures(path, (3, 5), (2, 2), (1, 9), (3, 5), (5, 3))
    together = [np.array(rows) for rows in model.encode_images(images)]
    alone = [np.array(model.encode_images([image])[0]) for image in images]
    assert [len(rows) for rows in together] == [15, 4, 9, 15, 15]
    for a, b in zip(together, alone, strict=True):
        assert relative(a, b) < bar(1e-5)
    assert relative(together[0], together[4]) > 1e-2
    assert model.encode_images([]) == []


def test_positions_matter() -> None:
    """The same patches in another arrangement give other rows."""
    path = CASES[0]
    model, (image,) = load(path), pictures(path, (2, 6))
    grids = np.array([[2, 6]], np.int32)
    patches = mx.array(to_patches(image.pixel_values, model.model_config.patch_size))
    side = model.model_config.image_size // model.model_config.patch_size
    rows = []
    for shape in ([2, 6], [3, 4]):
        ids = position_ids(np.array([shape], np.int32), side)
        rows.append(np.array(model.vision_model(patches, mx.array(grids), mx.array(ids))))
    assert relative(rows[1], rows[0]) > 1e-2


@pytest.mark.parametrize(("layers", "width"), [((-1,), 1), ((0,), 1), ((1, -2), 2)])
def test_feature_layers(layers: tuple[int, ...], width: int) -> None:
    """Hidden state 0 is the tower's input after its norm; several stand side by side."""
    config = replace(initialize(V4), vision_feature_layers=layers)
    module = PixtralVision(config)
    assert module.multi_modal_projector.linear_1.weight.shape == (64, 48 * width)
    grids = np.array([[2, 3]], np.int32)
    ids = position_ids(grids, 16)
    patches = mx.random.normal((6, 64), key=mx.random.key(0))
    rows, columns = split_positions(ids, grids, 16)
    states = module.vision_model(patches, rows, columns, [6])
    assert len(states) == 6
    first = module.vision_model.ln_pre(module.vision_model.patch_conv(patches))
    assert relative(np.array(states[0]), np.array(first)) == 0
    chosen = mx.concatenate([states[layer] for layer in layers], axis=-1)
    expected = np.array(module.multi_modal_projector(chosen))
    found = np.array(module(patches, mx.array(grids), mx.array(ids)))
    assert relative(found, expected) < bar(1e-6)


def test_true_size_shapes() -> None:
    """The released tower on a 1024 x 1024 image, unevaluated."""
    vision = {"model_type": "pixtral", "patch_size": 16, "image_size": 1024}
    config = initialize({**V4, "vision_config": vision})
    module = PixtralVision(config)
    grids = np.array([[64, 64]], np.int32)
    patches = mx.zeros((4096, 768))
    out = module(patches, mx.array(grids), mx.array(position_ids(grids, 64)))
    assert out.shape == (4096, 64)
