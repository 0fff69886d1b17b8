"""From tensors as the files name and pack them to a canonical StateDict; hardly anything is read.

`load`, `convert` and `check` all go this way. What a checkpoint gets wrong is reported as it is
found: loading raises it at once, `check` collects it (weights.layout.Report).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_vlm_pipes.checkpoint.state import LANGUAGE, ScaledTensors, StateDict, config_dict
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError, clip
from mlx_vlm_pipes.quantization import LoRAConfig, QuantizationConfig
from mlx_vlm_pipes.weights import (
    Layout,
    LoRAAdapter,
    ScaledFormat,
    TensorHandle,
    WeightData,
    Weights,
    WeightsAdapter,
    adapt,
    canonical_overrides,
    cast_floats,
    detect_layout,
    load_state_dict,
    parse_quantization,
    read_adapter,
    split_lora_path,
    unpack_checkpoint,
)
from mlx_vlm_pipes.weights.layout import Report, Transform, group_names, raise_at_once


@dataclass(frozen=True)
class Unpacked:
    """Tensors under the files' own names, brought to plain floats or MLX's own packing.

    quantization: MLX settings that are left to apply; scaled: what was expanded (`format` None:
    nothing); file_format: what the files say they are, "pt" or "mlx".
    """

    tensors: Mapping[str, WeightData]
    quantization: QuantizationConfig | None
    scaled: ScaledTensors | None
    file_format: str | None


def unpack(
    weights: Weights | Mapping[str, Any], config: Any, dtype: DType | None = None
) -> Unpacked:
    """The tensors of a checkpoint, unpacked lazily as config.json (an object) says.

    dtype: of what is expanded, None for the format's own.
    Raises: CheckpointError for packing that is not read, or that the tensors do not have.
    """
    declared = parse_quantization(config_dict(config))
    stored = load_state_dict(weights)
    scaled = None
    if isinstance(declared, ScaledFormat):
        scaled = ScaledTensors(declared, {name: _outline(w) for name, w in stored.items()})
    tensors, packed = unpack_checkpoint(stored, declared, dtype)
    said = weights.metadata.get("format") if isinstance(weights, Weights) else None
    return Unpacked(tensors, packed, scaled, said)


def canonical(
    unpacked: Unpacked,
    layouts: Sequence[Layout],
    transforms: Sequence[Transform] = (),
    report: Report = raise_at_once,
) -> StateDict:
    """The tensors under our names and in our shapes, by the layout that knows most of them.

    Raises: WeightsError if no layout knows any name; the rest goes to `report`.
    """
    layout = detect_layout(unpacked.tensors, layouts)
    tensors = adapt(
        unpacked.tensors, layout, transforms, file_format=unpacked.file_format, report=report
    )
    packed = unpacked.quantization
    return StateDict(
        tensors,
        None if packed is None else canonical_overrides(packed, layout),
        scaled=_renamed(unpacked.scaled, layout),
        layout=layout,
    )


def canonical_state(
    weights: Weights | Mapping[str, Any],
    adapter: WeightsAdapter | None,
    layouts: Sequence[Layout],
    pipeline_config: PipelineConfig,
    transforms: Sequence[Transform] = (),
    report: Report = raise_at_once,
) -> StateDict:
    """A checkpoint's tensors under our names, in the dtype asked for, with the LoRA adapters.

    adapter replaces the room's own layouts. Raises: CheckpointError for what cannot be unpacked,
    and for LoRA adapters that do not fit; names that nobody knows go to `report`.
    """
    model = pipeline_config.model
    wanted = model.compute_dtype
    unpacked = unpack(weights, model.huggingface_config, wanted)
    if adapter is None:
        state = canonical(unpacked, layouts, transforms, report)
    else:
        tensors = adapter(
            {name: TensorHandle(weight) for name, weight in unpacked.tensors.items()},
            huggingface_config=model.huggingface_config,
            pipeline_config=pipeline_config,
        )
        state = StateDict(tensors, unpacked.quantization, scaled=unpacked.scaled)
    if wanted is not None:
        state.update(cast_floats(state, wanted))
    state.loras = read_loras(pipeline_config.lora, layouts)
    return state


def read_loras(lora: LoRAConfig | None, layouts: Sequence[Layout]) -> list[LoRAAdapter]:
    """The adapters that a configuration names. Raises: ConfigError for too many of them."""
    if lora is None or not lora.enable_lora:
        return []
    if len(lora.lora_paths) > lora.max_num_loras:
        raise ConfigError(
            f"{len(lora.lora_paths)} adapters, max_num_loras is {lora.max_num_loras}; raise it"
        )
    named = [split_lora_path(entry) for entry in lora.lora_paths]
    return [read_adapter(folder, name, layouts, lora.max_lora_rank) for name, folder in named]


def tower_adapter(loras: Sequence[LoRAAdapter]) -> str:
    """The adapter that changes more than the decoder, to be merged there; "" for none.

    Raises: ConfigError where others are loaded beside it, which would run over its tower.
    """
    for lora in loras:
        outside = lora.without(LANGUAGE).layers
        if outside and len(loras) > 1:
            raise ConfigError(
                f"adapter '{clip(lora.name)}' changes {len(outside)} linears of the vision tower or"
                f" connector ({group_names(outside, 1)}), which all requests share: load it alone,"
                " or merge it into a model of its own (convert --lora)"
            )
        if outside:
            return lora.name
    return ""


def _outline(weight: WeightData) -> WeightData:
    """The same name, shape and dtype without a hold on the data."""
    return WeightData(mx.zeros((0,)), weight.name, weight.dtype, weight.shape)


def _renamed(scaled: ScaledTensors | None, layout: Layout) -> ScaledTensors | None:
    if scaled is None:
        return None
    found = ((layout.rename(name), weight) for name, weight in scaled.stored.items())
    return ScaledTensors(scaled.format, {new[0]: weight for new, weight in found if new})
