"""Linears and embeddings with packed weights, which round 16-bit results once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.rounding import packed_product, unpack


class PackedLinear(nn.QuantizedLinear):
    """[..., in] -> [..., out], in the dtype of the input."""

    def __call__(self, x: mx.array) -> mx.array:
        out = product(self, x)
        return out + self["bias"] if "bias" in self else out


class PackedEmbedding(nn.QuantizedEmbedding):
    """int [...] -> [..., E], in the dtype of the scales."""

    def __call__(self, x: mx.array) -> mx.array:
        return unpack(*_parts(self, x), **_settings(self))

    def as_linear(self, x: mx.array) -> mx.array:
        """The head of a tied model: [..., E] -> [..., V], in the dtype of the input."""
        return product(self, x)


AnyPacked = nn.QuantizedLinear | nn.QuantizedEmbedding


def product(module: AnyPacked, x: mx.array, rows: slice | None = None) -> mx.array:
    """x [..., in] times the packed weight [out, in], without bias -> [..., out], in x's dtype.

    rows: only these outputs.
    """
    return packed_product(x, *_parts(module, rows), **_settings(module))


def floats(module: AnyPacked) -> mx.array:
    """The weight [out, in], unpacked, in the dtype of the scales."""
    return unpack(*_parts(module), **_settings(module))


def _parts(
    module: AnyPacked, at: mx.array | slice | None = None
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Packed weight, scales and biases; at: only these rows of them."""
    weight, scales, biases = module["weight"], module["scales"], module.get("biases")
    if at is None:
        return weight, scales, biases
    return weight[at], scales[at], None if biases is None else biases[at]


def _settings(module: AnyPacked) -> dict[str, Any]:
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
