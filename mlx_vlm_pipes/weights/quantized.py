"""What config.json says about packed weights, and modules made to hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_vlm_pipes.errors import ConfigError, UnsupportedModel, WeightsError, clip
from mlx_vlm_pipes.quantization import QuantizationConfig
from mlx_vlm_pipes.weights.layout import Layout, group_names
from mlx_vlm_pipes.weights.packed import PackedEmbedding, PackedLinear

# mode -> (group sizes, bits), defaults first; source: the table in mx.quantize's documentation
MLX_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
_KNOWN_METHODS = "mlx, gptq, awq, fp8, fbgemm_fp8, compressed-tensors, modelopt (FP8, NVFP4)"


@dataclass(frozen=True)
class ScaledFormat:
    """Float or int8 weights with separate scales; expanded to plain arrays while loading.

    `format` is one of compressed-tensors-fp8, fbgemm-fp8, blockscaled-fp8, modelopt-fp8, nvfp4,
    mxfp4, int8; `block_size` (rows, columns) belongs to blockscaled-fp8.
    """

    quant_method: str
    format: str
    block_size: tuple[int, int] | None = None


def parse_quantization(config: Mapping[str, Any]) -> QuantizationConfig | ScaledFormat | None:
    """The quantisation a config.json declares; None if it declares none.

    Args: config, the whole file as a dict; a nested text_config is looked at last.
    Raises: UnsupportedModel naming a method or packing that is not read; ConfigError for
    settings that make no sense.
    Source: mlx-lm and mlx-vlm utils.py, transformers quantization_config.py.
    """
    declared = config.get("quantization") or config.get("quantization_config")
    if not declared and isinstance(config.get("text_config"), Mapping):
        declared = config["text_config"].get("quantization_config")
    if not declared:
        return None
    if not isinstance(declared, Mapping):
        raise ConfigError(f"quantization in config.json is '{clip(declared)}', not an object")
    method = str(declared.get("quant_method", "mlx"))
    parsers = {
        "mlx": _parse_mlx,
        "gptq": _parse_gptq,
        "awq": _parse_awq,
        "fp8": _parse_fp8,
        "fbgemm_fp8": lambda _: ScaledFormat("fbgemm_fp8", "fbgemm-fp8"),
        "compressed-tensors": _parse_compressed,
        "modelopt": _parse_modelopt,
    }
    if method not in parsers:
        raise UnsupportedModel(
            f"quant_method '{clip(method)}' is not read (known: {_KNOWN_METHODS}); use the"
            " unquantised model or a version from mlx-community"
        )
    return parsers[method](declared)


def _parse_mlx(declared: Mapping[str, Any]) -> QuantizationConfig:
    """`{"group_size": 64, "bits": 4, "mode": ..., "<module>": {...} or bool, ...}`."""
    settings = {k: declared[k] for k in ("group_size", "bits", "mode") if k in declared}
    overrides: dict[str, dict[str, int | str] | bool] = {}
    for key, value in declared.items():
        if key in ("group_size", "bits", "mode", "quant_method"):
            continue
        if isinstance(value, Mapping):
            overrides[key] = dict(
                zip(("group_size", "bits", "mode"), _mlx_triple(value), strict=True)
            )
        elif isinstance(value, bool):
            overrides[key] = value
        else:
            raise ConfigError(
                f"quantization entry '{clip(key)}': '{clip(value)}' is not understood"
            )
    group_size, bits, mode = _mlx_triple(settings)
    return QuantizationConfig("mlx", bits, group_size, mode=mode, overrides=overrides)


def _mlx_triple(settings: Mapping[str, Any]) -> tuple[int, int, str]:
    """(group_size, bits, mode), with the mode's defaults; checked against what MLX has."""
    mode = str(settings.get("mode") or "affine")
    if mode not in MLX_MODES:
        raise ConfigError(f"quantization mode '{clip(mode)}'; MLX has {', '.join(MLX_MODES)}")
    group_sizes, bit_widths = MLX_MODES[mode]
    group_size = settings.get("group_size") or group_sizes[0]
    bits = settings.get("bits") or bit_widths[0]
    if group_size not in group_sizes or bits not in bit_widths:
        raise ConfigError(
            f"quantization of {clip(bits)} bits in groups of {clip(group_size)}; mode {mode} has"
            f" bits {sorted(bit_widths)} and group sizes {sorted(group_sizes)}"
        )
    return int(group_size), int(bits), mode


