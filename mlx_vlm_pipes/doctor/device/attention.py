"""Attention and matrix products at the sizes that models have, against numpy in float64.

What is compared is what models call (rounding.py): MLX's kernels, on a CPU in float32.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.doctor.device.report import Recorder
from mlx_vlm_pipes.dtypes import default_device
from mlx_vlm_pipes.rounding import attend, is_fused, packed_product

# SmolVLM, Qwen and Llama text: 64, 80, 96, 128; SigLIP 72; Qwen2.5-VL's tower 80; the bundled
# model 32. MLX has fused kernels for some, and puts the same together from others elsewhere.
HEAD_DIMS = (32, 64, 72, 80, 96, 128)
HEADS, KV_HEADS = 8, 2
PROMPT, BEFORE = 40, 24  # new tokens of a prompt, and those before them
CAPACITIES = (96, 1500, 5000)  # of a decode step: MLX has other kernels for many keys
# Largest difference of an output of size 1: what rounding inputs, weights and output comes to.
BARS = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
ROWS = {True: (1, 2, 8), False: (1, 2, 8, 64)}  # on a CPU (where it is slow), on a GPU: each has
# kernels of its own for vectors, small and large matrices
PRODUCTS = ((576, 1536), (1536, 576))  # in and out of SmolLM2-135M's MLP
PACKINGS = ((4, 64), (8, 64), (4, 32))  # bits, group size
PRODUCT_BARS = {mx.float32: 5e-5, mx.float16: 8e-3, mx.bfloat16: 6e-2}
_NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}


def check_attention(record: Recorder) -> None:
    """Prompts and decode steps at every head size; which of them are fused is a figure."""
    for dim in HEAD_DIMS:
        fused: dict[str, list[str]] = {"prefill": [], "decode": []}
        for dtype, bar in BARS.items():
            name = f"head size {dim}, {_NAMES[dtype]}"
            with record.trying(name, f"models with heads of {dim}: use another dtype"):
                record.at_most(f"{name}: prompt", _prompt_error(dim, dtype), bar)
                worst = max(_decode_error(dim, dtype, keys) for keys in CAPACITIES)
                record.at_most(f"{name}: decode", worst, bar)
                for phase, args in {"prefill": _prompt(dim), "decode": _step(dim, 96)}.items():
                    q, k, v = (mx.array(a).astype(dtype) for a in args[:3])
                    if is_fused(q, k, v, mx.array(args[3])):
                        fused[phase].append(_NAMES[dtype])
        figures = {f"head size {dim}, {phase}": names for phase, names in fused.items()}
        record.figures("fused attention", figures)


def check_products(record: Recorder) -> None:
    """Matrix products of one row and more, plain and packed."""
    for dtype, bar in PRODUCT_BARS.items():
        name = f"products, {_NAMES[dtype]}"
        with record.trying(name, "use another dtype"):
            record.at_most(name, max(_product_error(size, dtype) for size in PRODUCTS), bar)
        for bits, group in PACKINGS:
            name = f"products, {bits} bits by {group}, {_NAMES[dtype]}"
            with record.trying(name, "use the model unquantised"):
                worst = max(_packed_error(size, dtype, bits, group) for size in PRODUCTS)
                record.at_most(name, worst, bar)


Inputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # q, k, v, mask


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)


def _prompt(dim: int) -> Inputs:
    """New tokens after others: q [1, H, T, D], k and v [1, K, S, D], mask bool [T, S]."""
    keys = BEFORE + PROMPT
    mask = np.arange(keys)[None] <= np.arange(BEFORE, keys)[:, None]
    shape = (1, KV_HEADS, keys, dim)
    return _random(1, HEADS, PROMPT, dim), _random(*shape), _random(*shape, 1)[..., 0], mask


def _step(dim: int, capacity: int) -> Inputs:
    """One token each of two rows, of which the first is shorter; mask bool [2, 1, 1, S]."""
    lengths = np.array([capacity // 3, capacity - 1])
    mask = (np.arange(capacity)[None] <= lengths[:, None])[:, None, None]
    shape = (2, KV_HEADS, capacity, dim)
    return _random(2, HEADS, 1, dim), _random(*shape), _random(*shape, 1)[..., 0], mask


def _prompt_error(dim: int, dtype: mx.Dtype) -> float:
    """With a mask as an array and by name, which are two kernels."""
    args = _prompt(dim)
    wanted = _attend_in_numpy(*_as_held(args, dtype))
    return max(_apart(_attend(args, dtype, mask), wanted) for mask in (args[3], "causal"))


def _decode_error(dim: int, dtype: mx.Dtype, capacity: int) -> float:
    args = _step(dim, capacity)
    found = _attend(args, dtype, args[3])
    return _apart(found, _attend_in_numpy(*_as_held(args, dtype)))


def _attend(args: Inputs, dtype: mx.Dtype, mask: np.ndarray | str) -> mx.array:
    q, k, v = (mx.array(a).astype(dtype) for a in args[:3])
    shown = mask if isinstance(mask, str) else mx.array(mask)
    return attend(q, k, v, scale=q.shape[-1] ** -0.5, mask=shown)


def _as_held(args: Inputs, dtype: mx.Dtype) -> Inputs:
    """The inputs as the device has them: rounded to dtype, in float64."""
    q, k, v = (np.array(mx.array(a).astype(dtype).astype(mx.float32)) for a in args[:3])
    return q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), args[3]


def _attend_in_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float64 [B, H, T, D], by the definition; query heads that share a key head are neighbours."""
    batch, heads, count, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, count, dim)  # [B, K, H / K, T, D]
    keys, values = (a[:, :, None] for a in (k, v))
    shown = mask if mask.ndim == 2 else mask[:, None]
    scores = np.where(shown, grouped @ keys.swapaxes(-1, -2) * dim**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ values
    return mixed.reshape(batch, heads, count, dim)


def _apart(found: mx.array, wanted: np.ndarray) -> float:
    return float(np.abs(np.array(found.astype(mx.float32)) - wanted).max())


def _product_error(size: tuple[int, int], dtype: mx.Dtype) -> float:
    """Of outputs of size 1, over all ROWS."""
    x, w = _operands(size, dtype)
    found = {rows: x[:rows] @ w.T for rows in _rows()}
    return _worst(found, x, w)


def _packed_error(size: tuple[int, int], dtype: mx.Dtype, bits: int, group: int) -> float:
    """Against the same packed values, unpacked on the CPU."""
    x, w = _operands(size, dtype)
    packed, scales, *biases = mx.quantize(w, group, bits)
    found = {
        rows: packed_product(x[:rows], packed, scales, biases[0], group_size=group, bits=bits)
        for rows in _rows()
    }
    floats = [a.astype(mx.float32) for a in (scales, biases[0])]
    unpacked = mx.dequantize(packed, *floats, group_size=group, bits=bits, stream=mx.cpu)
    return _worst(found, x, unpacked)


def _rows() -> tuple[int, ...]:
    return ROWS[default_device().is_host]


def _operands(size: tuple[int, int], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """x [max(ROWS), in] and w [out, in] such that x w^T is of size 1."""
    inner, outer = size
    w = mx.array(_random(outer, inner) * inner**-0.5).astype(dtype)
    return mx.array(_random(max(_rows()), inner)).astype(dtype), w


def _worst(found: dict[int, mx.array], x: mx.array, w: mx.array) -> float:
    x64, w64 = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (x, w))
    wanted = x64 @ w64.T
    return max(_apart(out, wanted[:rows]) for rows, out in found.items())
