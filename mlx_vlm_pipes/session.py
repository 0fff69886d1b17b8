"""How networks are loaded: the session, and the callable model that it gives (docs/api.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vlm_pipes.dtypes import Device
from mlx_vlm_pipes.progress import Watch, Work
from mlx_vlm_pipes.ranks import ALONE, Ranks

PORTIONS = 50  # in which weights are evaluated; each costs a wait for the device


class Model:
    """A loaded, callable network. Call it as the module it holds."""

    def __init__(self, module: Callable[..., Any], weights: Mapping[str, mx.array]) -> None:
        self.module = module
        self.weights = weights

    def __call__(self, *buffers: Any) -> Any:
        return self.module(*buffers)

    def execute(self, *buffers: Any) -> list[Any]:
        """As calling it, with the results always in a list."""
        result = self.module(*buffers)
        return list(result) if isinstance(result, (list, tuple)) else [result]


@dataclass
class InferenceSession:
    """The devices and the compile switch that models are loaded with.

    devices: a model's must be among them; empty means any. watch: is told of the weights as they
    are read; expected_bytes: how many there will be, loaded_bytes: how many there are. ranks: the
    processes that a model is cut for; each loads its own part. read_bytes: what such a rank has
    read of files for its decoder.
    """

    devices: Sequence[Device] = ()
    compile: bool = True
    watch: Watch | None = None
    expected_bytes: int = 0
    loaded_bytes: int = 0
    read_bytes: int = 0
    ranks: Ranks = ALONE

    def load(
        self, module: nn.Module, weights_registry: Mapping[str, mx.array] | None = None
    ) -> Model:
        """Install weights (all of them, strictly), evaluate them, and wrap the module."""
        if weights_registry is not None:
            module.load_weights(list(weights_registry.items()), strict=True)
        parameters = cast("dict[str, mx.array]", dict(tree_flatten(module.parameters())))
        _evaluate(list(parameters.values()), self._note)
        module.eval()
        return Model(module, parameters)

    def note_read(self, nbytes: int) -> None:
        """So much has been read of what is to be loaded."""
        self.read_bytes += nbytes
        if self.watch is not None:
            total = max(self.expected_bytes, self.read_bytes)
            self.watch.note(Work("reading weights", self.read_bytes, total, "B"))

    def _note(self, nbytes: int) -> None:
        self.loaded_bytes += nbytes
        if self.watch is not None:
            total = max(self.expected_bytes, self.loaded_bytes)
            self.watch.note(Work("loading weights", self.loaded_bytes, total, "B"))


def _evaluate(arrays: Sequence[mx.array], note: Callable[[int], None]) -> None:
    """Evaluate arrays, the largest first and some 2 % of the bytes at a time; note: told of these.

    What they are made of (parts of a joined matrix, another dtype, another packing) is let go in
    between, if nobody else holds it: all of it at once would be as much again.
    """
    share, portion, size = sum(a.nbytes for a in arrays) / PORTIONS, [], 0
    for array in sorted(arrays, key=lambda a: a.nbytes, reverse=True):
        portion.append(array)
        size += array.nbytes
        if size >= share:
            mx.eval(portion)
            note(size)
            portion, size = [], 0
    mx.eval(portion)
    note(size)
