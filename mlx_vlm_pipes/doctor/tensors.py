"""The tensors that the headers list against those that the model wants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_vlm_pipes.architectures.registry import Room
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.doctor.report import Checkup, Part
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import PipesError, WeightsError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig, text_config, tie_flag
from mlx_vlm_pipes.loading import LoadOptions, model_config_for
from mlx_vlm_pipes.nn.expected import expected_shapes
from mlx_vlm_pipes.nn.loading import LANGUAGE, VISION, StateDict
from mlx_vlm_pipes.quantization import QuantizationConfig
from mlx_vlm_pipes.weights import (
    Layout,
    TensorInfo,
    WeightData,
    canonical_overrides,
    detect_layout,
    find_weight_files,
    parse_quantization,
    read_header,
    unpack_checkpoint,
)
from mlx_vlm_pipes.weights.checkpoint import Weights
from mlx_vlm_pipes.weights.install import describe_mismatch
from mlx_vlm_pipes.weights.layout import Transform, group_names
from mlx_vlm_pipes.weights.quantized import settings_for
from mlx_vlm_pipes.weights.safetensors import INDEX_NAME, clip, read_index

_UNLOADABLE = (DType.float64, DType.float8_e5m2)
_GROUP_INDEX = (".g_idx", ".weight_g_idx")  # the one tensor that repacking looks into
_CAUSE = "likely cause: "


@dataclass(frozen=True)
class Tensors:
    """What is known of a checkpoint's tensors: headers, canonical state, documented config."""

    pipeline: PipelineConfig
    state: StateDict
    nbytes: int


