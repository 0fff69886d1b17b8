"""From checkpoint files to modules with weights in them: the steps that every room takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.interfaces import InferenceSession, Model
from mlx_vlm_pipes.nn.decoder import DecoderConfig, DenseDecoder
from mlx_vlm_pipes.nn.lora import attach_adapters
from mlx_vlm_pipes.quantization import LoRAConfig, QuantConfig, QuantizationConfig
from mlx_vlm_pipes.weights import (
    Layout,
    WeightData,
    Weights,
    WeightsAdapter,
    adapt,
    cast_floats,
    detect_layout,
    drop_dummy_biases,
    install_weights,
    load_state_dict,
    parameter_shapes,
)
from mlx_vlm_pipes.weights.layout import Transform
from mlx_vlm_pipes.weights.lora import (
    LoRAAdapter,
    check_against_base,
    linear_shapes,
    read_adapter,
    split_lora_path,
)
from mlx_vlm_pipes.weights.quantized import (
    ScaledFormat,
    canonical_overrides,
    parse_quantization,
    quantize_modules,
)
from mlx_vlm_pipes.weights.scaled import record_scales, unpack_checkpoint

LANGUAGE = "language_model."
VISION = "vision_model."


class StateDict(dict[str, WeightData]):
    """Tensors by canonical name (relative to `prefix`), and how the packed ones are packed."""

    def __init__(
        self,
        tensors: Mapping[str, WeightData],
        quantization: QuantizationConfig | None = None,
        adapters: Sequence[LoRAAdapter] = (),
        prefix: str = "",
        scaled: QuantConfig | None = None,
    ) -> None:
        super().__init__(tensors)
        self.scaled = scaled  # what was expanded from scaled floats, None if nothing was
        self.quantization = quantization
        self.adapters = adapters
        self.prefix = prefix

    def without(self, prefix: str) -> StateDict:
        """The tensors that are not below `prefix`, names unchanged."""
        kept = {k: v for k, v in self.items() if not k.startswith(prefix)}
        return StateDict(kept, self.quantization, self.adapters, self.prefix, self.scaled)


def canonical_state(
    weights: Weights | Mapping[str, Any],
    adapter: WeightsAdapter | None,
    layouts: Sequence[Layout],
    pipeline_config: PipelineConfig,
    transforms: Sequence[Transform] = (),
) -> StateDict:
    """A checkpoint's tensors under our names, in the dtype asked for; hardly anything is read.

    GPTQ, AWQ and scaled floats are repacked or expanded on the way. adapter replaces the room's
    own layouts. Raises: WeightsError for names nobody knows, adapters that do not fit.
    """
    config = pipeline_config.model.huggingface_config
    wanted = float_dtype(pipeline_config)
    quantization = parse_quantization(config_dict(config))
    names = [name for name, _ in weights.items()]
    stored = load_state_dict(weights)
    scaled = record_scales(stored, quantization) if isinstance(quantization, ScaledFormat) else None
    raw, packed = unpack_checkpoint(stored, quantization, wanted)
    if adapter is not None:
        state = adapter(raw, huggingface_config=config, pipeline_config=pipeline_config)
    else:
        layout = detect_layout(raw or names, layouts)
        said = weights.metadata.get("format") if isinstance(weights, Weights) else None
        state = adapt(raw, layout, transforms, file_format=said)
        if packed is not None:
            packed = canonical_overrides(packed, layout)
    if wanted is not None:
        state = cast_floats(state, wanted)
    lora = read_adapters(pipeline_config.lora, layouts)
    return StateDict(state, packed, lora, scaled=scaled)


def expanded_scales(huggingface_config: Any, state: Mapping[str, WeightData]) -> QuantConfig | None:
    """The documented record of scaled floats, from what loading expanded or from a raw state dict.

    Raises: UnsupportedModel for a quantisation method that is not read.
    """
    if isinstance(state, StateDict):
        return state.scaled
    declared = parse_quantization(config_dict(huggingface_config))
    return record_scales(state, declared) if isinstance(declared, ScaledFormat) else None


def float_dtype(pipeline_config: PipelineConfig) -> DType | None:
    """The float type that the encoding asks for, None to keep the checkpoint's."""
    encoding = pipeline_config.model.quantization_encoding or ""
    wanted = encoding.removeprefix("mlx:")
    return DType[wanted] if wanted in ("float32", "float16", "bfloat16") else None


