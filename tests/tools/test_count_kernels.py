"""The counter of Metal dispatches, on graphs whose kernels can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_vlm_pipes.contexts import SamplingParams
from mlx_vlm_pipes.nn.host_compiler import cpu_compiles
from tools.count_kernels import count
from tools.count_kernels.cases import (
    FIXTURES,
    LAYERS,
    TOWERS,
    count_decode,
    count_sampling,
    count_tower,
    decoder,
    decoder_config,
)

compiles = pytest.mark.skipif(not cpu_compiles(), reason="MLX cannot compile on this machine")
W = mx.ones((64, 64))
HEADS = mx.zeros((8, 3, 4, 64))


def attend(x: mx.array, mask: mx.array) -> mx.array:
    """Queries [8, 2, 1, 64] as a slice between others, keys and values of their own."""
    return mx.fast.scaled_dot_product_attention(x[:, :2, :1], x + 1, x + 2, scale=1.0, mask=mask)


@pytest.mark.parametrize(
    ("function", "shape", "launches"),
    [
        (lambda x: (x @ W.T).reshape(2, 4, 64).transpose(1, 0, 2) + x[:, None], (8, 64), None),
        (lambda x: x.T.reshape(-1), (8, 64), 1),
        (lambda x: mx.concatenate([x[:2], x[2:5], x[5:]]), (8, 64), 3),
        (lambda x: mx.slice_update(x, x[:1] * 2, mx.array([3]), axes=(0,)), (8, 64), 4),
        (lambda x: mx.sort(x, axis=-1), (8, 2048), 1),
        (lambda x: mx.sort(x, axis=-1), (8, 2049), 4),
        (lambda x: mx.topk(x, 5), (8, 151_936), 16),
        (lambda x: mx.max(x), (8, 512), 1),
        (lambda x: mx.max(x), (8, 1024), 2),
        (lambda x: mx.max(x, axis=-1), (8, 151_936), 1),
        (lambda x: nn.silu(x) * x, (8, 64), 2),
        (mx.compile(lambda x: nn.silu(x) * x), (8, 64), 1),
        (lambda x: mx.fast.rms_norm(x, None, 1e-5), (8, 64), 1),
        (lambda x: mx.fast.rms_norm(x.T, None, 1e-5), (8, 64), 2),
    ],
)
@compiles
def test_kernels_of_small_graphs(
    function: Callable[[mx.array], mx.array], shape: tuple[int, ...], launches: int | None
) -> None:
    if launches is None:
        with pytest.raises(ValueError, match="broadcast"):
            count(function, mx.zeros(shape))
        return
    assert count(function, mx.zeros(shape)).total == launches
