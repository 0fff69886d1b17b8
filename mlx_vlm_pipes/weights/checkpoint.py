"""Checkpoint files as lazy, named tensors: `Weights` and `WeightData` of docs/api.md."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import WeightsError, clip
from mlx_vlm_pipes.quantization import QuantizationEncoding
from mlx_vlm_pipes.weights.safetensors import (
    Header,
    TensorInfo,
    read_part,
    read_safetensors_header,
)

_FLOATS = frozenset({DType.float16, DType.bfloat16, DType.float32})


@dataclass(eq=False)  # arrays have no truth value; two handles are equal if they are one
class WeightData:
    """A named tensor. `data` stays unread until MLX evaluates it; `dtype` says what it means.

    An fp8 tensor's data are bytes (uint8): MLX has no such compute type.
    """

    data: mx.array = field(repr=False)  # printing it would read it
    name: str
    dtype: DType
    shape: tuple[int, ...]
    quantization_encoding: QuantizationEncoding | None = None

    @classmethod
    def from_numpy(cls, arr: np.ndarray, name: str) -> WeightData:
        """Raises: ConfigError for a dtype that MLX lacks."""
        dtype = DType.from_numpy(arr.dtype)
        return cls(mx.array(arr, dtype=dtype.to_mx()), name, dtype, tuple(arr.shape))

    @classmethod
    def from_array(cls, array: mx.array, name: str) -> WeightData:
        """Any MLX array, unevaluated, under its own dtype."""
        return cls(array, name, DType.from_mx(array.dtype), tuple(array.shape))

    def astype(self, dtype: DType) -> WeightData:
        """A lazy cast; from float8_e4m3fn it decodes (without any scale that belongs to it).

        Raises: ConfigError if MLX cannot compute with dtype.
        """
        if dtype is self.dtype:
            return self
        target = dtype.to_mx()
        if self.dtype is DType.float8_e4m3fn:
            data = mx.from_fp8(self.data, dtype=mx.float32).astype(target)
        else:
            data = self.data.astype(target)
        return replace(self, data=data, dtype=dtype)

    def part(self, axis: int, spans: Sequence[tuple[int, int]]) -> WeightData:
        """Elements begin..end-1 of an axis, of each span in turn: read, evaluated, on their own.

        What they are part of is not held by them, as MLX's slices would.
        """
        places = mx.concatenate([mx.arange(begin, end) for begin, end in spans])
        data = mx.take(self.data, places, axis=axis)
        mx.eval(data)
        return WeightData(data, self.name, self.dtype, data.shape, self.quantization_encoding)

    def read_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes to read for a part of this shape: all, where nothing is known of a file."""
        del shape
        return self.nbytes

    def renamed(self, name: str) -> WeightData:
        """The same tensor under another name, as unread as it was."""
        return replace(self, name=name)

    @property
    def nbytes(self) -> int:
        """Bytes of the array, read or not."""
        return math.prod(self.shape) * self.dtype.size_in_bytes

    def to_buffer(self) -> mx.array:
        return self.data


@dataclass(eq=False)
class StoredWeight(WeightData):
    """A tensor as a file has it, whose parts can be read without the rest.

    info: where it lies. dtype may be another than the file's: a cast of what is read.
    """

    info: TensorInfo = field(kw_only=True)

    def part(self, axis: int, spans: Sequence[tuple[int, int]]) -> WeightData:
        """As WeightData.part; only these elements are read."""
        data = read_part(self.info, axis, spans).to_mx()
        stored = WeightData(data, self.name, self.info.dtype, data.shape)
        weight = stored.astype(self.dtype)
        mx.eval(weight.data)
        return replace(weight, quantization_encoding=self.quantization_encoding)

    def read_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the file that a part of this shape is."""
        return math.prod(shape) * self.info.dtype.size_in_bytes


Tensors = Mapping[str, WeightData]
"""Tensors by name, whatever the names are."""


@dataclass(frozen=True)
class TensorHandle:
    """What an adapter is given of a tensor that was repacked or expanded after reading."""

    weight: WeightData

    def data(self) -> WeightData:
        return self.weight


WeightsAdapter = Callable[..., dict[str, WeightData]]
"""`(state_dict, *, huggingface_config=..., pipeline_config=..., **unused) -> {name: WeightData}`.

