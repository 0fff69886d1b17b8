"""From checkpoint files to modules with weights in them: the steps that every room takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.interfaces import InferenceSession, Model
from mlx_vlm_pipes.nn.decoder import DecoderConfig, DenseDecoder
from mlx_vlm_pipes.weights import (
    Layout,
    WeightData,
    Weights,
    WeightsAdapter,
    adapt,
    cast_floats,
    detect_layout,
    install_weights,
    load_state_dict,
)
from mlx_vlm_pipes.weights.layout import Transform

LANGUAGE = "language_model."
VISION = "vision_model."


def canonical_state(
    weights: Weights | Mapping[str, Any],
    adapter: WeightsAdapter | None,
    layouts: Sequence[Layout],
    pipeline_config: PipelineConfig,
    transforms: Sequence[Transform] = (),
) -> dict[str, WeightData]:
    """A checkpoint's tensors under our names, in the dtype asked for; nothing is read yet.

    adapter replaces the room's own layouts. Raises: WeightsError for names nobody knows.
    """
    config = pipeline_config.model.huggingface_config
    handles = dict(weights.items())
    if adapter is not None:
        state = adapter(handles, huggingface_config=config, pipeline_config=pipeline_config)
    else:
        state = adapt(handles, detect_layout(handles, layouts), transforms)
    encoding = pipeline_config.model.quantization_encoding
    if encoding is not None:
        wanted = encoding.removeprefix("mlx:")
        if wanted in ("float32", "float16", "bfloat16"):
            state = cast_floats(state, DType[wanted])
    return state


def part(state: Mapping[str, WeightData], prefix: str) -> dict[str, WeightData]:
    """The tensors below a prefix, named relative to it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


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
    session: InferenceSession,
    module: nn.Module,
    state: Mapping[str, WeightData],
    fuse: Callable[[], None] | None = None,
) -> Model:
    """Install all tensors strictly, `fuse` what the module may join, and evaluate them.

    Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
    """
    install_weights(module, state)
    if fuse is not None:
        fuse()
    return session.load(module)


def load_decoder(
    session: InferenceSession, config: DecoderConfig, state: dict[str, WeightData]
) -> tuple[DenseDecoder, Model]:
    """The decoder with its weights in, projections fused, and the tied head decided.

    state: names relative to `language_model.`. Raises: WeightsError as load_module.
    """
    tied = resolve_head(state, tied=config.tie_word_embeddings)
    decoder = DenseDecoder(replace(config, tie_word_embeddings=tied))
    install_weights(decoder, state)
    decoder.fuse()
    return decoder, session.load(decoder)
