"""Integer-packed weights of other tools, brought to MLX's affine packing while loading.

MLX affine: `weight` uint32 [out, in*bits/32], lowest bits first, `scales` and `biases`
[out, in/group]; w = q * scale + bias. What MLX has no group size for, and GPTQ with reordered
groups, is expanded to floats. All functions are pure and lazy: state dict in, state dict out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import WeightsError, clip
from mlx_vlm_pipes.quantization import QuantizationConfig
from mlx_vlm_pipes.weights.checkpoint import Tensors, WeightData

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds column 0, 1, … of each eight
_FLOAT = ("float", "bfloat")  # DType names
_WORDS = ("int32",)
_INT = ("int",)
_UNPACK = 32  # any group size serves to read codes back with scale 1 and bias 0


@dataclass(frozen=True)
class PackedLinear:
    """One linear layer: codes in MLX's packing, w[o, i] = scales[o, g] * (q[o, i] - zeros[o, g]).

    codes uint32 [out, in*bits/32]; scales and zeros [out, G], float; groups: g for each input,
    int32 [in], or None where group g simply holds inputs g*group_size onwards.
    """

    codes: mx.array
    scales: mx.array
    zeros: mx.array
    bits: int
    group_size: int
    groups: mx.array | None = None

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * 32 // self.bits

    def fits(self, mlx_group: int) -> bool:
        """Whether MLX groups of this size subdivide the groups here."""
        whole_groups = self.group_size % mlx_group == 0 and self.columns % mlx_group == 0
        return self.groups is None and whole_groups

    def to_affine(self, mlx_group: int) -> dict[str, mx.array]:
        """MLX's three arrays; a larger group is written as several equal ones."""
        repeats, count = self.group_size // mlx_group, self.columns // mlx_group
        biases = -(self.scales.astype(mx.float32) * self.zeros).astype(self.scales.dtype)
        return {
            "weight": self.codes,
            "scales": mx.repeat(self.scales, repeats, axis=1)[:, :count],
            "biases": mx.repeat(biases, repeats, axis=1)[:, :count],
        }

    def to_float(self) -> mx.array:
        """The weights themselves, [out, in], in the dtype of the scales."""
        rows, columns = len(self.codes), self.columns
        ones = mx.ones((rows, columns // _UNPACK), dtype=mx.float32)
        codes = mx.dequantize(self.codes, ones, mx.zeros_like(ones), _UNPACK, self.bits)
        groups = self.groups if self.groups is not None else mx.arange(columns) // self.group_size
        scales, zeros = self.scales.astype(mx.float32), self.zeros.astype(mx.float32)
        weights = (codes - mx.take(zeros, groups, axis=1)) * mx.take(scales, groups, axis=1)
        return weights.astype(self.scales.dtype)


def unpack_words(words: mx.array, bits: int) -> mx.array:
    """[..., n] 32-bit words -> [..., n*32/bits] codes, lowest bits first; a code may span words.

    Meant for small arrays (zero points): it needs 32 times their memory.
    """
    stream = (words.view(mx.uint32)[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    stream = stream.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits, bits)
    return (stream << mx.arange(bits, dtype=mx.uint32)).sum(axis=-1)


def repack(
    state: Tensors, quantization: QuantizationConfig, dtype: DType | None = None
) -> tuple[dict[str, WeightData], QuantizationConfig | None]:
    """GPTQ, AWQ or compressed-tensors integers -> MLX affine, under the same module names.

    Args: dtype of scales, biases and expanded weights; None keeps the checkpoint's. In float32
    nothing is rounded.
    Returns: the new state dict and the settings that now describe it, None if all became floats.
    Raises: WeightsError naming a module with a tensor missing or of the wrong shape.
    Source: AutoGPTQ/GPTQModel qlinear, AutoAWQ packing_utils, compressed_tensors pack_quantized.
    """
    readers: dict[str, tuple[str, Callable[[Tensors, str, QuantizationConfig], PackedLinear]]] = {
        "gptq": (".qweight", _read_gptq),
        "awq": (".qweight", _read_awq),
        "compressed-tensors": (".weight_packed", _read_pack_quantized),
    }
    suffix, read = readers[quantization.quant_method]
    modules = [name.removesuffix(suffix) for name in state if name.endswith(suffix)]
    linears = {module: read(state, module, quantization) for module in modules}
    if dtype is not None:
        linears = {name: _cast(linear, dtype) for name, linear in linears.items()}
    subdividable = [linear for linear in linears.values() if linear.fits(32)]
    mlx_group = next((g for g in (128, 64) if all(lin.fits(g) for lin in subdividable)), 32)
    consumed = {f"{module}.{part}" for module in linears for part in _PARTS}
    unpacked = {name: weight for name, weight in state.items() if name not in consumed}
    for module, linear in linears.items():
        arrays = linear.to_affine(mlx_group) if linear.fits(mlx_group) else None
        for part, array in (arrays or {"weight": linear.to_float()}).items():
            name = f"{module}.{part}"
            unpacked[name] = WeightData.from_array(array, name)
    settings = QuantizationConfig("mlx", quantization.bits, mlx_group)
    return unpacked, settings if subdividable else None


_PARTS = (
    "qweight", "qzeros", "scales", "g_idx",
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    "input_scale", "input_zero_point",
)  # fmt: skip


def _cast(linear: PackedLinear, dtype: DType) -> PackedLinear:
    return PackedLinear(
        linear.codes,
        linear.scales.astype(dtype.to_mx()),
        linear.zeros,
        linear.bits,
        linear.group_size,
        linear.groups,
    )


def _part(
    state: Tensors, name: str, shape: tuple[int | None, ...], kinds: tuple[str, ...]
) -> mx.array:
    """A module's tensor, with its shape (None: any) and kind of dtype checked."""
    weight = state.get(name)
    if weight is None:
        raise WeightsError(f"'{clip(name)}' is missing beside the packed weight")
    fits = len(weight.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, weight.shape, strict=True)
    )
    if not fits or not weight.dtype.name.startswith(kinds):
        wanted = [size if size is not None else "any" for size in shape]
        raise WeightsError(
            f"'{clip(name)}' is {weight.dtype.name} {list(weight.shape)};"
            f" expected {kinds[0]} {wanted}"
        )
    return weight.data


def _groups(columns: int, group_size: int) -> tuple[int, int]:
    """(group size, number of groups) of a row; -1, or more than a row, is the whole row."""
    size = columns if group_size == -1 else min(group_size, columns)
    return size, -(-columns // size)


def _check_columns(module: str, columns: int, rows: int) -> None:
    if columns == 0 or rows == 0 or columns % 32:
        raise WeightsError(f"'{clip(module)}' has {columns} inputs; packed layers need 32, 64, …")


def _read_gptq(state: Tensors, module: str, quantization: QuantizationConfig) -> PackedLinear:
    """qweight int32 [in*bits/32, out], packed along inputs; qzeros [G, out*bits/32] along outputs.

    Its bit stream down a column is MLX's along a row, so the codes are only transposed. In the
    v1 format a stored zero is one too small, modulo 2^bits.
    """
    bits = quantization.bits
    packed = _part(state, f"{module}.qweight", (None, None), _WORDS)
    columns, rows = packed.shape[0] * 32 // bits, packed.shape[1]
    _check_columns(module, columns, rows)
    size, count = _groups(columns, quantization.group_size)
    scales = _part(state, f"{module}.scales", (count, rows), _FLOAT)
    if quantization.sym:
        zeros = mx.full((count, rows), 1 << (bits - 1), dtype=mx.uint32)
    else:
        if rows * bits % 32:
            raise WeightsError(f"'{clip(module)}' has {rows} outputs: its zeros cannot be packed")
        packed_zeros = _part(state, f"{module}.qzeros", (count, rows * bits // 32), _WORDS)
        zeros = unpack_words(packed_zeros, bits)
        if quantization.mode == "gptq":
            zeros = (zeros + 1) & ((1 << bits) - 1)
    groups = _group_index(state, f"{module}.g_idx", columns, size)
    codes = mx.contiguous(packed.T).view(mx.uint32)
    return PackedLinear(codes, scales.T, zeros.T.astype(mx.float32), bits, size, groups)


def _group_index(state: Tensors, name: str, columns: int, size: int) -> mx.array | None:
    """Each input's group, None if there is no such tensor or it is in plain order. Reads it."""
    if name not in state:
        return None
    groups = _part(state, name, (columns,), _INT).astype(mx.int32)
    if mx.array_equal(groups, mx.arange(columns, dtype=mx.int32) // size):
        return None
    if mx.any((groups < 0) | (groups >= -(-columns // size))).item():
        raise WeightsError(f"'{clip(name)}' names groups that do not exist")
    return groups


def _read_awq(state: Tensors, module: str, quantization: QuantizationConfig) -> PackedLinear:
    """qweight int32 [in, out/8] and qzeros [G, out/8], eight outputs a word, interleaved."""
    packed = _part(state, f"{module}.qweight", (None, None), _WORDS)
    columns, rows = packed.shape[0], packed.shape[1] * 8
    _check_columns(module, columns, rows)
    size, count = _groups(columns, quantization.group_size)
    scales = _part(state, f"{module}.scales", (count, rows), _FLOAT)
    if quantization.sym:
        zeros = mx.full((count, rows), 8, dtype=mx.uint8)
    else:
        zeros = _awq_nibbles(_part(state, f"{module}.qzeros", (count, rows // 8), _WORDS))
    nibbles = mx.contiguous(_awq_nibbles(packed).T)  # [out, in]
    codes = (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).view(mx.uint32)
    return PackedLinear(codes, scales.T, zeros.T.astype(mx.float32), 4, size)


def _awq_nibbles(words: mx.array) -> mx.array:
    """[n, out/8] words -> [n, out] uint8 codes in column order."""
    shifts = mx.array([4 * nibble for nibble in _AWQ_ORDER], dtype=mx.uint32)
    nibbles = ((words.view(mx.uint32)[..., None] >> shifts) & 15).astype(mx.uint8)
    return nibbles.reshape(len(words), words.shape[1] * 8)


def _read_pack_quantized(
    state: Tensors, module: str, quantization: QuantizationConfig
) -> PackedLinear:
    """weight_packed int32 [out, in*bits/32], as MLX packs; codes are offset by 2^(bits-1).

    weight_zero_point is packed along outputs, [out*bits/32, G], with the same offset.
    """
    bits = quantization.bits
    packed = _part(state, f"{module}.weight_packed", (None, None), _WORDS)
    rows, columns = packed.shape[0], packed.shape[1] * 32 // bits
    _check_columns(module, columns, rows)
    size, count = _groups(columns, quantization.group_size)
    scales = _part(state, f"{module}.weight_scale", (rows, count), _FLOAT)
    if quantization.sym:
        zeros = mx.full((rows, count), 1 << (bits - 1), dtype=mx.float32)
    else:
        name, words = f"{module}.weight_zero_point", -(-rows * bits // 32)
        stored = _part(state, name, (words, count), _WORDS)
        zeros = unpack_words(mx.contiguous(stored.T), bits)[:, :rows].T.astype(mx.float32)
    groups = _group_index(state, f"{module}.weight_g_idx", columns, size)
    return PackedLinear(packed.view(mx.uint32), scales, zeros, bits, size, groups)


def drop_dummy_biases(state: Tensors, expected: Mapping[str, object]) -> dict[str, WeightData]:
    """Drop all-zero biases of matrices that the model gives none: AutoGPTQ writes them everywhere.

    Args: state and expected by the same names. Reads only the biases in question.
    """

    def is_dummy(name: str, weight: WeightData) -> bool:
        matrix = state.get(f"{name.removesuffix('bias')}weight")
        at_matrix = name.endswith(".bias") and matrix is not None and len(matrix.shape) == 2
        return at_matrix and name not in expected and not mx.any(weight.data).item()

    return {name: weight for name, weight in state.items() if not is_dummy(name, weight)}
