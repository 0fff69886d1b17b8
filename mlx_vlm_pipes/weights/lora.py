"""LoRA and DoRA adapters as mlx-lm, mlx-vlm and PEFT save them, under our module names.

Whatever the format, a pair means y = W x + scale * B (A x) with A [r, in] and B [out, r]; with a
magnitude m [out] (DoRA) the row o of the sum is scaled to length m[o].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.errors import (
    CheckpointNotFound,
    ConfigError,
    UnsupportedModel,
    WeightsError,
    clip,
)
from mlx_vlm_pipes.json_files import read_json
from mlx_vlm_pipes.paths import is_there
from mlx_vlm_pipes.weights.checkpoint import SafetensorWeights, WeightData, load_state_dict
from mlx_vlm_pipes.weights.layout import Layout, detect_layout, group_names, map_names

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 10_000_000

# the last parts of a tensor's name: (A, B, magnitude)
_MLX_PARTS = ("lora_a", "lora_b", "m")
_LEGACY_PARTS = ("A", "B", "")  # mlx-vlm before it followed mlx-lm
_PEFT_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_PEFT_ROOT = "base_model.model."

# PEFT options that change the numbers and are not computed here -> the values that switch them off
_PEFT_REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True, eq=False)
class LoRAPair:
    """One adapted linear: a [r, in], b [out, r], magnitude [out] or None; scale already divided."""

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class LoRAAdapter:
    """An adapter: canonical module path -> pair; `rank` is the largest of its pairs."""

    name: str
    rank: int
    layers: dict[str, LoRAPair]

    def below(self, prefix: str) -> LoRAAdapter:
        """The same adapter with the pairs below a prefix only, their paths unchanged."""
        kept = {path: pair for path, pair in self.layers.items() if path.startswith(prefix)}
        return replace(self, layers=kept)

    def without(self, prefix: str) -> LoRAAdapter:
        """The same adapter with the other pairs only."""
        kept = {path: pair for path, pair in self.layers.items() if not path.startswith(prefix)}
        return replace(self, layers=kept)


def split_lora_path(entry: str) -> tuple[str, Path]:
    """`name=path` or `path` (named after its folder) -> (name, path)."""
    match = re.fullmatch(r"([\w.-]+)=(.+)", entry)
    return (match[1], Path(match[2])) if match else (Path(entry).name, Path(entry))


def read_adapter(
    folder: str | Path,
    name: str,
    layouts: Sequence[Layout],
    max_rank: int | None = None,
) -> LoRAAdapter:
    """Read an adapter folder, its tensors unevaluated.

    Args: layouts of the architecture; the adapter's may differ from the base model's, since PEFT
    uses the names of whichever transformers release trained it.
    Raises: CheckpointNotFound, ConfigError, UnsupportedModel (full fine-tunes, PEFT options
    that are not computed here), WeightsError (unknown names, wrong shapes or ranks).
    Source: mlx_lm/tuner/lora.py and dora.py, peft/tuners/lora/.
    """
    folder = Path(folder)
    config = _read_config(folder)
    read = _read_peft if "peft_type" in config else _read_mlx
    pairs = read(folder, config)
    if not pairs:
        raise WeightsError(f"{folder}: no LoRA tensors")
    _check_pairs(folder, pairs, max_rank)
    try:
        renamed = _canonical(pairs, layouts)
    except WeightsError:
        raise WeightsError(
            f"{folder}: an adapter of another model; it adapts {group_names(pairs, 3)}"
        ) from None
    return LoRAAdapter(name, max(pair.rank for pair in renamed.values()), renamed)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (is_there(folder, CheckpointNotFound) and folder.is_dir()):
        raise CheckpointNotFound(f"{folder}: no such adapter folder")
    path = folder / CONFIG_NAME
    values = read_json(path, ConfigError, unique=True, max_bytes=MAX_CONFIG_BYTES)
    if values is None:
        raise ConfigError(f"{folder}: no {CONFIG_NAME}; an adapter folder needs one")
    return values


def _read_tensors(folder: Path, names: Sequence[str]) -> dict[str, WeightData]:
    """The tensors of the first of these files that exists."""
    for name in names:
        if (folder / name).is_file():
            return load_state_dict(SafetensorWeights([folder / name]))
    raise WeightsError(f"{folder}: no {' or '.join(names)}")


def _collect(
    state: Mapping[str, WeightData], parts: tuple[str, str, str]
) -> dict[str, dict[str, mx.array]]:
    """Module path -> {"A": ..., "B": ..., "m": ...}, as stored.

    Raises: WeightsError for a tensor that is no part of an adapter.
    """
    found: dict[str, dict[str, mx.array]] = {}
    unknown = []
    for name, weight in state.items():
        for part, key in zip(parts, ("A", "B", "m"), strict=True):
            if part and name.endswith("." + part):
                found.setdefault(name.removesuffix("." + part), {})[key] = weight.data
                break
        else:
            unknown.append(name)
    if unknown:
        raise WeightsError(f"{len(unknown)} tensors are no LoRA pairs: {group_names(unknown)}")
    halves = [module for module, tensors in found.items() if not {"A", "B"} <= tensors.keys()]
    if halves:
        raise WeightsError(f"{len(halves)} LoRA pairs lack a half: {group_names(halves)}")
    return found


def _read_mlx(folder: Path, config: Mapping[str, Any]) -> dict[str, LoRAPair]:
    """lora_a [in, r], lora_b [r, out], m [out]; the scale multiplies as it stands."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedModel(f"{folder}: fine_tune_type '{clip(kind)}' is not an adapter")
    parts, options = _MLX_PARTS, config.get("lora_parameters")
    if options is None and {"rank", "alpha"} <= config.keys():
        rank, alpha = _number(config, "rank", folder), _number(config, "alpha", folder)
        parts, options = _LEGACY_PARTS, {"rank": rank, "scale": alpha / max(rank, 1)}
    if not isinstance(options, Mapping):
        raise ConfigError(f"{folder}: {CONFIG_NAME} has neither lora_parameters nor peft_type")
    rank, scale = _number(options, "rank", folder), _number(options, "scale", folder)
    tensors = _collect(_read_tensors(folder, ("adapters.safetensors",)), parts)
    pairs = {
        module: LoRAPair(_flip(found["A"]), _flip(found["B"]), scale, found.get("m"))
        for module, found in tensors.items()
    }
    wrong = [module for module, pair in pairs.items() if pair.a.ndim == 2 and pair.rank != rank]
    if wrong:
        raise WeightsError(
            f"{folder}: {len(wrong)} pairs are not of the declared rank {rank:g},"
            f" {group_names(wrong, 3)}"
        )
    return pairs