`state_dict` maps checkpoint names to handles with a `data()` method, see `Weights.items`.
"""


class Weights(ABC):
    """A checkpoint, or the part of it below `name`: `weights.model.layers[0].mlp`.

    Where a part's name is also a method's (`data`), write `weights["data"]`.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The dotted name from the root, empty there."""

    @property
    @abstractmethod
    def metadata(self) -> Mapping[str, str]:
        """The files' string metadata; `format` is "pt" or "mlx" in most."""

    @abstractmethod
    def items(self) -> Iterator[tuple[str, Weights]]:
        """(full name, handle) of every tensor at or below this one."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether this is a tensor, not just a part of a name."""

    @abstractmethod
    def data(self) -> WeightData:
        """The tensor, unread. Raises: WeightsError if there is none of this name."""

    @abstractmethod
    def child(self, key: str) -> Weights:
        """The handle one name part further down."""

    def __getattr__(self, key: str) -> Weights:
        if key.startswith("_"):
            raise AttributeError(key)
        return self.child(key)

    def __getitem__(self, key: str | int) -> Weights:
        return self.child(str(key))


class StoredTensors(Protocol):
    """What files hold: header entries by name, their string metadata, and the tensors, unread."""

    infos: dict[str, TensorInfo]
    metadata: dict[str, str]

    def weight(self, info: TensorInfo) -> WeightData: ...


class _Files:
    """Headers of a checkpoint's files, and the unread arrays of those already opened."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        headers = [read_safetensors_header(path) for path in paths]
        self.infos = _merged_infos(headers)
        self.metadata = {k: v for header in headers for k, v in header.metadata.items()}
        self._arrays: dict[Path, dict[str, mx.array]] = {}

    def weight(self, info: TensorInfo) -> WeightData:
        return StoredWeight(self._array(info), info.name, info.dtype, info.shape, info=info)

    def _array(self, info: TensorInfo) -> mx.array:
        """The tensor, unread: MLX opens the file and reads when the array is evaluated.

        It is handed over, not kept: an open checkpoint must not hold what was read of it.
        """
        if info.name not in self._arrays.get(info.path, {}):
            try:
                loaded = mx.load(str(info.path), format="safetensors")
            except (RuntimeError, ValueError) as error:
                raise WeightsError(f"{info.path}: MLX cannot open it ({clip(error)})") from None
            self._arrays[info.path] = cast("dict[str, mx.array]", loaded)
        return self._arrays[info.path].pop(info.name)


class StoredTree(Weights):
    """A tensor, or all tensors below a name."""

    def __init__(self, files: StoredTensors, name: str) -> None:
        self._files = files
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._files.metadata

    def infos(self) -> dict[str, TensorInfo]:
        """Header entries at or below this one, by full name; opens nothing."""
        dotted = self._name + "."
        return {
            name: info
            for name, info in self._files.infos.items()
            if not self._name or name == self._name or name.startswith(dotted)
        }

    def items(self) -> Iterator[tuple[str, Weights]]:
        for name in self.infos():
            yield name, StoredTree(self._files, name)

    def exists(self) -> bool:
        return self._name in self._files.infos

    def data(self) -> WeightData:
        info = self._files.infos.get(self._name)
        if info is None:
            raise WeightsError(f"no tensor '{clip(self._name)}' in the checkpoint")
        return self._files.weight(info)

    def child(self, key: str) -> Weights:
        return StoredTree(self._files, f"{self._name}.{key}" if self._name else key)


class SafetensorWeights(StoredTree):
    """One or more safetensors files, checked, then handed to MLX, which reads lazily.

    Raises: WeightsError for a damaged file, a dtype that MLX cannot load, or a tensor that two
    files both hold.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        super().__init__(_Files(paths), "")


def _merged_infos(headers: Sequence[Header]) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if name in infos:
                raise WeightsError(
                    f"tensor '{clip(name)}' is in both {infos[name].path.name} and"
                    f" {header.path.name}; keep one of the two sets of files"
                )
            if info.dtype in (DType.float64, DType.float8_e5m2):
                raise WeightsError(
                    f"{header.path}: tensor '{clip(name)}' is {info.dtype.name}, which MLX"
                    " cannot load; save the model as float32 or bfloat16"
                )
            infos[name] = info
    return infos


def load_state_dict(weights: Weights | Mapping[str, Any]) -> dict[str, WeightData]:
    """Every tensor of a checkpoint (or of an adapter's `state_dict` argument), unread, by name."""
    return {
        name: value if isinstance(value, WeightData) else value.data()
        for name, value in weights.items()
    }


def cast_floats(state: Mapping[str, WeightData], dtype: DType) -> dict[str, WeightData]:
    """Cast float16, bfloat16 and float32 tensors, lazily; packed and fp8 tensors stay.

    Scales and biases of MLX affine weights are floats and are cast too: they set the dtype that
    a quantised layer computes in.
    """
    return {
        name: weight.astype(dtype) if weight.dtype in _FLOATS else weight
        for name, weight in state.items()
    }
