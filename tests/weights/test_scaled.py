"""fp8, int8 and fp4 with scales, against their definitions written out in numpy."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import WeightsError
from mlx_vlm_pipes.quantization import QuantizationConfig, ScaleSpec
from mlx_vlm_pipes.weights import ScaledFormat, WeightData, record_scales, unpack_checkpoint

CT_FP8 = ScaledFormat("compressed-tensors", "compressed-tensors-fp8")
BLOCKS = ScaledFormat("fp8", "blockscaled-fp8", (2, 3))


def e4m3(byte: int) -> float:
    """OCP E4M3FN: sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinities."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def fp8(values: np.ndarray, name: str = "layer.weight") -> WeightData:
    data = mx.array(values.astype(np.uint8))
    return WeightData(data, name, DType.float8_e4m3fn, tuple(values.shape))


def named(name: str, values: Any) -> dict[str, WeightData]:
    return {name: WeightData.from_numpy(np.asarray(values, np.float32), name)}


def unpacked(state: dict[str, WeightData], settings: ScaledFormat | None) -> np.ndarray:
    result, left = unpack_checkpoint(state, settings, DType.float32)
    assert left is None
    assert list(result) == ["layer.weight"]
    return np.array(result["layer.weight"].data)


BYTES = np.random.default_rng(5).integers(0, 127, (4, 7))  # 127 is NaN
VALUES = np.vectorize(e4m3)(BYTES)
RNG = np.random.default_rng(6)
ROWS, WHOLE, GRID = RNG.uniform(0.1, 2, (4, 1)), RNG.uniform(0.1, 2), RNG.uniform(0.1, 2, (2, 3))


@pytest.mark.parametrize(
    ("scale_name", "scale", "settings", "factors"),
    [
        ("layer.weight_scale", WHOLE, CT_FP8, WHOLE),
        ("layer.weight_scale", [WHOLE], CT_FP8, WHOLE),
        ("layer.weight_scale", ROWS, CT_FP8, ROWS),
        ("layer.weight_scale", ROWS[:, 0], ScaledFormat("fbgemm_fp8", "fbgemm-fp8"), ROWS),
        (
            "layer.weight_scale_inv",
            GRID,
            BLOCKS,
            GRID.repeat(2, axis=0).repeat(3, axis=1)[:, :7],
        ),
    ],
)
def test_fp8_scales(scale_name: str, scale: Any, settings: ScaledFormat, factors: Any) -> None:
    state = {"layer.weight": fp8(BYTES)} | named(scale_name, scale) | named("layer.input_scale", 1)
    np.testing.assert_allclose(unpacked(state, settings), VALUES * factors, rtol=1e-6)


def test_every_fp8_value_even_without_scales_or_config() -> None:
    table = np.arange(256).reshape(2, 128)
    expected = np.vectorize(e4m3)(table)
    np.testing.assert_array_equal(unpacked({"layer.weight": fp8(table)}, None), expected)
    result, _ = unpack_checkpoint({"layer.weight": fp8(table)}, None)
    assert result["layer.weight"].dtype is DType.bfloat16


def test_fp8_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    stored = weights.to(torch.float8_e4m3fn)
    state = {"layer.weight": fp8(stored.view(torch.uint8).numpy())}
    np.testing.assert_array_equal(unpacked(state, None), stored.float().numpy())


def test_int8_with_zero_points() -> None:
    values = np.arange(-6, 6).reshape(4, 3).astype(np.int8)
    settings = ScaledFormat("compressed-tensors", "int8")
    state = {"layer.weight": WeightData.from_numpy(values, "layer.weight")}
    state |= named("layer.weight_scale", ROWS) | named("layer.weight_zero_point", [[3]] * 4)
    np.testing.assert_allclose(unpacked(state, settings), (values - 3.0) * ROWS, rtol=1e-6)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.mark.parametrize("origin", ["compressed-tensors", "modelopt"])
def test_nvfp4(origin: str) -> None:
    codes = np.random.default_rng(8).integers(0, 16, (2, 32))
    scales = np.random.default_rng(9).integers(40, 80, (2, 2))
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    plain = np.where(codes < 8, E2M1[codes % 8], -E2M1[codes % 8])
    expected = plain * np.vectorize(e4m3)(scales).repeat(16, axis=1)
    modelopt = origin == "modelopt"
    weight_name = "layer.weight" if modelopt else "layer.weight_packed"
    state = {weight_name: WeightData.from_numpy(packed, weight_name)}
    state["layer.weight_scale"] = fp8(scales, "layer.weight_scale")
    factor = 0.25 if modelopt else 4.0
    state |= named("layer.weight_scale_2" if modelopt else "layer.weight_global_scale", factor)
    result = unpacked(state, ScaledFormat(origin, "nvfp4"))
    np.testing.assert_allclose(result, expected / 4, rtol=1e-6)


def test_mxfp4_stays_packed() -> None:
    weights = mx.random.normal((4, 64))
    words, scales = tuple(mx.quantize(weights, mode="mxfp4"))[:2]
    state = {
        "a.weight_packed": WeightData.from_array(words.view(mx.uint8), "a.weight_packed"),
        "a.weight_scale": WeightData.from_array(scales, "a.weight_scale"),
    }
    result, left = unpack_checkpoint(state, ScaledFormat("compressed-tensors", "mxfp4"))
    assert left == QuantizationConfig("mlx", 4, 32, mode="mxfp4")
    assert mx.array_equal(result["a.weight"].data, words)
    assert mx.array_equal(result["a.scales"].data, scales)


@pytest.mark.parametrize(
    ("state", "settings", "message"),
    [
        (named("layer.weight_scale", 1.0), CT_FP8, "without a scaled weight"),
        (
            {"layer.weight": fp8(BYTES)} | named("layer.weight_scale", np.ones((3, 7))),
            CT_FP8,
            r"\[3, 7\], which scales neither",
        ),
        (
            {"layer.weight": fp8(BYTES)} | named("layer.weight_scale_inv", np.ones((2, 2))),
            BLOCKS,
            "nor its blocks",
        ),
        (
            {"layer.weight": fp8(BYTES)} | named("layer.weight_scale_2", 1.0),
            ScaledFormat("modelopt", "nvfp4"),
            "expected uint8",
        ),
    ],
)
def test_scales_that_do_not_fit(
    state: dict[str, WeightData], settings: ScaledFormat, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        unpack_checkpoint(state, settings)


def test_the_record_names_wholly_scaled_layers() -> None:
    state: dict[str, WeightData] = {}
    for layer, part, scaled in (
        (0, "gate", True),
        (0, "up", True),
        (1, "gate", True),
        (1, "up", False),
    ):
        module = f"language_model.layers.{layer}.mlp.{part}_proj"
        state[f"{module}.weight"] = fp8(BYTES, f"{module}.weight")
        if scaled:
            state |= named(f"{module}.weight_scale", ROWS)
    record = record_scales(state, CT_FP8)
    assert record is not None
    assert record.mlp_quantized_layers == {0}
    assert record.attn_quantized_layers == set()
    assert record.weight_scale == ScaleSpec("rowwise", DType.float32)
    assert record_scales({}, CT_FP8) is None