class HeaderWeights(Weights):
    """Headers as the `Weights` that models read names, dtypes and shapes from; no data."""

    def __init__(self, infos: dict[str, TensorInfo], name: str = "") -> None:
        self._infos, self._name = infos, name

    @property
    def name(self) -> str:
        return self._name

    @property
    def metadata(self) -> dict[str, str]:
        return {}

    def items(self) -> Iterable[tuple[str, Weights]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [(name, HeaderWeights(self._infos, name)) for name in self._infos]

    def exists(self) -> bool:
        return self._name in self._infos

    def data(self) -> WeightData:
        return stand_in(self._infos[self._name])

    def child(self, key: str) -> Weights:
        return HeaderWeights(self._infos, f"{self._name}.{key}" if self._name else key)


def stand_in(info: TensorInfo) -> WeightData:
    """A tensor of the right shape and dtype that is never evaluated."""
    fp8 = info.dtype in (DType.float8_e4m3fn, DType.float8_e5m2)
    kind = mx.uint8 if fp8 else mx.float32 if info.dtype is DType.float64 else info.dtype.to_mx()
    return WeightData(mx.zeros(info.shape, kind), info.name, info.dtype, info.shape)


def read_headers(folder: Path, checkup: Checkup) -> dict[str, TensorInfo]:
    """All tensors that the files list, by name; damage becomes findings."""
    files: Sequence[Path] = ()
    with checkup.collecting("weights"):
        files = find_weight_files(folder)
    infos: dict[str, TensorInfo] = {}
    for file in files:
        with checkup.collecting("weights"):
            for name, info in read_header(file).tensors.items():
                if name in infos:
                    other = infos[name].path.name
                    checkup.error("weights", f"'{clip(name)}' is in {other} and in {file.name}")
                infos[name] = info
    unloadable = [name for name, info in infos.items() if info.dtype in _UNLOADABLE]
    if unloadable:
        kind = infos[unloadable[0]].dtype.name
        checkup.error("weights", f"MLX cannot load {kind}: {group_names(unloadable, 3)}")
    _compare_index(folder, infos, checkup)
    for info in infos.values():
        checkup.dtypes[info.dtype.name] = (
            checkup.dtypes.get(info.dtype.name, 0) + info.end - info.start
        )
    return infos


def _compare_index(folder: Path, infos: dict[str, TensorInfo], checkup: Checkup) -> None:
    path = folder / INDEX_NAME
    if not path.is_file():
        return
    try:
        listed = read_index(path)
    except WeightsError:
        return  # found already
    absent = [n for n, f in listed.items() if n not in infos or infos[n].path.name != f]
    if absent and infos:
        checkup.error("index", f"lists tensors that its files do not have: {group_names(absent)}")
    extra = [name for name in infos if name not in listed]
    if extra:
        checkup.warn("index", f"does not list tensors of its files: {group_names(extra)}")


def examine_tensors(
    room: Room,
    folder: Path,
    config: HuggingFaceConfig,
    infos: dict[str, TensorInfo],
    checkup: Checkup,
) -> Tensors | None:
    """Layout, quantisation, sizes by part, and what is missing, unexpected or mis-shaped.

    Raises: PipesError for what keeps the comparison from being made.
    """
    if not infos:
        return None
    weights = HeaderWeights(infos)
    pipeline = PipelineConfig(model=model_config_for(folder, config, weights, LoadOptions()))
    _, changes = room.model_class().read_config(pipeline)
    declared = parse_quantization(config.to_dict())
    raw = {n: stand_in(i) for n, i in infos.items() if not n.endswith(_GROUP_INDEX)}
    raw, packed = unpack_checkpoint(raw, declared)
    layout = detect_layout(raw, room.weight_adapters().LAYOUTS)
    checkup.layout = layout.name
    checkup.quantization = describe_quantization(declared, packed)
    state = StateDict(_renamed(raw, layout, changes, checkup), None)
    state.quantization = canonical_overrides(packed, layout, changes) if packed else None
    if declared is not None and not any(
        ".scale" in name or "weight_scale" in name for name in infos
    ):
        checkup.warn("quantization", "config.json declares it, but no tensor is packed")
    _sum_up(state, infos, layout, room.facts().connectors, checkup)
    _look_at_head(state, config, checkup)
    _compare(room, pipeline, state, checkup)
    return Tensors(pipeline, state, sum(i.end - i.start for i in infos.values()))


def _renamed(
    raw: dict[str, WeightData], layout: Layout, changes: Sequence[Transform], checkup: Checkup
) -> dict[str, WeightData]:
    """Canonical state; names nobody knows and shapes that no transform takes become findings."""
    state: dict[str, WeightData] = {}
    unknown: list[str] = []
    for name, weight in raw.items():
        if layout.ignores(name):
            continue
        renamed = layout.rename(name)
        if renamed is None:
            unknown.append(name)
            continue
        weight.name = renamed[0]
        if weight.name in state:
            checkup.error("weights", f"two tensors are both '{clip(weight.name)}'; mixed layouts?")
        state.update((new.name, new) for new in _changed(weight, changes, checkup))
    if unknown:
        checkup.error("unexpected", f"{len(unknown)} unknown tensors: {group_names(unknown)}")
    return state


def _changed(
    weight: WeightData, changes: Sequence[Transform], checkup: Checkup
) -> list[WeightData]:
    for change in changes:
        try:
            made = change.apply(weight, None)
        except WeightsError as error:
            checkup.error("mis-shaped", error)
            continue
        if made is not None:
            return made
    return [weight]


def describe_quantization(declared: object, packed: QuantizationConfig | None) -> str | None:
    """In words, what the files are packed as."""
    if declared is None:
        return None
    method = getattr(declared, "quant_method", "")
    if packed is None:
        return f"{method} ({getattr(declared, 'format', 'expanded')}), expanded to floats at load"
    text = f"{packed.bits} bits, groups of {packed.group_size}, {packed.mode}"
    if packed.overrides:
        text += f", {len(packed.overrides)} modules otherwise"
    return text if method == "mlx" else f"{text} (repacked from {method} at load)"


def _sum_up(
    state: StateDict,
    infos: dict[str, TensorInfo],
    layout: Layout,
    connectors: tuple[str, ...],
    checkup: Checkup,
) -> None:
    """Parameters and bytes of text, vision and connector."""
    elements: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name, weight in state.items():
        where = part_of(name, connectors)
        elements[where] = elements.get(where, 0) + _elements(name, weight, state)
    for name, info in infos.items():
        renamed = None if layout.ignores(name) else layout.rename(name)
        if renamed is not None:
            where = part_of(renamed[0], connectors)
            sizes[where] = sizes.get(where, 0) + info.end - info.start
    for where in ("text", "vision", "connector"):
        if where in elements:
            checkup.parts[where] = Part(elements[where], sizes.get(where, 0))


def part_of(name: str, connectors: tuple[str, ...]) -> str:
    """text, vision or connector, by canonical name; connectors: as in RoomFacts."""
    if name.startswith(LANGUAGE):
        return "text"
    return "connector" if name.removeprefix(VISION).startswith(connectors) else "vision"


def _elements(name: str, weight: WeightData, state: StateDict) -> int:
    """Parameters that a tensor stands for; scales and biases of packed weights are none."""
    module, _, part = name.rpartition(".")
    is_packed = f"{module}.scales" in state and state.quantization is not None
    if is_packed and part in ("scales", "biases"):
        return 0
    if is_packed and part == "weight" and state.quantization is not None:
        settings = settings_for(module, state.quantization)
        return math.prod(weight.shape) * 32 // settings[1] if settings else 0
    return math.prod(weight.shape)


def _look_at_head(state: StateDict, config: HuggingFaceConfig, checkup: Checkup) -> None:
    """Whether head and embedding are tied, separate, or stored twice."""
    declared = tie_flag(config, text_config(config))
    head = state.get(LANGUAGE + "lm_head.weight")
    if head is None:
        checkup.embeddings = "tied"
        if declared is False:
            checkup.warn(
                "missing",
                "no lm_head, though tie_word_embeddings is false; the embedding takes its place",
            )
    elif declared:
        checkup.embeddings = "declared tied, and a head is in the files too (used if it differs)"
    else:
        checkup.embeddings = "separate from the output head"


def _compare(room: Room, pipeline: PipelineConfig, state: StateDict, checkup: Checkup) -> None:
    try:
        expected = expected_shapes(room.model_class(), pipeline, state)
    except PipesError as error:
        checkup.error("weights", error)
        return
    found = {name: weight.shape for name, weight in state.items()}
    for line in describe_mismatch(expected, found):
        words = line.split(" ", 2)
        if line.startswith(_CAUSE):
            checkup.warn("weights", line)
        else:
            checkup.error(words[1].rstrip(":"), line)
    integers = [
        name
        for name, weight in state.items()
        if expected.get(name) == weight.shape
        and not weight.dtype.is_float()
        and f"{name.rpartition('.')[0]}.scales" not in state
    ]
    if integers:
        checkup.error("dtypes", f"integers where the model has floats: {group_names(integers)}")
