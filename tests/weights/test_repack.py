"""GPTQ, AWQ and pack-quantized weights against dequantisation written out in numpy."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import WeightsError
from mlx_vlm_pipes.quantization import QuantizationConfig
from mlx_vlm_pipes.weights import (
    WeightData,
    drop_dummy_biases,
    install_weights,
    quantize_modules,
    unpack_checkpoint,
)

IN, OUT = 128, 64


def pack_down(codes: np.ndarray, bits: int) -> np.ndarray:
    """[n, m] codes -> int32 [n*bits/32, m]: one bit stream down each column, lowest bit first."""
    stream = np.concatenate(
        [(codes[i] >> b & 1)[None] for i in range(len(codes)) for b in range(bits)]
    )
    words = stream.reshape(-1, 32, codes.shape[1]).astype(np.uint64)
    shifts = np.arange(32, dtype=np.uint64)[None, :, None]
    return (words << shifts).sum(axis=1).astype(np.uint32).view(np.int32)


def state_of(**arrays: np.ndarray) -> dict[str, WeightData]:
    return {
        f"layer.{name}": WeightData.from_numpy(array, f"layer.{name}")
        for name, array in arrays.items()
    }


def draw(bits: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [IN, OUT], zeros [groups, OUT], scales [groups, OUT]."""
    rng = np.random.default_rng(bits * 100 + groups)
    codes = rng.integers(0, 2**bits, (IN, OUT))
    zeros = rng.integers(0, 2**bits, (groups, OUT))
    return codes, zeros, rng.uniform(0.01, 0.1, (groups, OUT)).astype(np.float32)


def check(
    state: dict[str, WeightData], settings: QuantizationConfig, expected: np.ndarray, group: int
) -> None:
    """Unpacked and installed, the layer multiplies by the expected [IN, OUT] matrix.

    group: the MLX group size it should end in, 0 for a plain linear.
    """
    unpacked, left = unpack_checkpoint(state, settings, DType.float32)
    assert left == (QuantizationConfig("mlx", settings.bits, group) if group else None)
    model = nn.Module()
    model.layer = nn.Linear(IN, OUT, bias=False)
    if left is not None:
        quantize_modules(model, {name: w.shape for name, w in unpacked.items()}, left)
    assert isinstance(model.layer, nn.QuantizedLinear) == bool(group)
    install_weights(model, unpacked)
    weights = np.array(model.layer(mx.eye(IN)))
    np.testing.assert_allclose(weights, expected, atol=2e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_asymmetric(bits: int, version: str) -> None:
    codes, zeros, scales = draw(bits, 2)
    expected = scales.repeat(64, axis=0) * (codes - zeros.repeat(64, axis=0))
    stored = (zeros - 1) % 2**bits if version == "gptq" else zeros
    state = state_of(
        qweight=pack_down(codes, bits),
        qzeros=pack_down(stored.T, bits).T.copy(),
        scales=scales,
        g_idx=(np.arange(IN) // 64).astype(np.int32),
    )
    check(state, QuantizationConfig("gptq", bits, 64, sym=False, mode=version), expected, 64)


def test_gptq_symmetric_needs_no_zeros_and_a_whole_row_becomes_several_groups() -> None:
    codes, _, scales = draw(4, 1)
    expected = scales * (codes - 8.0)
    state = state_of(qweight=pack_down(codes, 4), scales=scales)
    check(state, QuantizationConfig("gptq", 4, -1, sym=True, mode="gptq"), expected, 128)


def test_gptq_with_reordered_groups_becomes_floats() -> None:
    codes, zeros, scales = draw(4, 4)
    groups = np.random.default_rng(0).permutation(np.arange(IN) // 32).astype(np.int32)
    expected = scales[groups] * (codes - zeros[groups])
    packed_zeros = pack_down((zeros.T - 1) % 16, 4).T.copy()
    state = state_of(qweight=pack_down(codes, 4), qzeros=packed_zeros, scales=scales, g_idx=groups)
    settings = QuantizationConfig("gptq", 4, 32, desc_act=True, sym=False, mode="gptq")
    check(state, settings, expected, 0)
    groups[5] = 4
    with pytest.raises(WeightsError, match="groups that do not exist"):
        unpack_checkpoint(state | state_of(g_idx=groups), settings)


def test_a_group_size_that_mlx_lacks_becomes_floats() -> None:
    codes, _, scales = draw(4, 8)
    expected = scales.repeat(16, axis=0) * (codes - 8.0)
    state = state_of(qweight=pack_down(codes, 4), scales=scales)
    check(state, QuantizationConfig("gptq", 4, 16, sym=True, mode="gptq"), expected, 0)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """[n, m] codes -> int32 [n, m/8]; a word's nibbles hold columns 0, 2, 4, 6, 1, 3, 5, 7."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def test_awq() -> None:
    codes, zeros, scales = draw(4, 4)
    expected = scales.repeat(32, axis=0) * (codes - zeros.repeat(32, axis=0))
    state = state_of(qweight=pack_awq(codes), qzeros=pack_awq(zeros), scales=scales)
    check(state, QuantizationConfig("awq", 4, 32, mode="gemm"), expected, 32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_pack_quantized(bits: int, symmetric: bool) -> None:
    codes, zeros, scales = draw(bits, 2)
    middle = 2 ** (bits - 1)
    expected = scales.repeat(64, axis=0) * (codes - (middle if symmetric else zeros.repeat(64, 0)))
    state = state_of(
        weight_packed=pack_down(codes, bits).T.copy(),
        weight_scale=scales.T.copy(),
        weight_shape=np.array([OUT, IN]),
    )
    if not symmetric:
        state |= state_of(weight_zero_point=pack_down(zeros.T, bits))
    settings = QuantizationConfig(
        "compressed-tensors", bits, 64, sym=symmetric, mode="pack-quantized"
    )
    check(state, settings, expected, 64)


def without(name: str) -> Callable[[dict[str, WeightData]], dict[str, WeightData]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("layer.qzeros"), "'layer.qzeros' is missing"),
        (lambda s: s | state_of(scales=np.ones((3, OUT), np.float32)), r"expected float \[2, 64\]"),
        (lambda s: s | state_of(qweight=np.ones((3, OUT), np.int32)), "24 inputs"),
        (lambda s: s | state_of(qweight=np.ones((16, OUT), np.int8)), "expected int32"),
        (lambda s: s | state_of(g_idx=np.ones((5,), np.int32)), "g_idx"),
    ],
)
def test_damaged_gptq_is_refused(damage: Callable, message: str) -> None:
    codes, zeros, scales = draw(4, 2)
    state = state_of(
        qweight=pack_down(codes, 4), qzeros=pack_down(zeros.T, 4).T.copy(), scales=scales
    )
    with pytest.raises(WeightsError, match=message):
        unpack_checkpoint(damage(state), QuantizationConfig("gptq", 4, 64, mode="gptq"))


def test_dummy_biases_go_and_real_ones_stay() -> None:
    zero, one, matrix = np.zeros(2, np.float32), np.ones(2, np.float32), np.ones((2, 2), np.float32)
    arrays = {f"{name}.weight": matrix for name in "abc"} | {"norm.weight": one}
    arrays |= {"a.bias": zero, "b.bias": zero, "c.bias": one, "norm.bias": zero}
    state = {name: WeightData.from_numpy(array, name) for name, array in arrays.items()}
    kept = drop_dummy_biases(state, {"b.bias": None})
    assert state.keys() - kept.keys() == {"a.bias"}