def _parse_gptq(declared: Mapping[str, Any]) -> QuantizationConfig:
    """`mode` keeps the checkpoint format: gptq (stored zeros one too small) or gptq_v2."""
    bits = _integer(declared, "bits", (2, 3, 4, 8))
    checkpoint_format = declared.get("checkpoint_format") or "gptq"
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise UnsupportedModel(
            f"GPTQ checkpoint_format '{clip(checkpoint_format)}' is not read; use gptq or gptq_v2"
        )
    return QuantizationConfig(
        "gptq",
        bits,
        _integer(declared, "group_size", None),
        desc_act=bool(declared.get("desc_act", False)),
        sym=bool(declared.get("sym", True)),
        mode=checkpoint_format,
    )


def _parse_awq(declared: Mapping[str, Any]) -> QuantizationConfig:
    version = str(declared.get("version") or "gemm").lower()
    if version != "gemm":
        raise UnsupportedModel(f"AWQ packing '{clip(version)}' is not read; only gemm is")
    bits = _integer({"bits": declared.get("bits", declared.get("w_bit"))}, "bits", (4,))
    group = declared.get("group_size", declared.get("q_group_size"))
    group_size = _integer({"group_size": group}, "group_size", None)
    sym = not declared.get("zero_point", True)
    return QuantizationConfig("awq", bits, group_size, sym=sym, mode=version)


def _integer(declared: Mapping[str, Any], key: str, allowed: tuple[int, ...] | None) -> int:
    """An integer setting; group sizes may be any positive number, or -1 for the whole row."""
    value = declared.get(key)
    if type(value) is not int or (value not in allowed if allowed else value < 1 and value != -1):
        expected = f"one of {allowed}" if allowed else "a positive integer or -1"
        raise ConfigError(f"quantization_config.{key} is '{clip(value)}'; expected {expected}")
    return value


def _parse_fp8(declared: Mapping[str, Any]) -> ScaledFormat:
    block = declared.get("weight_block_size")
    if block is None:
        return ScaledFormat("fp8", "compressed-tensors-fp8")
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int for b in block)):
        raise ConfigError(f"weight_block_size is '{clip(block)}'; expected [rows, columns]")
    if min(block) < 1:
        raise ConfigError(f"weight_block_size is {block}; expected positive sizes")
    return ScaledFormat("fp8", "blockscaled-fp8", (block[0], block[1]))


def _parse_compressed(declared: Mapping[str, Any]) -> QuantizationConfig | ScaledFormat:
    """compressed-tensors: one scheme for all quantised modules.

    Source: compressed_tensors/quantization/quant_config.py and quant_args.py.
    """
    groups = declared.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError("compressed-tensors without config_groups; expected one group")
    schemes = [g.get("weights") if isinstance(g, Mapping) else None for g in groups.values()]
    if not isinstance(schemes[0], Mapping) or any(scheme != schemes[0] for scheme in schemes):
        raise UnsupportedModel("compressed-tensors with several weight schemes is not read")
    packing, weights = declared.get("format"), schemes[0]
    if packing == "pack-quantized" and weights.get("type", "int") == "int":
        bits = _integer(weights, "num_bits", (4, 8))
        group = _integer({"group_size": weights.get("group_size") or -1}, "group_size", None)
        sym = bool(weights.get("symmetric", True))
        return QuantizationConfig("compressed-tensors", bits, group, sym=sym, mode="pack-quantized")
    known = {
        ("float-quantized", "float", 8): "compressed-tensors-fp8",
        ("naive-quantized", "float", 8): "compressed-tensors-fp8",
        ("int-quantized", "int", 8): "int8",
        ("naive-quantized", "int", 8): "int8",
        ("nvfp4-pack-quantized", "float", 4): "nvfp4",
        ("mxfp4-pack-quantized", "float", 4): "mxfp4",
    }
    key = (str(packing), str(weights.get("type", "int")), _integer(weights, "num_bits", (4, 8)))
    if key not in known:
        raise UnsupportedModel(f"compressed-tensors format {clip(key)} is not read")
    if weights.get("strategy") == "block":
        block = _parse_fp8({"weight_block_size": weights.get("block_structure")}).block_size
        return ScaledFormat("compressed-tensors", "blockscaled-fp8", block)
    return ScaledFormat("compressed-tensors", known[key])


