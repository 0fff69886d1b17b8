"""Safetensors files: checked headers, files written, and which files of a folder count.

The `safetensors` package reads and checks headers (600 tensors: 1 ms, json in Python 3 ms) and
writes files. Three things are not its own. Limits: a hostile header of 97 MB takes it 6 s and
1.1 GB. The words of an error: it names no file and mostly no tensor. And MLX reads the tensors
(checkpoint.py): the package has no bfloat16 or float8 for MLX, is not lazy, and copies (443 MB of
float16: 0.49 s and 891 MB resident; MLX 0.15 s and 435 MB). Everything in a header is untrusted.

Source: the safetensors format description (8-byte little-endian length, JSON header, data).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import CheckpointNotFound, InputError, WeightsError, clip
from mlx_vlm_pipes.json_files import parse_json, read_json

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 20_000_000  # 200,000 tensors; at worst 2 s and 400 MB
MAX_RANK = 16
MAX_DIM = 2**31 - 1  # MLX keeps shapes in int32

DTYPES = {
    "BOOL": DType.bool,
    "U8": DType.uint8,
    "I8": DType.int8,
    "U16": DType.uint16,
    "I16": DType.int16,
    "U32": DType.uint32,
    "I32": DType.int32,
    "U64": DType.uint64,
    "I64": DType.int64,
    "F16": DType.float16,
    "BF16": DType.bfloat16,
    "F32": DType.float32,
    "F64": DType.float64,
    "F8_E4M3": DType.float8_e4m3fn,
    "F8_E5M2": DType.float8_e5m2,
    "F8_E8M0": DType.uint8,  # exponents of microscaling formats: MLX takes them as bytes
}


@dataclass(frozen=True)
class TensorInfo:
    """One header entry. offset: where its data begin in the file, in bytes; 0 where only a whole
    tensor can be read."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: Path
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.size_in_bytes


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name, and the file's string metadata."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_safetensors_header(path: str | Path) -> Header:
    """Read and check one file's header; costs a few kilobytes however large the file.

    Tensors are in the order of their data. Raises: WeightsError naming the file, and the tensor
    where one is at fault.
    """
    path = Path(path)
    try:
        end, tensors = 8 + _checked_length(path), {}
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}  # MLX writes null
            for name in file.offset_keys():  # without a gap between two, or it would be refused
                tensors[name] = info = _checked_info(name, file.get_slice(name), path, end)
                end += info.nbytes
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise WeightsError(f"{path}: {_fault(path, str(error))}") from None
    return Header(path, tensors, metadata)


def _checked_info(name: str, form: Any, path: Path, offset: int) -> TensorInfo:
    """One tensor of a header that safetensors accepted, as MLX can hold it."""
    dtype, shape = form.get_dtype(), form.get_shape()
    fault = _form_fault(dtype, shape)
    if fault is not None:
        raise WeightsError(f"{path}: tensor '{clip(name)}': {fault}")
    return TensorInfo(name, DTYPES[dtype], tuple(shape), path, offset)


def _checked_length(path: Path) -> int:
    """Bytes of the header. Refuses what cannot be true, or is too much to read."""
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
    if len(start) < 8:
        raise WeightsError(
            f"{path}: {file_bytes} bytes is too short for a safetensors file; download it again"
        )
    (length,) = struct.unpack("<Q", start)
    if length > file_bytes - 8 or length > MAX_HEADER_BYTES:
        raise WeightsError(
            f"{path}: header of {length} bytes in a file of {file_bytes}"
            f" (limit {MAX_HEADER_BYTES}); not a safetensors file, or cut short"
        )
    return length


