"""Headers alone as the `Weights` that canonicalising takes: names, dtypes and shapes, no data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx
from safetensors import safe_open

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.weights import TensorInfo, WeightData, Weights
from mlx_vlm_pipes.weights.checkpoint import StoredWeight

# What repacking looks into, to tell reordered groups: a few kilobytes a module.
_READ = (".g_idx", ".weight_g_idx")
_READ_BYTES = 2**20  # more cannot be a group index


class HeaderWeights(Weights):
    """Header entries by name, and the files' metadata; group indices alone are read."""

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        self.infos, self._metadata, self._name = infos, metadata or {}, name

    @property
    def name(self) -> str:
        return self._name

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._metadata

    def items(self) -> Iterable[tuple[str, Weights]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [(name, HeaderWeights(self.infos, self._metadata, name)) for name in self.infos]

    def exists(self) -> bool:
        return self._name in self.infos

    def data(self) -> WeightData:
        return stand_in(self.infos[self._name])

    def child(self, key: str) -> Weights:
        name = f"{self._name}.{key}" if self._name else key
        return HeaderWeights(self.infos, self._metadata, name)


def stand_in(info: TensorInfo) -> WeightData:
    """A tensor of the right shape and dtype that is not to be evaluated."""
    if info.name.endswith(_READ) and info.dtype is DType.int32 and info.nbytes <= _READ_BYTES:
        with safe_open(info.path, framework="numpy") as file:
            values = file.get_tensor(info.name)
        return WeightData(mx.array(values), info.name, info.dtype, info.shape)
    fp8 = info.dtype in (DType.float8_e4m3fn, DType.float8_e5m2)
    kind = mx.uint8 if fp8 else mx.float32 if info.dtype is DType.float64 else info.dtype.to_mx()
    data = mx.zeros(info.shape, kind)
    if info.offset:
        return StoredWeight(data, info.name, info.dtype, info.shape, info=info)
    return WeightData(data, info.name, info.dtype, info.shape)
