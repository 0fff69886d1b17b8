"""Projections of the same input joined into one matmul: fewer kernels, the same numbers.

That pays for the few rows of a decode step. For many rows, `linear_part` computes one of them
alone, so that the results of all need not be held at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.weights.packed import AnyPacked, PackedLinear, product

AnyLinear = nn.Linear | nn.QuantizedLinear


def fuse_linears(parts: Sequence[AnyLinear]) -> AnyLinear | None:
    """One projection that computes all of `parts` on the same input, outputs side by side.

    Rows are concatenated lazily: weight, scales, biases, and bias, where a part without a bias
    gets zeros if another has one. Returns None if the parts differ in kind, dtype, quantisation
    settings or input width: they then stay separate.
    """
    if len({_fuse_key(part) for part in parts}) != 1 or None in map(_fuse_key, parts):
        return None
    first = parts[0]
    weight = mx.concatenate([part.weight for part in parts])
    fused: AnyLinear
    if isinstance(first, nn.QuantizedLinear):
        fused = PackedLinear(
            weight.shape[1] * 32 // first.bits,
            len(weight),
            bias=False,
            group_size=first.group_size,
            bits=first.bits,
            mode=first.mode,
        )
        fused.scales = mx.concatenate([part["scales"] for part in parts])
        if first.get("biases") is not None:
            fused.biases = mx.concatenate([part["biases"] for part in parts])
    else:
        fused = nn.Linear(1, 1, bias=False)
    fused.weight = weight
    biases = [part["bias"] for part in parts if "bias" in part]
    if biases:
        fused.bias = mx.concatenate([_bias_or_zeros(part, biases[0].dtype) for part in parts])
    return fused


def unbiased(linear: AnyLinear, x: mx.array) -> mx.array:
    """x [T, in] -> [T, out], without the bias."""
    return product(linear, x) if isinstance(linear, AnyPacked) else x @ linear["weight"].T


def linear_part(
    linear: AnyLinear | nn.Embedding | nn.QuantizedEmbedding, x: mx.array, begin: int, end: int
) -> mx.array:
    """Outputs begin..end-1 of a projection, or of an embedding that is the head: x [T, in] ->
    [T, end - begin]. Copies no weights."""
    bias = linear.get("bias")
    if not isinstance(linear, AnyPacked):
        weight = linear["weight"][begin:end]
        if bias is None:
            return x @ weight.T
        return mx.addmm(bias[begin:end], x, weight.T)
    out = product(linear, x, slice(begin, end))
    return out if bias is None else out + bias[begin:end]


def _fuse_key(part: AnyLinear) -> tuple[object, ...] | None:
    """What two projections must share to be one; None for anything that is not a projection."""
    if isinstance(part, nn.QuantizedLinear):
        settings = (part.group_size, part.bits, part.mode, part.scales.dtype)
    elif type(part) is nn.Linear:
        settings = (part.weight.dtype,)
    else:
        return None
    return (type(part), part.weight.shape[1], *settings)


def _bias_or_zeros(part: AnyLinear, dtype: mx.Dtype) -> mx.array:
    return part["bias"] if "bias" in part else mx.zeros((len(part.weight),), dtype)
