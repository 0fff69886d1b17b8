"""The tensors that a model wants for a state dict, from its own modules; nothing is evaluated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.nn.decoder import DenseDecoder
from mlx_vlm_pipes.nn.loading import LANGUAGE, StateDict, part, quantize_like, tower_state
from mlx_vlm_pipes.weights.install import check_names_and_shapes, parameter_shapes
from mlx_vlm_pipes.weights.repack import drop_dummy_biases

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(model_class: Any, pipeline_config: PipelineConfig, state: StateDict) -> Shapes:
    """Canonical name -> shape of every tensor, packed where `state` is.

    Where the head is declared tied, a head in `state` counts as wanted: loading drops it.
    Raises: CheckpointError as loading does, for what keeps the modules from being built.
    """
    config, _ = model_class.read_config(pipeline_config)
    tower, decoder_config = model_class.blueprint(config, pipeline_config, state)
    text = part(state, LANGUAGE)
    if "lm_head.weight" in text:
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
