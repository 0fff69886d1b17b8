"""Element types and devices in MAX's spelling, and what they are on MLX (docs/api.md)."""

from __future__ import annotations

import builtins
import enum
from contextlib import AbstractContextManager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.device_turns import TURNS
from mlx_vlm_pipes.errors import ConfigError


class DType(enum.Enum):
    """Element types. float64 and the 8- and 4-bit floats have no MLX compute type."""

    bool = 1
    uint8 = 134
    int8 = 135
    uint16 = 136
    int16 = 137
    uint32 = 138
    int32 = 139
    uint64 = 140
    int64 = 141
    float16 = 79
    bfloat16 = 80
    float32 = 81
    float64 = 82
    float8_e4m3fn = 75
    float8_e5m2 = 77
    float4_e2m1fn = 64

    @property
    def size_in_bytes(self) -> int:
        """Bytes of one element; the 4-bit float counts as one."""
        return _SIZES[self]

    def is_float(self) -> builtins.bool:
        return self.name.startswith(("float", "bfloat"))

    def is_float8(self) -> builtins.bool:
        return self.name.startswith("float8")

    def to_mx(self) -> mx.Dtype:
        """Raises: ConfigError for types that MLX cannot compute with."""
        if self not in _TO_MX:
            raise ConfigError(f"{self.name} has no MLX compute type; cast or dequantise it first")
        return _TO_MX[self]

    @classmethod
    def from_mx(cls, dtype: mx.Dtype) -> DType:
        return _FROM_MX[dtype]

    def to_numpy(self) -> np.dtype:
        """Raises: ConfigError for types that numpy lacks (bfloat16 and smaller floats)."""
        try:
            return np.dtype(self.name)
        except TypeError:
            raise ConfigError(f"{self.name} has no numpy type; cast it to float32") from None

    @classmethod
    def from_numpy(cls, dtype: np.dtype | type) -> DType:
        return cls[np.dtype(dtype).name]


_SIZES = {
    DType.bool: 1, DType.uint8: 1, DType.int8: 1, DType.uint16: 2, DType.int16: 2,
    DType.uint32: 4, DType.int32: 4, DType.uint64: 8, DType.int64: 8, DType.float16: 2,
    DType.bfloat16: 2, DType.float32: 4, DType.float64: 8, DType.float8_e4m3fn: 1,
    DType.float8_e5m2: 1, DType.float4_e2m1fn: 1,
}  # fmt: skip
_TO_MX = {
    DType.bool: mx.bool_,
    **{
        DType[name]: getattr(mx, name)
        for name in (
            "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
            "float16", "bfloat16", "float32",
        )
    },
}  # fmt: skip
_FROM_MX = {value: key for key, value in _TO_MX.items()}


@dataclass(frozen=True)
class DeviceRef:
    """A device by type ("gpu" or "cpu") and number; a negative id becomes 0."""

    device_type: str
    id: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", max(0, self.id))

    @classmethod
    def CPU(cls, id: int = 0) -> DeviceRef:
        return cls("cpu", id)

    @classmethod
    def GPU(cls, id: int = 0) -> DeviceRef:
        return cls("gpu", id)

    @classmethod
    def from_device(cls, device: Device) -> DeviceRef:
        return cls(device.label, device.id)

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"

    def is_gpu(self) -> bool:
        return self.device_type == "gpu"

    def to_device(self) -> Device:
        """The device of this name. It need not be there: a model refuses one that is not."""
        return Device(mx.Device(mx.cpu if self.is_cpu() else mx.gpu, self.id), self.id)

    def __str__(self) -> str:
        return f"{self.device_type}:{self.id}"


@dataclass(frozen=True)
class DeviceSpec:
    """A wish for a device, before it is opened."""

    id: int
    device_type: str

    @classmethod
    def cpu(cls, id: int = -1) -> DeviceSpec:
        return cls(id, "cpu")

    @classmethod
    def accelerator(cls, id: int = 0) -> DeviceSpec:
        return cls(id, "gpu")

    def to_ref(self) -> DeviceRef:
        return DeviceRef(self.device_type, self.id)


def scan_available_devices() -> list[DeviceSpec]:
    """One accelerator where MLX has a GPU backend, else one CPU."""
    return [DeviceSpec.accelerator() if mx.is_available(mx.gpu) else DeviceSpec.cpu()]


class Device:
    """An MLX device with MAX's attributes. id: its number, which MLX does not tell."""

    def __init__(self, device: mx.Device, id: int = 0) -> None:
        self.mx_device = device
        self.label = "cpu" if device.type == mx.DeviceType.cpu else "gpu"
        self.id = id
        self.is_host = self.label == "cpu"

    @property
    def is_available(self) -> bool:
        """Whether MLX can compute on it here."""
        return mx.is_available(self.mx_device)

    def active(self) -> AbstractContextManager[None]:
        """Inside, MLX computes on this device by default; afterwards its default is as before.

        The default is the process's: a thread that wants another device waits until this one has
        left, so wait for no such thread inside.
        """
        return TURNS.on(self.mx_device)

    def synchronize(self) -> None:
        mx.synchronize(self.mx_device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.mx_device == other.mx_device

    def __hash__(self) -> int:
        return hash((self.label, self.id))

    def __str__(self) -> str:
        return f"{self.label}:{self.id}"

    def __repr__(self) -> str:
        return f"Device({self})"


def default_device() -> Device:
    """MLX's default device, whichever a step that is under way in another thread uses."""
    return Device(TURNS.default())
