"""Activations by their config.json name.

Source: transformers 5.23 activations.py, ACT2FN.
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


def _bfloat16_softplus(x: mx.array) -> mx.array:
    """Of x rounded to bfloat16, computed in float32: bfloat16."""
    rounded = x.astype(mx.bfloat16).astype(mx.float32)
    return _softplus(rounded).astype(mx.bfloat16)


def _mish(x: mx.array) -> mx.array:
    return x * mx.tanh(_softplus(x))


def _sqrt_softplus(x: mx.array) -> mx.array:
    return mx.sqrt(_softplus(x))


def _relu_squared(x: mx.array) -> mx.array:
    return mx.square(nn.relu(x))


class PReLU(nn.Module):
    """x above 0, below it x times a learned slope: any shape and dtype in, the same out.

    weight [1]. Source: torch.nn.PReLU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.full((1,), 0.25)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.where(x > 0, x, self.weight * x).astype(x.dtype)


class XIELU(nn.Module):
    """Quadratic above 0, an integrated ELU below: any shape and dtype in, the same out.

    alpha_p and alpha_n [1] (learned, before the softplus); beta and eps [] (constants, but kept in
    checkpoints). transformers holds all four in bfloat16, whatever dtype a model is loaded in, and
    so do we. Source: transformers XIELUActivation; https://arxiv.org/abs/2411.13010.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = mx.zeros((1,)), mx.zeros((1,))
        self.beta, self.eps = mx.array(0.5), mx.array(-1e-6)

    def __call__(self, x: mx.array) -> mx.array:
        beta, eps = self.beta.astype(mx.bfloat16), self.eps.astype(mx.bfloat16)
        positive = _bfloat16_softplus(self.alpha_p)
        negative = beta + _bfloat16_softplus(self.alpha_n)
        above = positive * x * x + beta * x
        below = (mx.expm1(mx.minimum(x, eps)) - x) * negative + beta * x
        return mx.where(x > 0, above, below).astype(x.dtype)


# their parameters lie in checkpoints below the name that a module gives its activation
_LEARNED: dict[str, type[PReLU | XIELU]] = {"prelu": PReLU, "xielu": XIELU}
# the names of both tables are hf_config.ACTIVATIONS, which are checked without MLX
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
    """A function, or a new module where it has weights: name it as checkpoints do.

    Raises: ConfigError naming an activation that we do not know.
    """
    if name in _LEARNED:
        return _LEARNED[name]()
    if name not in _ACTIVATIONS:
        supported = ", ".join(sorted({*_ACTIVATIONS, *_LEARNED}))
        raise ConfigError(f"hidden_act {name!r}; supported: {supported}")
    return _ACTIVATIONS[name]
