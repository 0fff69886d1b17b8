"""The vision tower against stored numbers, and what its attention may touch."""

import dataclasses
import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.qwen2_vl.context import VisionData
from mlx_vlm_pipes.architectures.qwen2_vl.model_config import VisionConfig
from mlx_vlm_pipes.architectures.qwen2_vl.vision_model import VisionModel
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.processing.grids import Grid, GridImage
from tests.architectures.grid_towers import GRIDS, check_frames_are_apart, fill_with_waves, pixels
from tests.device import bar

# transformers 5.23, Qwen2VisionTransformerPretrainedModel on `wave` weights and pixels, float32:
# every third number of the merged rows
ROWS = {
    0: [-0.486046, 0.126456],
    7: [-0.739527, 0.298157],
    14: [-0.548402, 0.098733],
    15: [-0.552693, 0.219869],
    19: [-0.774003, 0.231054],
    22: [-0.748593, 0.197759],
    27: [-0.689831, 0.2906],
}


def tiny_config() -> VisionConfig:
    return VisionConfig(
        dtype=DType.float32,
        llm_dtype=DType.float32,
        devices=[],
        patch_size=2,
        temporal_patch_size=2,
        in_channels=3,
        hidden_size=16,
        num_attention_heads=2,
        depth=3,
        intermediate_size=32,
        out_hidden_size=6,
        spatial_merge_size=2,
    )


def tiny_model(config: VisionConfig | None = None) -> VisionModel:
    model = VisionModel(config or tiny_config())
    fill_with_waves(model, lambda name: name.replace("ln_q", "norm"))
    return model


def encode(model: VisionModel, values: np.ndarray, grids: Sequence[Grid]) -> mx.array:
    data = VisionData(tuple(GridImage(0, 1, np.zeros(0), None, grid) for grid in grids), 2)
    tables = (data.vision_position_ids, data.cu_seqlens)
    return model(mx.array(values), *(mx.array(table) for table in tables))


def test_rows_are_the_reference_s() -> None:
    rows = np.array(encode(tiny_model(), pixels(GRIDS), GRIDS))
    assert rows.shape == (28, 6)
    np.testing.assert_allclose(rows[list(ROWS), ::3], list(ROWS.values()), atol=bar(1e-5))


def test_pictures_and_frames_do_not_see_each_other() -> None:
    check_frames_are_apart(functools.partial(encode, tiny_model()))


def test_dtypes() -> None:
    config = dataclasses.replace(tiny_config(), dtype=DType.float16, llm_dtype=DType.bfloat16)
    model = tiny_model(config)
    model.set_dtype(mx.float16)
    assert encode(model, pixels(GRIDS), GRIDS).dtype == mx.bfloat16