def _parse_modelopt(declared: Mapping[str, Any]) -> ScaledFormat:
    formats = {"FP8": "modelopt-fp8", "NVFP4": "nvfp4"}
    algorithm = str(declared.get("quant_algo"))
    if algorithm not in formats:
        raise UnsupportedModel(f"modelopt quant_algo '{clip(algorithm)}' is not read")
    return ScaledFormat("modelopt", formats[algorithm])


def canonical_overrides(quantization: QuantizationConfig, layout: Layout) -> QuantizationConfig:
    """The same settings with per-module entries under canonical module paths.

    Entries are in the checkpoint's own names, with or without a leading `language_model.`; one
    that names no known part is kept as it is and matches nothing.
    """
    overrides: dict[str, dict[str, int | str] | bool] = {}
    for key, value in quantization.overrides.items():
        renamed = layout.rename(f"{key}.weight") or layout.rename(f"language_model.{key}.weight")
        overrides[renamed[0].removesuffix(".weight") if renamed else key] = value
    return replace(quantization, overrides=overrides)


def settings_for(path: str, quantization: QuantizationConfig) -> tuple[int, int, str] | None:
    """(group_size, bits, mode) of a canonical module path; None where it is set to False."""
    for key in (path, path.removeprefix("language_model.")):
        override = quantization.overrides.get(key, True)
        if override is False:
            return None
        if isinstance(override, dict):
            return _mlx_triple(override)
    return quantization.group_size, quantization.bits, quantization.mode


def quantize_modules(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    quantization: QuantizationConfig,
    *,
    prefix: str = "",
) -> None:
    """Turn exactly those linears and embeddings that have `<path>.scales` into packed ones.

    Args: shapes, names within `module` -> shapes of the checkpoint's tensors; quantization,
    with canonical overrides; prefix, what to put before a path to make it canonical.
    The new parameters are lazy: nothing is quantised, install_weights replaces them.
    Raises: WeightsError, one line, if shapes contradict the settings.
    """
    problems: list[str] = []

    def packed(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, (nn.Linear, nn.Embedding)) or f"{path}.scales" not in shapes:
            return leaf
        settings = settings_for(prefix + path, quantization)
        weight, scales = shapes.get(f"{path}.weight", ()), shapes[f"{path}.scales"]
        problem = _shape_problem(tuple(leaf.weight.shape), weight, scales, settings)
        if problem or settings is None:
            problems.append(f"'{clip(path)}' {problem}")
            return leaf
        return _packed_twin(leaf, *settings)

    leaves = tree_map_with_path(packed, module.leaf_modules(), is_leaf=nn.Module.is_module)
    if problems:
        raise WeightsError(
            f"{len(problems)} packed tensors do not fit config.json: {group_names(problems, 3)}"
        )
    module.update_modules(leaves)


def _shape_problem(
    plain: tuple[int, ...],
    weight: tuple[int, ...],
    scales: tuple[int, ...],
    settings: tuple[int, int, str] | None,
) -> str:
    """Why packed shapes do not fit a [rows, columns] module so quantised; or ""."""
    if settings is None:
        return "has scales but its quantization entry is false"
    rows, columns = plain
    group_size, bits, mode = settings
    if weight == (rows, columns * bits // 32) and scales == (rows, columns // group_size):
        return ""
    said = f"{bits} bits in groups of {group_size} ({mode})"
    if len(weight) == len(scales) == 2 and weight[1] and scales[1]:
        found = f"{weight[1] * 32 / columns:g} bits in groups of {columns / scales[1]:g}"
        return f"has the shapes of {found}, {list(weight)}; config.json says {said}"
    return f"is {list(weight)} with scales {list(scales)}; config.json says {said}"


def _packed_twin(
    leaf: nn.Linear | nn.Embedding, group_size: int, bits: int, mode: str
) -> PackedLinear | PackedEmbedding:
    rows, columns = leaf.weight.shape
    if isinstance(leaf, nn.Embedding):
        return PackedEmbedding(rows, columns, group_size, bits, mode)
    return PackedLinear(columns, rows, "bias" in leaf, group_size, bits, mode)
