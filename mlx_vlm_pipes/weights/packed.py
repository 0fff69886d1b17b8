"""Linears and embeddings with packed weights, which round 16-bit results once."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.rounding import packed_product, unpack


class PackedLinear(nn.QuantizedLinear):
    """[..., in] -> [..., out], in the dtype of the input."""

    def __call__(self, x: mx.array) -> mx.array:
        out = _product(self, x)
        return out + self["bias"] if "bias" in self else out


class PackedEmbedding(nn.QuantizedEmbedding):
    """int [...] -> [..., E], in the dtype of the scales."""

    def __call__(self, x: mx.array) -> mx.array:
        biases = self.get("biases")
        return unpack(
            self["weight"][x],
            self["scales"][x],
            None if biases is None else biases[x],
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def as_linear(self, x: mx.array) -> mx.array:
        """The head of a tied model: [..., E] -> [..., V], in the dtype of the input."""
        return _product(self, x)


def _product(module: PackedLinear | PackedEmbedding, x: mx.array) -> mx.array:
    return packed_product(
        x,
        module["weight"],
        module["scales"],
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
