"""One sequence of the KV cache while it owns its arrays."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.kv_cache.buckets import capacity_bucket
from mlx_vlm_pipes.kv_cache.storage import TOKENS, CacheFormat, Layer, resize, write_prefill

Span = tuple[int, int]  # begin and end of positions in a sequence


class CacheRow:
    """One sequence's keys and values. `length` counts the cached tokens."""

    def __init__(self, format: CacheFormat, params: KVCacheParams) -> None:
        self.length = 0
        self.uncounted = 0  # tokens that a step has written behind `length`, not counted yet
        self.planned_length = 0  # tokens that prefill will reach in all, where it is chunked
        self.position_delta = 0  # a planned row's last position less its last index (M-RoPE)
        # positions whose tokens see each other both ways: all of a span in one step
        self.whole_spans: Sequence[Span] = ()
        self.slot: int | None = None  # index among the placed rows; None while staged
        self.format = format
        self._params = params
        self._layers: list[Layer] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the staged arrays; a placed row owns none."""
        return sum(a.nbytes for layer in self._layers for a in layer)

    @property
    def capacity(self) -> int:
        """Tokens that the staged arrays can hold."""
        return self._layers[0][0].shape[TOKENS] if self._layers else 0

    @property
    def planned_reach(self) -> int | None:
        """1 + the largest position of the planned tokens; None where nothing is planned."""
        return self.planned_length + self.position_delta if self.planned_length else None

    @property
    def filled(self) -> int:
        """Tokens that lie in the arrays, counted or not."""
        return self.length + self.uncounted

    def count(self, tokens: int) -> None:
        """Count so many of the tokens that a step has written."""
        self.length, self.uncounted = self.length + tokens, self.uncounted - tokens

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all. The row must be staged."""
        if not self._layers:
            capacity = capacity_bucket(tokens)
            self._layers = [
                self.format.empty(self._params, 1, capacity) for _ in range(self._params.num_layers)
            ]
        elif self.capacity < tokens:
            capacity = capacity_bucket(tokens)
            self._layers = [resize(layer, capacity) for layer in self._layers]

    def append(self, layer: int, keys: mx.array, values: mx.array, start: int) -> Layer:
        """Write keys and values [1, K, T, D] from `start` on; returns the layer's arrays."""
        new = [self.format.encode(keys), self.format.encode(values)]
        self._layers[layer] = write_prefill(self._layers[layer], new, start)
        return self._layers[layer]

    def write(self, tokens: mx.array, start: int) -> None:
        """Write tokens [2, layers, K, T, D] from `start` on. The row must be staged."""
        self.reserve(start + tokens.shape[3] + 1)
        for i in range(self._params.num_layers):
            self.append(i, tokens[0, i : i + 1], tokens[1, i : i + 1], start)

    def take(self) -> list[Layer]:
        """Hand the staged arrays over; the row keeps no reference."""
        layers, self._layers = self._layers, []
        return layers

    def drop(self, layer: int) -> None:
        """Let one staged layer's arrays go, where there are any; `take` comes next."""
        if self._layers:
            self._layers[layer] = ()

    def stage(self, layers: list[Layer]) -> None:
        self._layers, self.slot = layers, None

    def copy(self, length: int, capacity: int) -> CacheRow:
        """A staged copy of the first `length` tokens, with room for `capacity`."""
        twin = CacheRow(self.format, self._params)
        twin.length = length
        twin._layers = [
            resize(tuple(a[:, :, :, :length] for a in layer), max(capacity, length))
            for layer in self._layers
        ]
        return twin

    @property
    def layers(self) -> Sequence[Layer]:
        """The staged arrays by layer; none before the first token and in a placed row."""
        return self._layers

    def arrays(self) -> list[mx.array]:
        """The staged arrays, to be evaluated together with a step."""
        return [a for layer in self._layers for a in layer]
