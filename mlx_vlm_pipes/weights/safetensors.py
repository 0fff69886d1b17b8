"""Reading safetensors headers, and finding a folder's weight files. No tensor data is read here.

MLX's own loader accepts overlapping tensors and reports damage without naming the file, so every
header is checked here before MLX sees the file. Everything in a header is untrusted.

Source: the safetensors format description (8-byte little-endian length, JSON header, data).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import CheckpointNotFound, WeightsError, clip
from mlx_vlm_pipes.json_files import parse_json, read_json

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_RANK = 16
MAX_DIM = 2**31 - 1  # MLX keeps shapes in int32
MAX_METADATA = 10_000

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
    """One header entry. `start` and `end` are byte positions in the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int
    path: Path


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name, and the file's string metadata."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read and check one file's header; costs a few kilobytes however large the file.

    Raises: WeightsError naming the file, and the tensor where one is at fault.
    Source: safetensors format; the limit of 100 MB is the reference reader's.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            raw = _read_header_bytes(file, file_bytes, path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    entries = parse_json(raw, path, WeightsError, unique=True)
    metadata = _checked_metadata(entries.pop("__metadata__", None) or {}, path)  # MLX writes null
    base = 8 + len(raw)
    tensors = {
        name: _checked_entry(name, entry, path, base, file_bytes) for name, entry in entries.items()
    }
    _refuse_overlap(tensors.values())
    return Header(path, tensors, metadata)


def _read_header_bytes(file: Any, file_bytes: int, path: Path) -> bytes:
    """The JSON part of a header, as bytes; refuses lengths that cannot be true."""
    if file_bytes < 8:
        raise WeightsError(
            f"{path}: {file_bytes} bytes is too short for a safetensors file; download it again"
        )
    (length,) = struct.unpack("<Q", file.read(8))
    if length > file_bytes - 8 or length > MAX_HEADER_BYTES:
        raise WeightsError(
            f"{path}: header of {length} bytes in a file of {file_bytes}"
            f" (limit {MAX_HEADER_BYTES}); not a safetensors file, or cut short"
        )
    raw = file.read(length)
    if raw.count(b"{") > MAX_TENSORS or raw.count(b"[") > 2 * MAX_TENSORS + MAX_METADATA:
        raise WeightsError(f"{path}: more than {MAX_TENSORS} tensors in one header")
    return raw


def _checked_metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise WeightsError(f"{path}: __metadata__ is not a small object of strings")
    for key, text in value.items():
        if not isinstance(text, str):
            raise WeightsError(f"{path}: __metadata__ entry '{clip(key)}' is not a string")
    return value


def _checked_entry(name: str, entry: Any, path: Path, base: int, file_bytes: int) -> TensorInfo:
    """One tensor's header entry as a TensorInfo; every number in it is checked."""
    where = f"{path}: tensor '{clip(name)}'"
    if not isinstance(entry, dict):
        raise WeightsError(f"{where}: entry is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightsError(f"{where}: unknown dtype '{clip(dtype)}'; known: {', '.join(DTYPES)}")
    if not _are_counts(shape, MAX_RANK, MAX_DIM):
        raise WeightsError(f"{where}: shape {clip(shape)} is not a short list of sizes")
    if not _are_counts(offsets, 2, file_bytes) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(
            f"{where}: data_offsets {clip(offsets)} is not a [start, end] within the"
            f" file's {file_bytes} bytes; the file may be cut short"
        )
    start, end = base + offsets[0], base + offsets[1]
    if end > file_bytes:
        raise WeightsError(
            f"{where}: ends at byte {end} but the file has {file_bytes}; cut short, download again"
        )
    size = math.prod(shape) * DTYPES[dtype].size_in_bytes
    if size != end - start:
        raise WeightsError(
            f"{where}: {dtype} {shape} needs {clip(size)} bytes, its data_offsets hold"
            f" {end - start}"
        )
    return TensorInfo(name, DTYPES[dtype], tuple(shape), start, end, path)


def _are_counts(value: Any, max_length: int, max_value: int) -> TypeGuard[list[int]]:
    """Whether value is a list of at most max_length ints in 0..max_value (no bools)."""
    return (
        isinstance(value, list)
        and len(value) <= max_length
        and all(type(item) is int and 0 <= item <= max_value for item in value)
    )


def _refuse_overlap(tensors: Iterable[TensorInfo]) -> None:
    filled = sorted((t for t in tensors if t.end > t.start), key=lambda t: (t.start, t.end))
    for left, right in itertools.pairwise(filled):
        if right.start < left.end:
            raise WeightsError(
                f"{left.path}: tensors '{clip(left.name)}' and '{clip(right.name)}' overlap"
            )


def find_weight_files(folder: str | Path) -> list[Path]:
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
        return (
            f"{folder}: only GGUF weights; use the model's safetensors, or a quantised version"
            " from mlx-community"
        )
    if suffixes & {".bin", ".pt", ".pth", ".ckpt"}:
        return (
            f"{folder}: only PyTorch pickle weights, which are never read because they can run"
            " code; use a safetensors version of the model"
        )
    return f"{folder}: no *.safetensors files"
