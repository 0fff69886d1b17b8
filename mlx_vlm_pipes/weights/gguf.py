"""Tensors of a GGUF file: repacked for MLX where that loses nothing, else expanded to floats.

Q4_0, Q4_1, Q8_0 and Q4_K have groups of 32 and one scale for each, as MLX's affine packing may
have: w = d * (q - 8), d * q + m, d * q and (d * s) * q - e * m. Scales and biases are float16: d is
so in the file, and -8 d and -128 d differ from it in the exponent only. Q4_K's are products of a
float16 and six bits, exact in float32 alone. The other packings are expanded by the `gguf` package.
Rows of queries and keys come back from GGUF's order (the two of a rotary pair side by side) to that
of all other checkpoints (half a head apart).

Source: ggml-quants.c and convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import UnsupportedModel, WeightsError, clip
from mlx_vlm_pipes.gguf.config import GROUP_SIZE, PACKED_BITS, is_packed, rotary_heads
from mlx_vlm_pipes.gguf.header import BLOCK_SIZES, GGUFHeader, TensorEntry, read_gguf
from mlx_vlm_pipes.quantization import QuantizationEncoding
from mlx_vlm_pipes.weights.checkpoint import StoredTree, WeightData
from mlx_vlm_pipes.weights.safetensors import Header, TensorInfo

_PLAIN = {"F32": DType.float32, "F16": DType.float16, "BF16": DType.bfloat16}
_EXPANDED = DType.float16  # what MLX makes of such tensors, and half of what float32 would take
Read = Callable[[DType], mx.array]


class UnreadWeight(WeightData):
    """A tensor that is read whenever somebody asks for `data`, and not kept.

    MLX is lazy in files of its own formats only. `read` gives the values in a dtype asked for, so
    that a cast starts from what the file says, not from what `dtype` can hold of it.
    """

    def __init__(
        self,
        read: Read,
        name: str,
        dtype: DType,
        shape: tuple[int, ...],
        quantization_encoding: QuantizationEncoding | None = None,
    ) -> None:
        self.read, self.name, self.dtype, self.shape = read, name, dtype, shape
        self.quantization_encoding = quantization_encoding

    @property
    def data(self) -> mx.array:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.read(self.dtype)

    def astype(self, dtype: DType) -> UnreadWeight:
        return UnreadWeight(self.read, self.name, dtype, self.shape, self.quantization_encoding)

    def renamed(self, name: str) -> UnreadWeight:
        return UnreadWeight(self.read, name, self.dtype, self.shape, self.quantization_encoding)


class _GGUFTensors:
    """A file's tensors under its own names, `scales` and `biases` beside what is packed."""

    def __init__(self, path: Path) -> None:
        self.header = read_gguf(path)
        self.infos = gguf_header(path).tensors
        self.metadata: dict[str, str] = {}
        self._heads = rotary_heads(self.header)

    def weight(self, info: TensorInfo) -> WeightData:
        module, _, part = info.name.rpartition(".")
        is_extra = info.name not in self.header.tensors
        entry = self.header.tensors[f"{module}.weight" if is_extra else info.name]
        heads = self._heads.get(module.rpartition(".")[2])
        read = partial(_read, self.header, entry, part, heads)
        kind = entry.kind if is_packed(entry) or entry.kind not in _PLAIN else ""
        encoding = QuantizationEncoding.__members__.get(kind)
        return UnreadWeight(read, info.name, info.dtype, info.shape, encoding)


