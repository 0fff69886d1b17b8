"""The counter of Metal dispatches on graphs whose kernels can be counted by hand, and what the
package's own graphs may launch at most."""

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

pytestmark = pytest.mark.skipif(not cpu_compiles(), reason="MLX cannot compile on this machine")
KEYS = mx.zeros((8, 2, 32, 64))


def attend(x: mx.array) -> mx.array:
    """x [B, 3, 1, 64]: two queries as a slice, which is copied where the batch has rows."""
    keys = KEYS[: x.shape[0]]
    return mx.fast.scaled_dot_product_attention(x[:, :2], keys, keys, scale=1.0)


@pytest.mark.parametrize(
    ("function", "shape", "launches"),
    [
        (lambda x: x.reshape(2, 4, 64).transpose(1, 0, 2)[:, 1:], (8, 64), 0),
        (lambda x: x.T.reshape(-1), (8, 64), 1),
        (lambda x: x.reshape(2, 4, 64)[:, 1:].reshape(2, 3, 2, 32), (8, 64), 0),
        (lambda x: x.reshape(2, 4, 64)[:, 1:].reshape(6, 64), (8, 64), 1),
        (lambda x: mx.concatenate([x[:2], x[2:5], x[5:]]), (8, 64), 3),
        (lambda x: mx.slice_update(x, mx.ones((1, 64)), mx.array([3]), axes=(0,)), (8, 64), 3),
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
        (attend, (1, 3, 1, 64), 1),
        (attend, (8, 3, 1, 64), 2),
    ],
)
def test_kernels_of_small_graphs(
    function: Callable[[mx.array], mx.array], shape: tuple[int, ...], launches: int
) -> None:
    x = mx.zeros(shape)
    mx.eval(x, KEYS)
    assert count(function, x).total == launches


@pytest.mark.parametrize(
    ("rows", "bits", "kv_bits", "adapters", "most"),
    [
        (1, None, None, 0, 10.5),
        (8, None, None, 0, 11.5),
        (1, 4, None, 0, 12.6),
        (8, 4, None, 0, 13.6),
        (1, None, 8, 0, 16.5),
        (8, None, 8, 0, 16.5),
        (1, None, None, 2, 22.7),
        (8, None, None, 2, 23.7),
    ],
)
def test_decode_step(
    rows: int, bits: int | None, kv_bits: int | None, adapters: int, most: float
) -> None:
    model = decoder(decoder_config(), bits=bits, adapters=adapters)
    assert count_decode(model, rows, kv_bits=kv_bits).total / LAYERS <= most


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 0.7}, 5),
        ({"temperature": 0.7, "min_p": 0.05}, 7),
        ({"temperature": 0.7, "top_p": 0.9}, 29),
        ({"temperature": 0.7, "top_k": 40}, 25),
        ({"temperature": 0.7, "top_k": 40, "top_p": 0.9}, 31),
        ({"temperature": 0.7, "repetition_penalty": 1.1, "presence_penalty": 1.0}, 10),
    ],
)
def test_sampling_of_eight_rows(options: dict[str, float], most: int) -> None:
    assert count_sampling([SamplingParams(**options)] * 8).total <= most


@pytest.mark.parametrize(
    ("family", "most"),
    [
        ("idefics3", 13),
        ("internvl", 14),
        ("pixtral", 16),
        ("qwen2_vl", 12),
        ("qwen2_5_vl", 13),
        ("qwen3_vl", 12),
    ],
)
def test_a_layer_of_each_tower(family: str, most: int) -> None:
    assert count_tower(FIXTURES / TOWERS[family], fused=True)[1] <= most
