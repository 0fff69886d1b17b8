"""Activations by their config.json name."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.errors import ConfigError

Activation = Callable[[mx.array], mx.array]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu_new": nn.gelu_approx,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
}


def activation(name: str) -> Activation:
    """Raises: ConfigError naming an activation that we do not know."""
    if name not in _ACTIVATIONS:
        raise ConfigError(f"hidden_act {name!r}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