def _fault(path: Path, said: str) -> str:
    """What is wrong with a header that safetensors refused, by tensor where one is at fault.

    Raises: WeightsError for what is no JSON object.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        raw = file.read(length)
        data_bytes = file.seek(0, 2) - 8 - length
    entries = parse_json(raw, path, WeightsError, unique=True)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or any(not isinstance(t, str) for t in metadata.values()):
        return "__metadata__ has what is not a string; expected an object of strings"
    faults = {name: _entry_fault(entry, data_bytes) for name, entry in entries.items()}
    faults = {name: fault for name, fault in faults.items() if fault is not None}
    if not faults:
        reason = said.removeprefix("Error while deserializing header: ")
        return (
            f"{clip(reason, 200)}; expected tensors that fill the file without overlap or gap,"
            " download it again"
        )
    name, fault = next(iter(faults.items()))
    more = f" (and {len(faults) - 1} more tensors)" if len(faults) > 1 else ""
    return f"tensor '{clip(name)}': {fault}{more}"


def _entry_fault(entry: Any, data_bytes: int) -> str | None:
    """What is wrong with one tensor's header entry, taken alone."""
    if not isinstance(entry, dict):
        return "entry is not an object"
    values: list[Any] = [entry.get(key) for key in ("dtype", "shape", "data_offsets")]
    dtype, shape, offsets = values
    fault = _form_fault(dtype, shape)
    if fault is not None:
        return fault
    if not _are_counts(offsets, 2, 2**63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {clip(offsets)} is not a [start, end]"
    start, end = offsets
    if end > data_bytes:
        return f"ends at byte {end} of {data_bytes}; the file is cut short, download it again"
    size = math.prod(shape) * DTYPES[dtype].size_in_bytes
    if size != end - start:
        return f"{dtype} {shape} needs {clip(size)} bytes, its data_offsets hold {end - start}"
    return None


def _form_fault(dtype: Any, shape: Any) -> str | None:
    """Why MLX could not hold a tensor of this dtype and shape."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"unknown dtype '{clip(dtype)}'; known: {', '.join(DTYPES)}"
    if not _are_counts(shape, MAX_RANK, MAX_DIM):
        return f"shape {clip(shape)} is not a short list of sizes"
    return None


def _are_counts(value: Any, max_length: int, max_value: int) -> TypeGuard[list[int]]:
    """Whether value is a list of at most max_length ints in 0..max_value (no bools)."""
    return (
        isinstance(value, list)
        and len(value) <= max_length
        and all(type(item) is int and 0 <= item <= max_value for item in value)
    )


_HELD = {DType.bfloat16: "uint16", DType.float8_e4m3fn: "uint8"}  # what numpy has no type for


@dataclass(frozen=True, eq=False)
class HostArray:
    """An evaluated array in the host's memory, in order; bfloat16 as uint16, which numpy has.

    It may be read on any thread, as MLX's own arrays may not.
    """

    dtype: DType
    data: np.ndarray

    @classmethod
    def of(cls, array: mx.array) -> HostArray:
        """An array that lies in order in memory is not copied."""
        is_brain = array.dtype == mx.bfloat16
        data = np.asarray(mx.contiguous(array.view(mx.uint16) if is_brain else array))
        return cls(DType.from_mx(array.dtype), data)

    @classmethod
    def read(cls, info: TensorInfo, raw: bytes) -> HostArray:
        """A header's entry with its bytes."""
        held = "uint16" if info.dtype is DType.bfloat16 else info.dtype.name
        return cls(info.dtype, np.frombuffer(raw, held).reshape(info.shape))

    def to_mx(self) -> mx.array:
        """A copy, on the calling thread's device."""
        array = mx.array(self.data)
        return array.view(mx.bfloat16) if self.dtype is DType.bfloat16 else array


def read_part(info: TensorInfo, axis: int, spans: Sequence[tuple[int, int]]) -> HostArray:
    """Elements begin..end-1 of an axis of a stored tensor, of each span in turn; no others are
    read. fp8 comes as bytes. Raises: WeightsError if the file cannot be read."""
    held = _HELD.get(info.dtype) or info.dtype.name
    try:
        stored = np.memmap(info.path, held, "r", info.offset, info.shape)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{info.path}: cannot be read ({clip(error)})") from None
    before = (slice(None),) * axis
    parts = [stored[(*before, slice(*span))] for span in spans]
    return HostArray(info.dtype, np.ascontiguousarray(np.concatenate(parts, axis)))


def write_file(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """Write arrays as a file that says it is MLX's.

    Arrays that lie in order in memory are written from there, without a copy. The data start at
    a multiple of eight bytes, where MLX's own writer puts them anywhere.
    Raises: InputError if the file cannot be written.
    """
    held = {name: HostArray.of(array) for name, array in tensors.items()}
    write_host_arrays(path, held, {"format": "mlx"})


def write_host_arrays(
    path: Path, tensors: Mapping[str, HostArray], metadata: Mapping[str, str]
) -> None:
    """As `write_file`, from any thread, with this metadata."""
    specs = {
        name: TensorSpec(
            dtype=array.dtype.name,
            shape=array.data.shape,
            data_ptr=array.data.ctypes.data,
            data_len=array.data.nbytes,
        )
        for name, array in tensors.items()
    }
    try:
        serialize_file(specs, path, metadata=dict(metadata))
        path.chmod(path.parent.stat().st_mode & 0o666)  # the package leaves it to the owner alone
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({clip(error, 200)})") from None


def safetensors_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, sorted: those of the index, else all that count.

    Without an index: every *.safetensors but `consolidated*` (Mistral's own layout), LoRA adapters
    and hidden files.

    Raises: CheckpointNotFound if there is no such folder; WeightsError if it holds no
    safetensors, or its index is broken or names a file that is missing or outside the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointNotFound(f"{folder}: no such folder")
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(read_index(index).values()))
    else:
        names = sorted(
            path.name
            for path in folder.glob("*.safetensors")
            if not path.name.startswith((".", "consolidated", "adapter"))
        )
    if not names:
        raise WeightsError(_explain_no_safetensors(folder))
    return [_inside(folder, name) for name in names]


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index file: tensor name -> file name, both checked to be strings.

    Raises: WeightsError naming the file.
    """
    index = read_json(path, WeightsError, unique=True, max_bytes=MAX_HEADER_BYTES) or {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path}: no weight_map; expected an object of tensor: file")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not file_name.endswith(".safetensors"):
            raise WeightsError(
                f"{path}: '{clip(name)}' is said to be in '{clip(file_name)}', which is not a"
                " .safetensors file"
            )
    return weight_map


def _inside(folder: Path, name: str) -> Path:
    """folder/name, checked to exist and to stay within the folder.

    A link may leave the folder only as the Hugging Face cache makes them: out of
    <repo>/snapshots/<revision>/ into <repo>/blobs/.
    """
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise WeightsError(f"{folder}: weight file '{clip(name)}' lies outside the folder")
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise WeightsError(
            f"{folder}: weight file '{clip(name)}' is missing; download the model again"
        ) from None
    root = folder.resolve()
    blobs = [p.parent / "blobs" for p in (root, *root.parents) if p.name == "snapshots"]
    if not target.is_relative_to(root) and target.parent not in [p.resolve() for p in blobs]:
        raise WeightsError(
            f"{folder}: weight file '{clip(name)}' is a link to {target}, outside the folder"
        )
    if not target.is_file():
        raise WeightsError(f"{folder}: weight file '{clip(name)}' is not a file")
    return path


def _explain_no_safetensors(folder: Path) -> str:
    """Why there is nothing to load, and what to use instead."""
    suffixes = {path.suffix for path in folder.iterdir() if path.is_file()}
    if ".gguf" in suffixes:
        return f"{folder}: only GGUF weights; name the .gguf file itself"
    if suffixes & {".bin", ".pt", ".pth", ".ckpt"}:
        return (
            f"{folder}: only PyTorch pickle weights, which are never read because they can run"
            " code; use a safetensors version of the model"
        )
    return f"{folder}: no *.safetensors files"
