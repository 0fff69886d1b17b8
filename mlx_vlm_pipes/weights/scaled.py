"""Weights stored as small floats (or int8) with separate scales: expanded while loading.

fp8 (tensor, row or block scales), int8 and nvfp4 with a global scale become plain floats, because
MLX has no layer for them; mxfp4 is kept packed, as MLX does the same. Pure and lazy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import mlx.core as mx

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import WeightsError, clip
from mlx_vlm_pipes.quantization import QuantConfig, QuantizationConfig, ScaleSpec
from mlx_vlm_pipes.weights.checkpoint import Tensors, WeightData
from mlx_vlm_pipes.weights.quantized import ScaledFormat
from mlx_vlm_pipes.weights.repack import repack

_NARROW = (DType.float8_e4m3fn, DType.int8)
_SCALES = ("weight_scale", "weight_scale_inv")  # both are multiplied, whatever the name says
# what only other runtimes use: activation and KV-cache scales, shapes that the arrays have anyway
_UNUSED = (
    "input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "output_scale",
    "activation_scale", "activation_scale_ub", "q_scale", "k_scale", "v_scale", "weight_shape",
)  # fmt: skip


def unpack_checkpoint(
    state: Tensors,
    quantization: QuantizationConfig | ScaledFormat | None,
    dtype: DType | None = None,
) -> tuple[dict[str, WeightData], QuantizationConfig | None]:
    """Bring any quantisation that is read to plain floats or MLX's own packing.

    Args: state and quantization as the checkpoint has them; dtype of what is expanded (default
    bfloat16, for GPTQ and AWQ that of their scales).
    Returns: the state dict, module names unchanged, and the MLX settings left to apply, if any.
    Raises: WeightsError naming a tensor that does not fit the declared format.
    """
    if isinstance(quantization, QuantizationConfig):
        if quantization.quant_method == "mlx":
            return dict(state), quantization
        return repack(state, quantization, dtype)
    if quantization is not None and quantization.format == "mxfp4":
        return _rename_mxfp4(state), QuantizationConfig("mlx", 4, 32, mode="mxfp4")
    return expand_scaled(state, quantization, dtype or DType.bfloat16), None


def expand_scaled(
    state: Tensors, quantization: ScaledFormat | None, dtype: DType
) -> dict[str, WeightData]:
    """Multiply out every scaled weight; float8 tensors without a scale are just decoded.

    Raises: WeightsError for a scale that fits no weight, or fits it in no way.
    Source: transformers integrations/finegrained_fp8.py, compressed_tensors, ModelOpt.
    """
    expanded: dict[str, WeightData] = {}
    consumed: set[str] = set()
    for name, weight in state.items():
        module, _, part = name.rpartition(".")
        if part in _UNUSED:
            continue
        if part == "weight_packed" or (part == "weight" and f"{module}.weight_scale_2" in state):
            target = f"{module}.weight"
            values, used = _expand_nvfp4(state, module, weight)
        elif weight.dtype in _NARROW and part not in _SCALES:
            target = name
            values, used = _expand_rows(state, name, weight, quantization)
        else:
            continue
        consumed.update((name, *used))
        expanded[target] = WeightData.from_array(values.astype(dtype.to_mx()), target)
    kept = {
        name: weight
        for name, weight in state.items()
        if name not in consumed and name.rpartition(".")[2] not in _UNUSED
    }
    left = [name for name in kept if name.endswith((*_SCALES, "weight_scale_2"))]
    if left:
        raise WeightsError(f"{len(left)} scales without a scaled weight, first '{clip(left[0])}'")
    return kept | expanded


def _decode(weight: WeightData) -> mx.array:
    """float8 or int8 values as float32."""
    if weight.dtype is DType.float8_e4m3fn:
        return mx.from_fp8(weight.data, dtype=mx.float32)
    return weight.data.astype(mx.float32)


def _expand_rows(
    state: Tensors, name: str, weight: WeightData, quantization: ScaledFormat | None
) -> tuple[mx.array, list[str]]:
    """float8 or int8 values times their scale; float32, and the names used up."""
    values = _decode(weight)
    used = [f"{name}{suffix.removeprefix('weight')}" for suffix in _SCALES]
    used = [scale_name for scale_name in used if scale_name in state]
    if not used:
        return values, used
    block = quantization.block_size if quantization else None
    zero_name = f"{name}_zero_point"
    if zero_name in state:
        used.append(zero_name)
        values = values - _scale_like(state[zero_name], weight.shape, block)
    return values * _scale_like(state[used[0]], weight.shape, block), used


def _scale_like(
    scale: WeightData, shape: tuple[int, ...], block: tuple[int, int] | None
) -> mx.array:
    """A scale as float32 that broadcasts against a weight of this shape.

    Raises: WeightsError if it fits in no way.
    """
    factors = _exponents(scale.data) if scale.dtype is DType.uint8 else scale.data
    factors = factors.astype(mx.float32)
    kind = granularity(scale.shape, shape, block)
    if kind == "tensor":
        return factors.reshape(())
    if kind == "rowwise":
        return factors.reshape(-1, 1)
    if kind == "colwise":
        return factors.reshape(1, -1)
    if kind == "block" and block is not None:
        rows, columns = shape
        tall = mx.repeat(factors, min(block[0], rows), axis=0)[:rows]
        return mx.repeat(tall, min(block[1], columns), axis=1)[:, :columns]
    raise WeightsError(
        f"'{clip(scale.name)}' is {list(scale.shape)}, which scales neither the tensor"
        f" {list(shape)}, nor its rows, nor its blocks ({block})"
    )


def _exponents(data: mx.array) -> mx.array:
    """E8M0 bytes -> powers of two, exactly: the byte is a float32's exponent field."""
    return (data.astype(mx.uint32) << 23).view(mx.float32)