def _flip(array: mx.array) -> mx.array:
    return array.T if array.ndim == 2 else array


def _number(options: Mapping[str, Any], key: str, folder: Path) -> float:
    value = options.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{folder}: {CONFIG_NAME} {key} is '{clip(value)}', expected a number")
    return value


def _read_peft(folder: Path, config: Mapping[str, Any]) -> dict[str, LoRAPair]:
    """lora_A.weight [r, in], lora_B.weight [out, r], scaled by alpha / r (rslora: / sqrt(r))."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(f"{folder}: peft_type '{clip(config.get('peft_type'))}' is not LORA")
    for key, neutral in _PEFT_REFUSED.items():
        if key in config and config[key] not in neutral:
            raise UnsupportedModel(f"{folder}: PEFT option {key}={clip(config[key])} is not read")
    rank, alpha = _number(config, "r", folder), _number(config, "lora_alpha", folder)
    ranks = {rank, *_pattern(config, "rank_pattern", folder).values()}
    alphas = _pattern(config, "alpha_pattern", folder)
    tensors = _collect(_read_tensors(folder, ("adapter_model.safetensors",)), _PEFT_PARTS)
    pairs = {}
    for stored, found in tensors.items():
        module = stored.removeprefix(_PEFT_ROOT)
        pair_rank = found["A"].shape[0] if found["A"].ndim else 0
        if pair_rank not in ranks or pair_rank == 0:
            raise WeightsError(
                f"{folder}: '{clip(module)}' is of rank {pair_rank}, declared {sorted(ranks)}"
            )
        divisor = math.sqrt(pair_rank) if config.get("use_rslora") else pair_rank
        scale = _matching(alphas, module, alpha) / divisor
        pairs[module] = LoRAPair(found["A"], found["B"], scale, found.get("m"))
    return pairs


def _pattern(config: Mapping[str, Any], key: str, folder: Path) -> dict[str, float]:
    """rank_pattern or alpha_pattern: module path endings -> number.

    PEFT takes the keys as regular expressions; from an untrusted file only plain paths are.
    """
    declared = config.get(key) or {}
    if not isinstance(declared, Mapping):
        raise ConfigError(f"{folder}: {CONFIG_NAME} {key} is not an object")
    for path in declared:
        if not re.fullmatch(r"[\w.]{1,300}", path):
            raise UnsupportedModel(
                f"{folder}: {key} '{clip(path)}' is a regular expression; only paths are read"
            )
    return {path: _number(declared, path, folder) for path in declared}


def _matching(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The number of the first path that is the whole of `module` or its last parts."""
    for path, number in pattern.items():
        if module == path or module.endswith("." + path):
            return number
    return default


