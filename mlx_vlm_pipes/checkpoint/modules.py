"""Modules for a canonical state dict: what they want of it, and loading it into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vlm_pipes.checkpoint.blueprint import Checkpoint, blueprint
from mlx_vlm_pipes.checkpoint.sharding import keep_own_part
from mlx_vlm_pipes.checkpoint.state import LANGUAGE, StateDict, below, tower_state
from mlx_vlm_pipes.checkpoint.tie import HEAD, settle_head
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.interfaces import InferenceSession, Model
from mlx_vlm_pipes.nn.decoder import DenseDecoder, Projections
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.lora import LoRATable, attach_loras, merge_lora
from mlx_vlm_pipes.weights import (
    WeightData,
    check_against_base,
    drop_dummy_biases,
    install_weights,
    linear_shapes,
    parameter_shapes,
    quantize_modules,
)
from mlx_vlm_pipes.weights.install import check_names_and_shapes

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(model_class: Any, pipeline_config: PipelineConfig, state: StateDict) -> Shapes:
    """Canonical name -> shape of every tensor that a model wants, packed where `state` is.

    From its own modules; nothing is evaluated. Where the head is declared tied, a head in `state`
    counts as wanted: loading drops it.
    Raises: CheckpointError as loading does, for what keeps the modules from being built.
    """
    tower, decoder_config = blueprint(model_class, Checkpoint(pipeline_config, state))
    text = below(state, LANGUAGE)
    if f"{HEAD}.weight" in text:
        decoder_config = replace(decoder_config, tie_word_embeddings=False)
    decoder = DenseDecoder(decoder_config)
    quantize_like(decoder, text)
    shapes = {LANGUAGE + name: shape for name, shape in parameter_shapes(decoder).items()}
    if tower is not None:
        prefix = model_class.tower_prefix
        quantize_like(tower, tower_state(state, prefix))
        shapes |= {prefix + name: shape for name, shape in parameter_shapes(tower).items()}
    return shapes


def require_fit(model_class: Any, pipeline_config: PipelineConfig, state: StateDict) -> Shapes:
    """The expected shapes, which `state` has, but for GPTQ's dummy biases.

    Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
    """
    expected = expected_shapes(model_class, pipeline_config, state)
    fitting = drop_dummy_biases(state, expected)
    check_names_and_shapes(expected, {name: weight.shape for name, weight in fitting.items()})
    return expected


def load_tower(session: InferenceSession, tower: nn.Module, state: StateDict) -> Model:
    """Install all tensors strictly, merge the adapter that changes the tower, and evaluate.

    state: names relative to its prefix; it is emptied. Raises: WeightsError naming missing,
    unexpected and mis-shaped tensors, and for an adapter that does not fit.
    """
    loras = [lora.without(LANGUAGE) for lora in state.loras]
    fill(tower, state)
    shapes = {state.prefix + path: size for path, size in linear_shapes(tower).items()}
    for lora in loras:
        check_against_base(lora, shapes)
        merge_lora(tower, lora, state.prefix)
    return session.load(tower)


def fill(module: nn.Module, state: dict[str, WeightData]) -> None:
    """Pack the module as `state` is and install its tensors, but for GPTQ's dummy biases.

    `state` is emptied: what a parameter is made of can go once that is evaluated.
    Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
    """
    quantize_like(module, state)
    install_weights(module, drop_dummy_biases(state, parameter_shapes(module)))
    state.clear()


def quantize_like(module: nn.Module, state: Mapping[str, WeightData]) -> None:
    """Make packed modules of those that are packed in `state`."""
    if isinstance(state, StateDict) and state.quantization is not None:
        quantize_modules(module, state.shapes, state.quantization, prefix=state.prefix)


def load_decoder(
    session: InferenceSession, config: DecoderConfig, state: StateDict
) -> tuple[DenseDecoder, Model]:
    """The decoder with its weights in, adapters attached, projections fused, the head decided.

    state: names relative to `language_model.`; it is emptied. Raises: WeightsError as load_module,
    and for adapters that do not fit.
    """
    tied = settle_head(state, tied=config.tie_word_embeddings)
    config = replace(config, tie_word_embeddings=tied)
    if session.ranks.are_many:
        _require_whole(config, state)
        config = keep_own_part(state, config, session.ranks, session.note_read)
    decoder = DenseDecoder(config)
    fill(decoder, state)
    decoder.cast_norms()
    if state.loras:
        loras = [lora.below(LANGUAGE) for lora in state.loras]
        shapes = linear_shapes(decoder)
        for lora in loras:
            check_against_base(lora, {LANGUAGE + path: size for path, size in shapes.items()})
        attach_loras(decoder, loras, LANGUAGE, compute_dtype(decoder))
        decoder.adapter_names = tuple(lora.name for lora in loras)
        decoder.adapter_ranks = tuple(lora.rank for lora in state.loras)
    decoder.fuse()
    session.load(decoder)
    return decoder, Model(decoder, canonical_arrays(decoder))


def _require_whole(config: DecoderConfig, state: StateDict) -> None:
    """Raises: WeightsError as one process does, before anything is cut."""
    decoder = DenseDecoder(config)
    quantize_like(decoder, state)
    expected = parameter_shapes(decoder)
    fitting = drop_dummy_biases(state, expected)
    check_names_and_shapes(expected, {name: weight.shape for name, weight in fitting.items()})
    state.keep(fitting.keys())
    shapes = {LANGUAGE + path: size for path, size in linear_shapes(decoder).items()}
    for lora in state.loras:
        check_against_base(lora.below(LANGUAGE), shapes)


def canonical_arrays(decoder: DenseDecoder) -> dict[str, mx.array]:
    """A loaded decoder's weights under the checkpoint's names, LoRA tables left out.

    Of fused projections the rows of each part: views into the same memory, nothing is copied.
    """
    modules = dict(decoder.named_modules())
    arrays: dict[str, mx.array] = {}
    for name, array in cast("list[tuple[str, mx.array]]", tree_flatten(decoder.parameters())):
        path, _, kind = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        if isinstance(modules[path], LoRATable):
            continue
        owner = modules.get(parent)
        joined = owner.joined if isinstance(owner, Projections) else None
        if not isinstance(owner, Projections) or joined is None or leaf != joined.name:
            arrays[name] = array
            continue
        begin = 0
        for part_name, rows in zip(joined.parts, owner.sizes(joined.parts), strict=True):
            if kind != "bias" or part_name in joined.biased:
                arrays[f"{parent}.{part_name}.{kind}"] = array[begin : begin + rows]
            begin += rows
    mx.eval(arrays)  # of slices this makes views, that any thread may read
    return arrays


def compute_dtype(decoder: DenseDecoder) -> mx.Dtype:
    """The type that hidden states have: the embedding's, or that of its scales."""
    embedding = decoder.embed_tokens
    return embedding["scales" if "scales" in embedding else "weight"].dtype