def granularity(
    scale: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int] | None
) -> Literal["tensor", "rowwise", "colwise", "block"] | None:
    """What each number of a scale covers; None if the shapes do not fit."""
    if scale in ((), (1,), (1, 1)):
        return "tensor"
    if len(weight) != 2:
        return None
    rows, columns = weight
    if block is not None:
        return "block" if scale == (-(-rows // block[0]), -(-columns // block[1])) else None
    if scale in ((rows,), (rows, 1)):
        return "rowwise"
    return "colwise" if scale == (1, columns) else None


def _expand_nvfp4(state: Tensors, module: str, weight: WeightData) -> tuple[mx.array, list[str]]:
    """4-bit floats, scaled by fp8 per 16 inputs and one float: float32, and the names used up.

    compressed-tensors divides by weight_global_scale, ModelOpt multiplies by weight_scale_2.
    """
    names = {part: f"{module}.{part}" for part in ("weight_scale", "weight_scale_2")}
    names["weight_global_scale"] = f"{module}.weight_global_scale"
    scale = state.get(names["weight_scale"])
    packed_fits = (
        weight.dtype is DType.uint8 and len(weight.shape) == 2 and weight.shape[1] % 8 == 0
    )
    if not packed_fits or scale is None or scale.shape != (weight.shape[0], weight.shape[1] // 8):
        found = list(scale.shape) if scale else "none"
        raise WeightsError(
            f"'{clip(weight.name)}' is {weight.dtype.name} {list(weight.shape)} with weight_scale"
            f" {found}; expected uint8 [out, in/2] with [out, in/16]"
        )
    values = mx.dequantize(weight.data.view(mx.uint32), scale.data, mode="nvfp4", dtype=mx.float32)
    if names["weight_global_scale"] in state:
        values = values / _scalar(state[names["weight_global_scale"]])
    if names["weight_scale_2"] in state:
        values = values * _scalar(state[names["weight_scale_2"]])
    return values, [name for name in names.values() if name in state]


def _scalar(weight: WeightData) -> mx.array:
    if weight.shape not in ((), (1,), (1, 1)):
        raise WeightsError(f"'{clip(weight.name)}' is {list(weight.shape)}, expected one number")
    return weight.data.astype(mx.float32).reshape(())


def _rename_mxfp4(state: Tensors) -> dict[str, WeightData]:
    """compressed-tensors mxfp4 is MLX's, byte for byte: uint8 [out, in/2] viewed as words."""
    renamed: dict[str, WeightData] = {}
    for name, weight in state.items():
        module, _, part = name.rpartition(".")
        target, data = name, weight.data
        if part in _UNUSED:
            continue
        if part == "weight_packed":
            if weight.dtype is not DType.uint8 or weight.shape[-1:] == () or weight.shape[-1] % 16:
                raise WeightsError(f"'{clip(name)}' is not uint8 in whole groups of 32 values")
            target, data = f"{module}.weight", data.view(mx.uint32)
        elif part == "weight_scale" and f"{module}.weight_packed" in state:
            target = f"{module}.scales"
        renamed[target] = WeightData.from_array(data, target)
    return renamed


def record_scales(state: Tensors, quantization: ScaledFormat) -> QuantConfig | None:
    """The record of a scaled checkpoint; looks at names, dtypes and shapes only.

    A layer counts as quantised when all matrices of its MLP (or attention) have a scale.
    """
    scales = {
        name.rpartition(".")[0]: weight
        for name, weight in state.items()
        if name.endswith(tuple("." + scale for scale in _SCALES))
    }
    if not scales:
        return None
    module, scale = next(iter(scales.items()))
    weight = state.get(f"{module}.weight")
    covers = granularity(scale.shape, weight.shape, quantization.block_size) if weight else None
    inputs = [w for n, w in state.items() if n.endswith((".input_scale", ".activation_scale"))]
    return QuantConfig(
        input_scale=ScaleSpec("tensor", inputs[0].dtype) if inputs else None,
        weight_scale=ScaleSpec(covers or "block", scale.dtype, quantization.block_size),
        mlp_quantized_layers=_whole_layers(state, scales, "mlp"),
        attn_quantized_layers=_whole_layers(state, scales, "(?:self_)?attn"),
        format=quantization.format,
    )


def _whole_layers(state: Tensors, scaled: Mapping[str, object], part: str) -> set[int]:
    """Layers whose part (a pattern) has a scale for each of its matrices."""
    pattern = re.compile(rf"(?:.*\.)?(?:layers|blocks)\.(\d{{1,6}})\.{part}\.\w+")
    found: dict[int, list[bool]] = {}
    for name, weight in state.items():
        module, _, kind = name.rpartition(".")
        match = pattern.fullmatch(module)
        if match and kind in ("weight", "weight_packed") and len(weight.shape) == 2:
            found.setdefault(int(match[1]), []).append(module in scaled)
    return {layer for layer, flags in found.items() if all(flags)}
