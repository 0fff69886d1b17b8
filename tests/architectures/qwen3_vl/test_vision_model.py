"""The vision tower against stored numbers, and what its attention may touch."""

import dataclasses
import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.qwen3_vl.context import VisionData, interpolation
from mlx_vlm_pipes.architectures.qwen3_vl.model_config import VisionConfig
from mlx_vlm_pipes.architectures.qwen3_vl.sizes import VisionSizes
from mlx_vlm_pipes.architectures.qwen3_vl.vision_model import VisionModel
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.processing.grids import Grid, GridImage
from tests.architectures.grid_towers import GRIDS, check_frames_are_apart, fill_with_waves, pixels
from tests.device import bar

SIZES = VisionSizes(2, 2, 2, 5)
# transformers 5.23, Qwen3VLVisionModel on `wave` weights and pixels, float32: every third number
# of the merged rows and of the two sets that deepstack adds
ROWS = {
    0: [-0.524755, 0.019588, -0.851388, -0.206226, -0.102252, -0.64893],
    7: [0.022199, -0.392189, 0.56678, -1.033868, 0.572183, -1.059546],
    14: [-0.527115, -0.09503, -0.63181, -0.507826, 0.049862, -0.85195],
    15: [-0.711806, -0.023756, -0.812169, -0.746678, -0.14397, -0.902839],
    19: [-0.691112, -0.136749, -0.766181, -0.912678, -0.036421, -0.994117],
    22: [-0.91981, 0.295388, -1.184494, 0.082649, -0.397629, -0.407475],
    27: [-0.391384, -0.267659, -0.180983, -0.900107, 0.255866, -1.010387],
}


def tiny_config() -> VisionConfig:
    return VisionConfig(
        dtype=DType.float32,
        llm_dtype=DType.float32,
        patch_size=2,
        temporal_patch_size=2,
        in_channels=3,
        hidden_size=16,
        num_attention_heads=2,
        depth=3,
        intermediate_size=12,
        out_hidden_size=6,
        spatial_merge_size=2,
        num_position_embeddings=25,
        deepstack_visual_indexes=[2, 0],
    )


def tiny_model(config: VisionConfig | None = None) -> VisionModel:
    model = VisionModel(config or tiny_config())
    fill_with_waves(model)
    return model


def encode(model: VisionModel, values: np.ndarray, grids: Sequence[Grid]) -> mx.array:
    data = VisionData(tuple(GridImage(0, 1, np.zeros(0), None, grid) for grid in grids), SIZES)
    tables = (data.vision_position_ids, *data.interpolation, data.cu_seqlens)
    return model(mx.array(values), *(mx.array(table) for table in tables))


def test_rows_are_the_reference_s() -> None:
    rows = np.array(encode(tiny_model(), pixels(GRIDS), GRIDS))
    assert rows.shape == (28, 3 * 6)
    np.testing.assert_allclose(rows[list(ROWS), ::3], list(ROWS.values()), atol=bar(1e-5))


def test_pictures_and_frames_do_not_see_each_other() -> None:
    check_frames_are_apart(functools.partial(encode, tiny_model()))


def test_places_in_the_learned_table() -> None:
    """Numbers of transformers' get_vision_interpolation_indices_and_weights, a table of 5 x 5."""
    places, shares = interpolation([(1, 4, 6)], SIZES)
    assert (places.dtype, shares.dtype) == (np.int32, np.float32)
    assert places[[0, 3, 5, 23]].tolist() == [
        [0, 1, 5, 6], [5, 6, 10, 11], [2, 3, 7, 8], [24, 24, 24, 24],
    ]  # fmt: skip
    wanted = [[1, 0, 0, 0], [2 / 15, 8 / 15, 1 / 15, 4 / 15], [0.6, 0.4, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(shares[[0, 3, 5, 23]], wanted, atol=bar(1e-6))
    lone, own = interpolation([(1, 2, 2)], SIZES)
    assert lone[:, 0].tolist() == [0, 4, 20, 24]
    np.testing.assert_array_equal(own[:, 0], np.ones(4))


def test_dtypes() -> None:
    config = dataclasses.replace(tiny_config(), dtype=DType.float16, llm_dtype=DType.bfloat16)
    model = tiny_model(config)
    model.set_dtype(mx.float16)
    assert encode(model, pixels(GRIDS), GRIDS).dtype == mx.bfloat16
