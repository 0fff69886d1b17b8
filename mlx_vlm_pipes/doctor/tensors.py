"""The tensors that the headers list against those that the model wants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_vlm_pipes.checkpoint.canonical import canonical_state
from mlx_vlm_pipes.checkpoint.headers import HeaderWeights
from mlx_vlm_pipes.checkpoint.modules import expected_shapes
from mlx_vlm_pipes.checkpoint.state import LANGUAGE, VISION, StateDict
from mlx_vlm_pipes.checkpoint.tie import HEAD
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.doctor.report import Checkup, Part
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import PipesError, WeightsError, clip
from mlx_vlm_pipes.hf_config import HuggingFaceConfig, text_config, tie_flag
from mlx_vlm_pipes.loading import LoadOptions, model_config_for
from mlx_vlm_pipes.quantization import QuantizationConfig
from mlx_vlm_pipes.registry import Room
from mlx_vlm_pipes.weights import (
    ScaledFormat,
    TensorInfo,
    WeightData,
    drop_dummy_biases,
    find_weight_files,
    parse_quantization,
    read_header,
)
from mlx_vlm_pipes.weights.install import describe_mismatch
from mlx_vlm_pipes.weights.layout import group_names
from mlx_vlm_pipes.weights.quantized import settings_for
from mlx_vlm_pipes.weights.safetensors import INDEX_NAME, read_index

_UNLOADABLE = (DType.float64, DType.float8_e5m2)
_CAUSE = "likely cause: "


@dataclass(frozen=True)
class Tensors:
    """What is known of a checkpoint's tensors: headers, canonical state, the room's config."""

    pipeline: PipelineConfig
    state: StateDict


def read_headers(folder: Path, checkup: Checkup) -> HeaderWeights:
    """All tensors that the files list; damage becomes findings."""
    files: Sequence[Path] = ()
    with checkup.collecting("weights"):
        files = find_weight_files(folder)
    infos: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        with checkup.collecting("weights"):
            header = read_header(file)
            metadata |= header.metadata
            for name, info in header.tensors.items():
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
        checkup.dtypes[info.dtype.name] = checkup.dtypes.get(info.dtype.name, 0) + info.nbytes
    return HeaderWeights(infos, metadata)


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
    headers: HeaderWeights,
    checkup: Checkup,
) -> Tensors | None:
    """Layout, quantisation, sizes by part, and what is missing, unexpected or mis-shaped.

    The tensors go the way that loading sends them, with stand-ins for their data.

    Raises: PipesError for what keeps the comparison from being made.
    """
    infos = headers.infos
    if not infos:
        return None
    pipeline = PipelineConfig(model=model_config_for(folder, config, headers, LoadOptions()))
    model_class = room.model_class()
    _, changes = model_class.read_config(pipeline)
    state = canonical_state(
        headers, None, model_class.layouts, pipeline, changes, report=checkup.error
    )
    declared = parse_quantization(config.to_dict())
    checkup.layout = None if state.layout is None else state.layout.name
    checkup.quantization = describe_quantization(declared, state.quantization)
    if declared is not None and not any(
        ".scale" in name or "weight_scale" in name for name in infos
    ):
        checkup.warn("quantization", "config.json declares it, but no tensor is packed")
    _sum_up(state, infos, room.facts().connectors, checkup)
    _look_at_head(state, config, checkup)
    is_gptq = isinstance(declared, QuantizationConfig) and declared.quant_method == "gptq"
    _compare(room, pipeline, state, checkup, dummies=is_gptq)
    return Tensors(pipeline, state)


def describe_quantization(
    declared: QuantizationConfig | ScaledFormat | None, packed: QuantizationConfig | None
) -> str | None:
    """In words, what the files are packed as."""
    if declared is None:
        return None
    method = declared.quant_method
    if packed is None:
        kind = declared.format if isinstance(declared, ScaledFormat) else "expanded"
        return f"{method} ({kind}), expanded to floats at load"
    text = f"{packed.bits} bits, groups of {packed.group_size}, {packed.mode}"
    if packed.overrides:
        text += f", {len(packed.overrides)} modules otherwise"
    return text if method == "mlx" else f"{text} (repacked from {method} at load)"


def _sum_up(
    state: StateDict,
    infos: Mapping[str, TensorInfo],
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
        layout = state.layout
        renamed = None if layout is None or layout.ignores(name) else layout.rename(name)
        if renamed is not None:
            where = part_of(renamed[0], connectors)
            sizes[where] = sizes.get(where, 0) + info.nbytes
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
    head = state.get(f"{LANGUAGE}{HEAD}.weight")
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


def _compare(
    room: Room, pipeline: PipelineConfig, state: StateDict, checkup: Checkup, *, dummies: bool
) -> None:
    """What is missing, unexpected or mis-shaped; dummies: whether GPTQ's biases may be there."""
    try:
        expected = expected_shapes(room.model_class(), pipeline, state)
    except PipesError as error:
        checkup.error("weights", error)
        return
    if dummies:  # a stand-in is zero, as they are
        state.keep(drop_dummy_biases(state, expected))
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
