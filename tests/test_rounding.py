"""16-bit attention, packed products and unpacking round once, whatever MLX's kernels do."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.rounding import attend, packed_product, unpack
from mlx_vlm_pipes.weights.packed import PackedEmbedding

HALVES = [mx.bfloat16, mx.float16]


def normal(seed: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)).astype(
        dtype
    )


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def errors(found: mx.array, wanted: np.ndarray) -> list[float]:
    """Root mean square error of a result, and of the wanted numbers rounded to its dtype."""
    best = mx.array(wanted.astype(np.float32)).astype(found.dtype)
    return [float(np.sqrt(np.mean((wide(x) - wanted) ** 2))) for x in (found, best)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("queries", "mask"), [(1, None), (70, "causal")])
def test_attention(dtype: mx.Dtype, queries: int, mask: str | None) -> None:
    q, k, v = (normal(i, (1, 3, n, 64), dtype) for i, n in enumerate((queries, 70, 70)))
    scores = wide(q) @ wide(k).swapaxes(-1, -2) * 0.125
    if mask is not None:
        scores = np.where(np.tri(70, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ wide(v)
    found, best = errors(attend(q, k, v, scale=0.125, mask=mask), wanted)
    assert found < 1.3 * best  # scores rounded to 16 bits: more than 2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("transpose", [True, False])
def test_packed_products(dtype: mx.Dtype, rows: int, transpose: bool) -> None:
    shape = (96, 512) if transpose else (512, 128)
    packed = mx.quantize(normal(1, shape, dtype) * 512**-0.5, 64, 4)
    x = normal(2, (rows, 512), dtype)
    weights = np.array(unpack(*packed, group_size=64, bits=4, dtype=mx.float32))
    wanted = wide(x) @ (weights.T if transpose else weights).astype(np.float64)
    out = packed_product(x, *packed, group_size=64, bits=4, transpose=transpose)
    assert out.dtype == dtype
    found, best = errors(out, wanted)
    assert found < 4 * best  # sums in 16 bits: 8 to 16


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_unpacked_numbers_are_those_of_float32_rounded(mode: str) -> None:
    group = 64 if mode == "affine" else 32
    packed = mx.quantize(normal(3, (40, 128), mx.bfloat16), group, 4, mode)
    biases = packed[2] if len(packed) > 2 else None
    settings = {"group_size": group, "bits": 4, "mode": mode}
    exact = unpack(packed[0], packed[1], biases, **settings, dtype=mx.float32)
    if biases is not None:
        codes = (np.array(packed[0])[..., None] >> np.arange(0, 32, 4)) & 15
        scales, shifts = (np.repeat(wide(a), group, axis=1) for a in (packed[1], biases))
        assert np.allclose(wide(exact), codes.reshape(40, 128) * scales + shifts, atol=1e-6)
    found = unpack(packed[0], packed[1], biases, **settings)
    assert found.dtype == mx.bfloat16
    assert mx.array_equal(found, exact.astype(mx.bfloat16))
    embedding = PackedEmbedding(40, 128, group, 4, mode)
    embedding.weight, embedding.scales, embedding.biases = packed[0], packed[1], biases
    assert mx.array_equal(embedding(mx.array([3, 7])), found[mx.array([3, 7])])
