"""The checkpoint that is converted: its configuration, and its tensors by module, unread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.checkpoint.canonical import canonical, unpack
from mlx_vlm_pipes.checkpoint.modules import require_fit
from mlx_vlm_pipes.checkpoint.state import LANGUAGE
from mlx_vlm_pipes.checkpoint.tie import EMBEDDING, HEAD, settle_head, tied_by_names
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.hf_config import read_config, text_config
from mlx_vlm_pipes.loading import LoadOptions, model_config_for
from mlx_vlm_pipes.quantization import QuantizationConfig
from mlx_vlm_pipes.registry import Room, find_room
from mlx_vlm_pipes.weights import (
    ConvToChannelsLast,
    ConvToMatrix,
    Layout,
    WeightData,
    drop_dummy_biases,
    find_weight_files,
    load_weights,
)
from mlx_vlm_pipes.weights.layout import MLXForm, Transform
from mlx_vlm_pipes.weights.lora import LoRAAdapter, check_against_base, read_adapter
from mlx_vlm_pipes.weights.quantized import settings_for

EMBEDDING_PATH, HEAD_PATH = LANGUAGE + EMBEDDING, LANGUAGE + HEAD


@dataclass
class Source:
    """A checkpoint under canonical names, convolutions channels last.

    modules: module path -> {"weight": ..., "bias": ...}; a tensor that is no module's has the
    part "". `packed`, with canonical overrides, says how the modules with scales are packed.
    """

    folder: Path
    room: Room
    values: dict[str, Any]
    modules: dict[str, dict[str, WeightData]]
    packed: QuantizationConfig | None
    layout: Layout
    form: MLXForm
    layouts: Sequence[Layout]
    changes: Sequence[Transform]
    tied: bool

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        names = {
            path.split(".")[2] for path in self.modules if path.startswith(LANGUAGE + "layers.")
        }
        return len(names)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for parts in self.modules.values() for part in parts.values())

    def read_adapter(self, folder: str | Path) -> LoRAAdapter:
        """Raises: WeightsError for an adapter of another model."""
        adapter = read_adapter(folder, Path(folder).name, self.layouts)
        check_against_base(adapter, self.linear_shapes())
        return adapter

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of every matrix, by canonical module path."""
        shapes = {}
        for path, parts in self.modules.items():
            shape = parts["weight"].shape if "weight" in parts else ()
            if len(shape) == 2:
                settings = packing_of(self, path)
                columns = shape[1] * 32 // settings[1] if settings else shape[1]
                shapes[path] = (shape[0], columns)
        return shapes


def packing_of(source: Source, path: str) -> tuple[int, int, str] | None:
    """(group size, bits, mode) of a module that is packed, else None."""
    if source.packed is None or "scales" not in source.modules[path]:
        return None
    return settings_for(path, source.packed)


def open_source(folder: Path) -> Source:
    """Read headers and configuration, and check that the one fits the other; reads no tensor.

    Raises: CheckpointError as `load` does. A head that repeats the embedding is dropped.
    """
    config = read_config(folder)
    room = find_room(config)
    weights = load_weights(find_weight_files(folder))
    pipeline = PipelineConfig(model=model_config_for(folder, config, weights, LoadOptions()))
    _, changes = room.model_class().read_config(pipeline)
    adapters = room.weight_adapters()
    unpacked = unpack(weights, config)
    as_loaded = canonical(unpacked, adapters.LAYOUTS, changes)
    expected = require_fit(room.model_class(), pipeline, as_loaded)
    state = canonical(unpacked, adapters.LAYOUTS, _kept(changes))
    state.keep(drop_dummy_biases(state, expected))
    declared = tied_by_names(config, text_config(config), state, f"{HEAD_PATH}.weight")
    tied = settle_head(state, tied=declared, prefix=LANGUAGE)
    form, layout = adapters.MLX_FORM, state.layout
    assert layout is not None
    return Source(
        folder, room, config.to_dict(), by_module(state), as_loaded.quantization,
        form.layout_like(layout, adapters.LAYOUTS), form, adapters.LAYOUTS, changes, tied,
    )  # fmt: skip


def _kept(changes: Sequence[Transform]) -> list[Transform]:
    """The changes that a written checkpoint needs: convolutions stay so, with channels last."""
    convolutions = [change for change in changes if isinstance(change, ConvToMatrix)]
    return [ConvToChannelsLast(conv.name, conv.channels, conv.kernel) for conv in convolutions]


def by_module(state: Mapping[str, WeightData]) -> dict[str, dict[str, WeightData]]:
    """Canonical names cut at the last dot: module -> part -> tensor, in the order of the files."""
    modules: dict[str, dict[str, WeightData]] = {}
    for name, weight in state.items():
        module, _, part = name.rpartition(".")
        is_part = part in ("weight", "bias", "scales", "biases")
        path, key = (module, part) if is_part else (name, "")
        modules.setdefault(path, {})[key] = weight
    return modules
