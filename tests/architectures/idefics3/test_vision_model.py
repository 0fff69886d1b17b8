"""Position ids by the integer rule, and frames that do not see each other."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.idefics3 import vision_model
from mlx_vlm_pipes.architectures.idefics3.vision_model import patch_position_ids
from tests.architectures.driving import load, relative
from tests.architectures.idefics3.stored import CASES, stored
from tests.device import bar


@pytest.mark.parametrize("side", [14, 16, 24, 26, 27, 28, 32, 37, 64, 70])
def test_full_frames_use_the_table_in_order(side: int) -> None:
    assert patch_position_ids(side, side, side).tolist() == list(range(side**2))


def test_other_frames_spread_over_the_table() -> None:
    """3 rows at 0, 1/3, 2/3; 2 columns at 0, 1/2."""
    assert patch_position_ids(3, 2, 4).tolist() == [0, 2, 4, 6, 8, 10]


def test_boundaries_are_exact() -> None:
    """k * 26 / 13 is whole for every k, where float32 fractions fall on either side."""
    ids = patch_position_ids(13, 13, 26).reshape(13, 13)
    assert ids[0].tolist() == list(range(0, 26, 2))
    assert ids[:, 0].tolist() == [26 * k for k in range(0, 26, 2)]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_frames_do_not_see_their_neighbours(path: Path) -> None:
    model, images = load(path), stored(path, "two").images
    config = model.model_config
    together = [np.array(rows) for rows in model.encode_images(images)]
    alone = [np.array(model.encode_images([image])[0]) for image in images]
    assert len(together) == len(images)
    for a, b in zip(together, alone, strict=True):
        assert a.shape == (config.image_seq_len, config.text_config.hidden_size)
        assert relative(a, b) < bar(1e-5)
    assert model.encode_images([]) == []


def test_many_frames_go_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(CASES[0])
    vision = model.model_config.vision_config
    pixels = mx.random.normal((5, 3, *[vision.image_size] * 2), key=mx.random.key(0))
    whole = np.array(model.vision_model(pixels))
    monkeypatch.setattr(vision_model, "MAX_PATCHES", 2 * vision.patches_per_side**2)
    assert relative(np.array(model.vision_model(pixels)), whole) < bar(1e-5)
