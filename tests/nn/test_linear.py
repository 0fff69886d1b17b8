"""Fused projections compute what their parts do."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_vlm_pipes.nn.linear import fuse_linears, linear_part


@pytest.mark.parametrize("bias", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("settings", [None, (32, 4, "affine"), (64, 3, "affine"), (32, 4, "mxfp4")])
def test_fused_projections_equal_their_parts(
    bias: tuple[bool, bool], settings: tuple[int, int, str] | None
) -> None:
    mx.random.seed(1)
    plain = [nn.Linear(64, rows, bias=b) for rows, b in zip((32, 16), bias, strict=True)]
    parts = (
        plain if settings is None else [nn.QuantizedLinear.from_linear(p, *settings) for p in plain]
    )
    fused = fuse_linears(parts)
    assert fused is not None
    assert ("bias" in fused) == any(bias)
    x = mx.random.normal((5, 64))
    assert mx.allclose(fused(x), mx.concatenate([part(x) for part in parts], axis=-1), atol=1e-6)
    for (begin, end), part in zip(((0, 32), (32, 48)), parts, strict=True):
        assert mx.allclose(linear_part(fused, x, begin, end), part(x), atol=1e-6)


def test_unlike_projections_stay_separate() -> None:
    linear, other = nn.Linear(64, 8), nn.Linear(128, 8)
    four = nn.QuantizedLinear.from_linear(linear, 64, 4)
    eight = nn.QuantizedLinear.from_linear(linear, 64, 8)
    half = nn.Linear(64, 8)
    half.set_dtype(mx.float16)
    for parts in ([linear, other], [linear, four], [four, eight], [linear, half], []):
        assert fuse_linears(parts) is None
