"""The header of a GGUF file, read within bounds: metadata, and where each tensor lies.

The `gguf` package's own reader makes numpy arrays of every string (SmolLM2's 98,000 tokens and
merges: 4.6 s and 196 MB; here 0.2 s) and trusts what a file says of its lengths: a list of 2**60
numbers keeps it busy for ever. MLX's reads and writes outside of its memory for such files.
Everything in a header is untrusted.

Source: ggml's docs/gguf.md; block sizes from ggml-common.h.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from mlx_vlm_pipes.errors import UnsupportedModel, WeightsError, clip

SUFFIX = ".gguf"
MAX_HEADER_BYTES = 64_000_000
MAX_LIST = 2**21  # entries; vocabularies have up to 2**18, merges twice as many
MAX_ENTRIES = 2**16  # of metadata, and of tensors
MAX_DIM = 2**31 - 1  # MLX keeps shapes in int32
MAX_NAME_BYTES = 2**10
MAX_DIMS = 4

# number in the file: (name, elements of a block, its bytes)
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}  # fmt: skip
BLOCK_SIZES = {name: elements for name, elements, _ in TENSOR_TYPES.values()}
_STRING, _LIST = 8, 9
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies. shape: rows first, as torch and MLX have it; offset: in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """A checked header. metadata: numbers, flags, strings, and lists of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def read(self, entry: TensorEntry) -> bytes:
        """A tensor's bytes. Raises: WeightsError if the file has become shorter."""
        try:
            with self.path.open("rb") as file:
                file.seek(entry.offset)
                raw = file.read(entry.nbytes)
        except OSError as error:
            raise WeightsError(f"{self.path}: cannot be read ({error.strerror})") from None
        if len(raw) != entry.nbytes:
            raise WeightsError(
                f"{self.path}: tensor '{clip(entry.name)}' cannot be read whole; was the file"
                " changed meanwhile?"
            )
        return raw


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file (a folder may be called so too)."""
    return path.suffix == SUFFIX and path.is_file()


def read_gguf(path: Path) -> GGUFHeader:
    """Read and check a file's header; a file that has not changed is read once.

    Raises: WeightsError naming the file for one that is damaged or no regular file,
    UnsupportedModel for a version or a type of tensors that is not read.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise WeightsError(f"{path}: not a regular file; expected a GGUF file")
    return _read_unchanged(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def _read_unchanged(path: Path, modified: int, size: int) -> GGUFHeader:
    del modified
    try:
        with path.open("rb") as file:
            return _Reader(path, file, size).header()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None


class _Reader:
    """Takes a header apart from front to back; asks for no more bytes than there are."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.position = 0

    def header(self) -> GGUFHeader:
        start = self.take(8) if self.size >= 24 else b""
        if start[:4] != b"GGUF":
            raise self.fault("does not begin as a GGUF file does; download it again")
        version = int.from_bytes(start[4:], "little")
        if version not in (2, 3):
            big = int.from_bytes(start[4:], "big") in (2, 3)
            kind = "for big-endian machines" if big else f"version {version}"
            raise UnsupportedModel(f"{self.path}: GGUF {kind}; versions 2 and 3 are read")
        num_tensors, num_entries = self.numbers("QQ")
        if max(num_tensors, num_entries) > MAX_ENTRIES:
            raise self.fault(f"{num_tensors} tensors and {num_entries} entries of metadata")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.name()
            if key in metadata:
                raise self.fault(f"metadata '{clip(key)}' occurs twice")
            (kind,) = self.numbers("I")
            metadata[key] = self.value(kind, key)
        return GGUFHeader(self.path, metadata, self.tensors(num_tensors, metadata))

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, TensorEntry]:
        found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.name()
            if name in found:
                raise self.fault(f"tensor '{clip(name)}' occurs twice")
            found[name] = self.form(name)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**16:
            raise self.fault(f"general.alignment is '{clip(alignment)}'")
        data = -(-self.position // alignment) * alignment
        entries = [TensorEntry(n, kind, s, data + at, b) for n, (kind, s, at, b) in found.items()]
        end = self.position
        for entry in sorted(entries, key=lambda entry: entry.offset):
            if entry.offset < end:
                raise self.fault(f"tensor '{clip(entry.name)}' lies over another one")
            end = entry.offset + entry.nbytes
            if end > self.size:
                raise self.fault(
                    f"tensor '{clip(entry.name)}' ends at byte {end} of {self.size}; the file is"
                    " cut short, download it again"
                )
        return {entry.name: entry for entry in entries}

    def form(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        """(type, shape, place in the data, bytes) of the tensor whose name was just read."""
        (dims,) = self.numbers("I")
        if not 1 <= dims <= MAX_DIMS:
            raise self.fault(f"tensor '{clip(name)}' has {dims} dimensions")
        shape = tuple(reversed(self.numbers(f"{dims}Q")))
        number, offset = self.numbers("IQ")
        if not all(1 <= size <= MAX_DIM for size in shape):
            raise self.fault(f"tensor '{clip(name)}' has the shape {clip(list(shape))}")
        if number not in TENSOR_TYPES:
            known = ", ".join(kind for kind, _, _ in TENSOR_TYPES.values())
            raise UnsupportedModel(
                f"{self.path}: tensor '{clip(name)}' is of ggml type {number}; read are {known}"
            )
        kind, elements, nbytes = TENSOR_TYPES[number]
        if shape[-1] % elements:
            raise self.fault(
                f"tensor '{clip(name)}' has rows of {shape[-1]}; {kind} has blocks of {elements}"
            )
        return kind, shape, offset, math.prod(shape) // elements * nbytes

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _LIST:
            inner, count = self.numbers("IQ")
            if count > MAX_LIST:
                raise self.fault(f"metadata '{clip(key)}' is a list of {count} entries")
            if inner == _STRING:
                return list(self.texts(count))
            return list(self.numbers(f"{count}{self.number(inner, key)}"))
        return self.numbers(self.number(kind, key))[0]

    def number(self, kind: int, key: str) -> str:
        if kind not in _NUMBERS:
            raise self.fault(f"metadata '{clip(key)}' is of type {kind}, which there is not")
        return _NUMBERS[kind]

    def name(self) -> str:
        return self.text(MAX_NAME_BYTES)

    def text(self, limit: int = MAX_HEADER_BYTES) -> str:
        (length,) = self.numbers("Q")
        if length > limit:
            raise self.fault(f"a text of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.fault(f"a text before byte {self.position} is not UTF-8") from None

    def texts(self, count: int) -> Iterator[str]:
        for _ in range(count):
            yield self.text()

    def numbers(self, form: str) -> tuple[Any, ...]:
        packed = "<" + form
        return struct.unpack(packed, self.take(struct.calcsize(packed)))

    def take(self, count: int) -> bytes:
        """The next bytes. Raises: WeightsError where the file, or what we read of it, ends."""
        self.position += count
        if self.position > min(self.size, MAX_HEADER_BYTES):
            raise self.fault(
                f"the header goes on beyond byte {min(self.size, MAX_HEADER_BYTES)}; it is cut"
                " short, download it again"
            )
        raw = self.file.read(count)
        if len(raw) != count:
            raise self.fault("the file became shorter while it was read")
        return raw

    def fault(self, reason: str) -> WeightsError:
        return WeightsError(f"{self.path}: {reason}")


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds one, and no safetensors; None for any other.

    Raises: WeightsError for several: other models, or one cut into several files.
    """
    names = sorted(os.listdir(folder))
    found = [name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
    if not found or any(name.endswith(".safetensors") for name in names):
        return None
    if len(found) > 1:
        raise WeightsError(
            f"{folder}: {len(found)} GGUF files ({clip(', '.join(found))}); name the one to read"
        )
    return folder / found[0]