class GGUFWeights(StoredTree):
    """One GGUF file of the Llama family.

    Raises: WeightsError for a damaged file, UnsupportedModel for what is not read.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(_GGUFTensors(Path(path)), "")


def gguf_header(path: Path) -> Header:
    """A file's tensors as they come out of GGUFWeights: names, dtypes, shapes.

    Raises: as GGUFWeights.
    """
    header = read_gguf(path)
    rotary_heads(header)  # refuses what is no model of the Llama family
    infos: dict[str, TensorInfo] = {}
    for entry in header.tensors.values():
        for name, dtype, shape in _forms(entry):
            if name in infos:
                raise WeightsError(f"{path}: tensor '{clip(name)}' is there twice")
            infos[name] = TensorInfo(name, dtype, shape, path)
    foreign = [e for e in header.tensors.values() if e.kind not in {*_PLAIN, *PACKED_BITS}]
    if foreign and find_spec("gguf") is None:
        raise UnsupportedModel(
            f"{path}: {len(foreign)} tensors are {foreign[0].kind} and the like, which the gguf"
            " package expands; pip install gguf"
        )
    return Header(path, infos, {})


def _forms(entry: TensorEntry) -> list[tuple[str, DType, tuple[int, ...]]]:
    """(name, dtype, shape) of what becomes of a tensor."""
    if not is_packed(entry):
        return [(entry.name, _PLAIN.get(entry.kind, _EXPANDED), entry.shape)]
    rows, columns = entry.shape
    module, groups = entry.name.removesuffix("weight"), columns // GROUP_SIZE
    return [
        (entry.name, DType.uint32, (rows, columns * PACKED_BITS[entry.kind] // 32)),
        (f"{module}scales", DType.float16, (rows, groups)),
        (f"{module}biases", DType.float16, (rows, groups)),
    ]


def _read(
    header: GGUFHeader, entry: TensorEntry, part: str, heads: int | None, dtype: DType
) -> mx.array:
    """A tensor, or a part of a packed one, in the order of rows that other checkpoints have."""
    raw = np.frombuffer(header.read(entry), dtype=np.uint8)
    if is_packed(entry):
        blocks = raw.reshape(*entry.shape[:-1], entry.shape[-1] // BLOCK_SIZES[entry.kind], -1)
        values = _UNPACKERS[entry.kind](blocks, part)
        values = values.reshape(*entry.shape[:-1], -1)
    elif entry.kind == "BF16":
        values = raw.view(np.uint16).reshape(entry.shape)
    elif entry.kind in _PLAIN:
        values = raw.view(_PLAIN[entry.kind].to_numpy()).reshape(entry.shape)
    else:
        values = _expanded(raw, entry)
    if heads is not None and entry.shape[0] % (2 * heads) == 0:
        values = _halves_apart(values, heads)
    array = mx.array(values)
    if entry.kind == "BF16":
        array = array.view(mx.bfloat16)
    if values.dtype == np.uint32 or array.dtype == dtype.to_mx():
        return array
    array = array.astype(dtype.to_mx())
    mx.eval(array)  # or the wider array would stay beside it until somebody evaluates this one
    return array


def _halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head to its place i, row 2i + 1 to i + head_dim / 2: [heads * head_dim, ...]."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _expanded(raw: np.ndarray, entry: TensorEntry) -> np.ndarray:
    from gguf import GGMLQuantizationType, dequantize

    rows = raw.reshape(math.prod(entry.shape[:-1]), -1)
    return dequantize(rows, GGMLQuantizationType[entry.kind]).reshape(entry.shape)


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a place of each block: [..., groups, bytes] -> [..., groups]."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0]


def _nibbles(blocks: np.ndarray, start: int) -> np.ndarray:
    """MLX's words of 4-bit codes: element i in bits 4i, where ggml has i and i + 16 in a byte."""
    packed = blocks[..., start : start + GROUP_SIZE // 2]
    first, second = packed & 15, packed >> 4
    ordered = [half[..., ::2] | (half[..., 1::2] << 4) for half in (first, second)]
    return np.concatenate(ordered, axis=-1).view(np.uint32)


def _q4_0(blocks: np.ndarray, part: str) -> np.ndarray:
    if part == "weight":
        return _nibbles(blocks, 2)
    return _halves(blocks, 0) * np.float16(-8 if part == "biases" else 1)


def _q4_1(blocks: np.ndarray, part: str) -> np.ndarray:
    if part == "weight":
        return _nibbles(blocks, 4)
    return _halves(blocks, 2 if part == "biases" else 0)


def _q4_k(blocks: np.ndarray, part: str) -> np.ndarray:
    """Eight groups a block; two lie in each 32 bytes, one in the low halves, one in the high."""
    if part == "weight":
        pairs = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 1, GROUP_SIZE)
        codes = np.concatenate([pairs & 15, pairs >> 4], axis=-2)
        return (codes[..., ::2] | (codes[..., 1::2] << 4)).view(np.uint32)
    first, second, high = (blocks[..., start : start + 4] for start in (4, 8, 12))
    is_scale = part == "scales"
    low, rest = (first, high & 15) if is_scale else (second, high >> 4)
    six_bits = np.concatenate([low & 63, rest | (low >> 6 << 4)], axis=-1)
    factor = _halves(blocks, 0 if is_scale else 2).astype(np.float32)[..., None]
    return factor * six_bits if is_scale else -factor * six_bits


def _q8_0(blocks: np.ndarray, part: str) -> np.ndarray:
    if part == "weight":
        return (np.ascontiguousarray(blocks[..., 2:]) ^ 128).view(np.uint32)
    return _halves(blocks, 0) * np.float16(-128 if part == "biases" else 1)


_UNPACKERS: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q8_0": _q8_0,
}