def _check_pairs(folder: Path, pairs: Mapping[str, LoRAPair], max_rank: int | None) -> None:
    """Shapes must chain, and no rank may exceed max_rank."""
    for module, pair in pairs.items():
        shapes = f"A {list(pair.a.shape)}, B {list(pair.b.shape)}"
        chained = pair.a.ndim == pair.b.ndim == 2 and pair.b.shape[1] == pair.rank > 0
        if not chained:
            raise WeightsError(f"{folder}: '{clip(module)}' has {shapes}: no [r, in] and [out, r]")
        if pair.magnitude is not None and pair.magnitude.shape != (pair.b.shape[0],):
            raise WeightsError(
                f"{folder}: '{clip(module)}' has a magnitude of {list(pair.magnitude.shape)} for"
                f" {pair.b.shape[0]} outputs"
            )
        if max_rank is not None and pair.rank > max_rank:
            raise WeightsError(
                f"{folder}: rank {pair.rank} of '{clip(module)}' is above max_lora_rank {max_rank}"
            )


def _canonical(pairs: Mapping[str, LoRAPair], layouts: Sequence[Layout]) -> dict[str, LoRAPair]:
    """The same pairs under canonical module paths."""
    tensor_names = [f"{module}.weight" for module in pairs]
    renamed = map_names(tensor_names, detect_layout(tensor_names, layouts))
    return {
        target.removesuffix(".weight"): pairs[stored.removesuffix(".weight")]
        for stored, target in renamed.items()
    }


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path -> (outputs, inputs) of every linear, plain or packed; nothing is evaluated.

    To be taken before projections are fused: adapters name the parts.
    """
    shapes = {}
    for path, child in module.named_modules():
        if isinstance(child, nn.Linear):
            shapes[path] = (child.weight.shape[0], child.weight.shape[1])
        elif isinstance(child, nn.QuantizedLinear):
            shapes[path] = (child.weight.shape[0], child.weight.shape[1] * 32 // child.bits)
    return shapes


def check_against_base(adapter: LoRAAdapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise WeightsError if the adapter names linears that the base lacks, or of other sizes.

    Args: shapes as `linear_shapes` gives them, by canonical path.
    """
    unknown = [module for module in adapter.layers if module not in shapes]
    if unknown:
        raise WeightsError(
            f"adapter '{clip(adapter.name)}' adapts {len(unknown)} linears that the model lacks:"
            f" {group_names(unknown)}; it was trained on another model"
        )
    wrong = [
        f"{module} is {(pair.b.shape[0], pair.a.shape[1])}, the model's {shapes[module]}"
        for module, pair in adapter.layers.items()
        if (pair.b.shape[0], pair.a.shape[1]) != shapes[module]
    ]
    if wrong:
        raise WeightsError(
            f"adapter '{clip(adapter.name)}' does not fit {len(wrong)} linears:"
            f" {group_names(wrong, 3)}; it was trained on another model"
        )


def merge_into(weight: mx.array, pair: LoRAPair) -> mx.array:
    """The base weight [out, in] with the adapter applied, computed in float32, dtype kept.

    Source: mlx_lm LoRALinear.fuse and DoRALinear.fuse; peft DoraLinearLayer.
    """
    merged = weight.astype(mx.float32) + _delta(pair)
    if pair.magnitude is not None:
        merged = _row_factor(merged, pair.magnitude)[:, None] * merged
    return merged.astype(weight.dtype)


def dora_factor(weight: mx.array, pair: LoRAPair) -> mx.array | None:
    """[out] float32 that W x + scale B A x, before the bias, is multiplied by; None for LoRA."""
    if pair.magnitude is None:
        return None
    return _row_factor(weight.astype(mx.float32) + _delta(pair), pair.magnitude)


def _delta(pair: LoRAPair) -> mx.array:
    return pair.scale * (pair.b.astype(mx.float32) @ pair.a.astype(mx.float32))


def _row_factor(merged: mx.array, magnitude: mx.array) -> mx.array:
    return magnitude.astype(mx.float32) / mx.linalg.norm(merged, axis=1)