def config_dict(config: Any) -> dict[str, Any]:
    """A configuration object as plain data; transformers' own classes have to_dict as well."""
    return config.to_dict() if config is not None else {}


def read_adapters(lora: LoRAConfig | None, layouts: Sequence[Layout]) -> list[LoRAAdapter]:
    """The adapters that a configuration names. Raises: ConfigError for too many of them."""
    if lora is None or not lora.enable_lora:
        return []
    if len(lora.lora_paths) > lora.max_num_loras:
        raise ConfigError(
            f"{len(lora.lora_paths)} adapters, max_num_loras is {lora.max_num_loras}; raise it"
        )
    named = [split_lora_path(entry) for entry in lora.lora_paths]
    return [read_adapter(folder, name, layouts, lora.max_lora_rank) for name, folder in named]


def part(state: Mapping[str, WeightData], prefix: str) -> StateDict:
    """The tensors below a prefix, named relative to it."""
    kept = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if isinstance(state, StateDict):
        return StateDict(
            kept, state.quantization, state.adapters, state.prefix + prefix, state.scaled
        )
    return StateDict(kept, prefix=prefix)


def tower_state(state: StateDict, prefix: str) -> StateDict:
    """The vision tower's tensors, named as its modules name them; prefix may be empty."""
    return part(state, prefix) if prefix else state.without(LANGUAGE)


def resolve_head(state: dict[str, WeightData], *, tied: bool) -> bool:
    """Whether the head is the embedding; a duplicate of it is dropped from `state`.

    As in transformers, a checkpoint whose head differs from its embedding is not tied,
    whatever its configuration says.
    """
    head, embedding = state.get("lm_head.weight"), state.get("embed_tokens.weight")
    if not tied or head is None or embedding is None:
        return tied
    same = head.shape == embedding.shape and bool(mx.array_equal(head.data, embedding.data))
    if same:
        for key in [k for k in state if k.startswith("lm_head.")]:
            del state[key]
    return same


def load_module(
    session: InferenceSession, module: nn.Module, state: Mapping[str, WeightData]
) -> Model:
    """Install all tensors strictly and evaluate them.

    Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
    """
    fill(module, state)
    return session.load(module)


def fill(module: nn.Module, state: Mapping[str, WeightData]) -> None:
    """Pack the module as `state` is and install its tensors, but for GPTQ's dummy biases.

    Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
    """
    quantize_like(module, state)
    install_weights(module, drop_dummy_biases(state, parameter_shapes(module)))


def quantize_like(module: nn.Module, state: Mapping[str, WeightData]) -> None:
    """Make packed modules of those that are packed in `state`."""
    if isinstance(state, StateDict) and state.quantization is not None:
        shapes = {name: weight.shape for name, weight in state.items()}
        quantize_modules(module, shapes, state.quantization, prefix=state.prefix)


def load_decoder(
    session: InferenceSession, config: DecoderConfig, state: StateDict
) -> tuple[DenseDecoder, Model]:
    """The decoder with its weights in, adapters attached, projections fused, the head decided.

    state: names relative to `language_model.`. Raises: WeightsError as load_module, and for
    adapters that do not fit.
    """
    tied = resolve_head(state, tied=config.tie_word_embeddings)
    decoder = DenseDecoder(replace(config, tie_word_embeddings=tied))
    fill(decoder, state)
    if state.adapters:
        shapes = linear_shapes(decoder)
        for adapter in state.adapters:
            check_against_base(adapter, {LANGUAGE + path: size for path, size in shapes.items()})
        attach_adapters(decoder, state.adapters, LANGUAGE, compute_dtype(decoder))
        decoder.adapter_names = tuple(adapter.name for adapter in state.adapters)
    decoder.fuse()
    return decoder, session.load(decoder)


def compute_dtype(decoder: DenseDecoder) -> mx.Dtype:
    """The type that hidden states have: the embedding's, or that of its scales."""
    embedding = decoder.embed_tokens
    return embedding["scales" if "scales" in embedding else "weight"].dtype
