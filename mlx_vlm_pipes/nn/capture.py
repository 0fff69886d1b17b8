"""Outputs of chosen decoder layers, which EAGLE3 returns beside the logits."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


class Capture:
    """Outputs of some decoder layers, kept while the hidden states pass by.

    layers: indices in the order wanted. An output is the layer's own, as transformers returns it:
    what pictures add behind it is not in it.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = layers
        self._outputs: dict[int, mx.array] = {}

    def keep(self, layer: int, h: mx.array) -> None:
        if layer in self.layers:
            self._outputs[layer] = h

    def joined(self) -> mx.array:
        """[T, layers * E], after each layer and before the final norm."""
        return mx.concatenate([self._outputs[layer] for layer in self.layers], axis=-1)
