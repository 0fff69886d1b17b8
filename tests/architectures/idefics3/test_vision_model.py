"""Position ids by the integer rule, padding, masks, and frames that do not see each other."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.idefics3 import vision_model
from mlx_vlm_pipes.architectures.idefics3.vision_model import patch_position_ids, real_frames
from tests.architectures.driving import load, relative
from tests.architectures.idefics3.stored import CASES, stored


@pytest.mark.parametrize("side", [14, 16, 24, 26, 27, 28, 32, 37, 64, 70])
def test_full_frames_use_the_table_in_order(side: int) -> None:
    ids = patch_position_ids(np.ones((1, side, side), np.bool_), side)
    assert np.array_equal(ids[0], np.arange(side**2))


def test_partial_masks_spread_over_the_table() -> None:
    mask = np.zeros((2, 4, 4), np.bool_)
    mask[0, :3, :2] = True  # 3 rows at 0, 1/3, 2/3; 2 columns at 0, 1/2
    mask[1, :1, :4] = True
    ids = patch_position_ids(mask, 4).reshape(2, 4, 4)
    assert ids[0].tolist() == [[0, 2, 0, 0], [4, 6, 0, 0], [8, 10, 0, 0], [0, 0, 0, 0]]
    assert ids[1].tolist() == [[0, 1, 2, 3], [0] * 4, [0] * 4, [0] * 4]


def test_boundaries_are_exact() -> None:
    """k * 26 / 13 is whole for every k, where float32 fractions fall on either side."""
    mask = np.zeros((1, 26, 26), np.bool_)
    mask[0, :13, :13] = True
    ids = patch_position_ids(mask, 26).reshape(26, 26)
    assert ids[0, :13].tolist() == list(range(0, 26, 2))
    assert ids[:13, 0].tolist() == [26 * k for k in range(0, 26, 2)]


def test_padding_frames_are_dropped_with_their_mask() -> None:
    pixels = np.zeros((1, 3, 3, 8, 8), np.float32)
    pixels[0, 0], pixels[0, 2, 0, 7, 7] = 1, -1
    mask = np.ones((1, 3, 8, 8), np.int64)
    mask[0, 2, :, 5:] = 0
    frames, patches = real_frames(pixels, mask, 4)
    assert frames.shape == (2, 3, 8, 8)
    assert patches is not None
    assert patches.tolist() == [[[True, True]] * 2] * 2  # one pixel is enough
    mask[0, 2, :, 4:] = 0
    patches = real_frames(pixels, mask, 4)[1]
    assert patches is not None
    assert patches[1].tolist() == [[True, False]] * 2
    assert real_frames(pixels, None, 4)[1] is None


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_frames_do_not_see_their_neighbours(path: Path) -> None:
    model, images = load(path), stored(path, "two").images
    config = model.model_config
    together = [np.array(rows) for rows in model.encode_images(images)]
    alone = [np.array(model.encode_images([image])[0]) for image in images]
    assert len(together) == len(images)
    for a, b in zip(together, alone, strict=True):
        assert a.shape == (config.image_seq_len, config.text_config.hidden_size)
        assert relative(a, b) < 1e-5
    assert model.encode_images([]) == []


def test_masked_patches_are_not_attended_to() -> None:
    model, frame = load(CASES[0]), stored(CASES[0], "one").images[0].pixel_values
    side = model.model_config.vision_config.patches_per_side
    mask = np.ones((1, side, side), np.bool_)
    mask[0, side // 2 :] = False
    other = frame.copy()
    other[:, frame.shape[1] // 2 :] += 3.0
    rows = [np.array(model.vision_model(mx.array(f[None]), mask)) for f in (frame, other)]
    half = len(rows[0]) // 2
    assert relative(rows[0][:half], rows[1][:half]) < 1e-5
    assert relative(rows[0][half:], rows[1][half:]) > 1e-2


def test_many_frames_go_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(CASES[0])
    vision = model.model_config.vision_config
    pixels = mx.random.normal((5, 3, *[vision.image_size] * 2), key=mx.random.key(0))
    mask = np.ones((5, *[vision.patches_per_side] * 2), np.bool_)
    mask[3, -1] = False
    whole = np.array(model.vision_model(pixels, mask))
    monkeypatch.setattr(vision_model, "MAX_PATCHES", 2 * mask[0].size)
    assert relative(np.array(model.vision_model(pixels, mask)), whole) < 1e-5
