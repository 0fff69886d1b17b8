"""The vision tower against stored numbers, and what its attention may touch."""

import dataclasses
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.qwen2_5vl.context import VisionSizes, window_index
from mlx_vlm_pipes.architectures.qwen2_5vl.model_config import VisionConfig
from mlx_vlm_pipes.architectures.qwen2_5vl.vision_model import VisionModel, window_order
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.processing.grids import Grid, cu_seqlens, vision_position_ids
from tests.architectures.grid_towers import GRIDS, fill_with_waves, pixels
from tests.device import bar

# transformers 5.23, Qwen2_5_VisionTransformerPretrainedModel on `wave` weights and pixels, float32
ROWS = {
    0: [-0.191358, -0.35694, -0.308041, -0.080491, 0.184506, 0.328391],
    7: [-0.522425, -0.647876, -0.374916, 0.118974, 0.524208, 0.59357],
    14: [-0.280044, -0.564783, -0.503642, -0.14019, 0.29845, 0.543943],
    15: [-0.324601, -0.393047, -0.224185, 0.070314, 0.306921, 0.345025],
    19: [-0.566258, -0.781297, -0.513577, 0.062735, 0.585946, 0.734254],
    22: [-0.546043, -0.787605, -0.542418, 0.029594, 0.569456, 0.744841],
    27: [-0.4755, -0.568882, -0.313792, 0.123584, 0.46939, 0.513981],
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
        intermediate_size=12,
        out_hidden_size=6,
        fullatt_block_indexes=[1],
        rms_norm_eps=1e-6,
        window_size=16,
        spatial_merge_size=2,
    )


def tiny_model(config: VisionConfig | None = None) -> VisionModel:
    model = VisionModel(config or tiny_config())
    fill_with_waves(model)
    return model


def encode(model: VisionModel, values: np.ndarray, grids: Sequence[Grid]) -> mx.array:
    order, windows = window_index(grids, VisionSizes(2, 2, 16))
    frames = cu_seqlens(grids)
    longest = [mx.array(np.diff(table).max(keepdims=True)) for table in (frames, windows)]
    tables = (vision_position_ids(grids, 2), order, frames, windows)
    largest = mx.array(max(max(h, w) for _, h, w in grids))
    arguments = [*(mx.array(table) for table in tables), *longest, largest]
    return model(mx.array(values), *arguments)


def test_rows_are_the_reference_s() -> None:
    rows = np.array(encode(tiny_model(), pixels(GRIDS), GRIDS))
    assert rows.shape == (28, 6)
    np.testing.assert_allclose(rows[list(ROWS)], list(ROWS.values()), atol=bar(1e-5))


def test_pictures_do_not_see_each_other() -> None:
    model, values, begin, alone = tiny_model(), pixels(GRIDS), 0, []
    for t, h, w in GRIDS:
        end = begin + t * h * w
        alone.append(np.array(encode(model, values[begin:end], [(t, h, w)])))
        begin = end
    together = np.array(encode(model, values, GRIDS))
    np.testing.assert_allclose(np.concatenate(alone), together, atol=bar(1e-5))


def test_windowed_layers_never_look_further_than_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = mx.fast.scaled_dot_product_attention

    def spy(q: mx.array, k: mx.array, v: mx.array, **options: object) -> mx.array:
        assert options.get("mask") is None
        seen.append(k.shape)
        return real(q, k, v, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]  # passed on

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    model = tiny_model(dataclasses.replace(tiny_config(), fullatt_block_indexes=[], depth=1))
    grids = [(1, 36, 20)]  # 18 x 10 merged: 8 whole windows, 6 cut in half, a corner
    mx.eval(encode(model, pixels(grids), grids))
    assert sorted((shape[0], shape[2]) for shape in seen) == [(1, 16), (6, 32), (8, 64)]


def test_dtypes() -> None:
    config = dataclasses.replace(tiny_config(), dtype=DType.float16, llm_dtype=DType.bfloat16)
    model = tiny_model(config)
    model.set_dtype(mx.float16)
    assert encode(model, pixels(GRIDS), GRIDS).dtype == mx.bfloat16


def test_window_order_keeps_windows_whole() -> None:
    order, boundaries = window_index([(1, 6, 10), (1, 12, 4)], VisionSizes(2, 2, 16))
    units, lengths = window_order(order, boundaries, 4)
    before = np.split(order, boundaries[1:-1] // 4)
    after = np.split(units, np.cumsum(lengths)[:-1] // 4)
    assert lengths.tolist() == sorted(len(window) * 4 for window in before)
    assert sorted(map(list, before)) == sorted(map(list, after))
