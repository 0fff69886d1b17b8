"""Activations by their config.json name.

Source: transformers 5.23 activations.py, ACT2FN; without prelu and xielu, which have weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.errors import ConfigError

Activation = Callable[[mx.array], mx.array]


def _clipped_gelu(x: mx.array) -> mx.array:
    return mx.clip(nn.gelu(x), -10, 10)


def _laplace(x: mx.array) -> mx.array:
    mean, deviation = 0.707107, 0.282095
    return 0.5 * (1 + mx.erf((x - mean) / (deviation * math.sqrt(2))))


def _linear(x: mx.array) -> mx.array:
    return x


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.zeros_like(x))


def _mish(x: mx.array) -> mx.array:
    return x * mx.tanh(_softplus(x))


def _sqrt_softplus(x: mx.array) -> mx.array:
    return mx.sqrt(_softplus(x))


def _relu_squared(x: mx.array) -> mx.array:
    return mx.square(nn.relu(x))


# its names are hf_config.ACTIVATIONS, which are checked without MLX
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": nn.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "gelu_new": nn.gelu_approx,
    "gelu_python": nn.gelu,
    "gelu_python_tanh": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "hardswish": nn.hardswish,
    "laplace": _laplace,
    "leaky_relu": nn.leaky_relu,
    "linear": _linear,
    "mish": _mish,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "relu2": _relu_squared,
    "relu6": nn.relu6,
    "sigmoid": mx.sigmoid,
    "silu": nn.silu,
    "sqrtsoftplus": _sqrt_softplus,
    "swish": nn.silu,
    "tanh": mx.tanh,
}


def activation(name: str) -> Activation:
    """Raises: ConfigError naming an activation that we do not know."""
    if name not in _ACTIVATIONS:
        raise ConfigError(f"hidden_act {name!r}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
