"""How networks are loaded: the documented session, and the callable model that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vlm_pipes.dtypes import Device, DeviceRef
from mlx_vlm_pipes.errors import ConfigError


class Model:
    """A loaded, callable network. Call it as the module it holds."""

    def __init__(self, module: Callable[..., Any], weights: Mapping[str, mx.array]) -> None:
        self.module = module
        self.weights = weights

    def __call__(self, *buffers: Any) -> Any:
        return self.module(*buffers)

    def execute(self, *buffers: Any) -> list[Any]:
        """As calling it, with the results always in a list."""
        result = self.module(*buffers)
        return list(result) if isinstance(result, (list, tuple)) else [result]


@dataclass
class InferenceSession:
    """The devices and the compile switch that models are loaded with.

    devices: a model's must be among them; empty means any.
    """

    devices: Sequence[Device] = ()
    compile: bool = True

    def load(
        self, module: nn.Module, weights_registry: Mapping[str, mx.array] | None = None
    ) -> Model:
        """Install weights (all of them, strictly), evaluate them, and wrap the module."""
        if weights_registry is not None:
            module.load_weights(list(weights_registry.items()), strict=True)
        parameters = module.parameters()
        mx.eval(parameters)
        module.eval()
        return Model(module, dict(tree_flatten(parameters)))


def require_device(
    devices: Sequence[Device], session: InferenceSession, declared: Sequence[DeviceRef]
) -> Device:
    """The one device that a model runs on, which is there and which all agree about.

    declared: what the configuration says. Raises: ConfigError for no device, one that MLX does
    not have here, or one that session or configuration contradict; NotImplementedError for
    several.
    """
    if not devices:
        raise ConfigError("devices is empty; give the one device that the model is to run on")
    if len(devices) > 1:
        raise NotImplementedError(f"{len(devices)} devices; one unified-memory device is run")
    (device,) = devices
    if not device.is_available:
        raise ConfigError(f"devices has {device}, which MLX does not have here; use another one")
    if session.devices and device not in session.devices:
        known = ", ".join(map(str, session.devices))
        raise ConfigError(f"devices has {device}, the session has {known}; give both the same")
    if list(declared) != [DeviceRef.from_device(device)]:
        said = ", ".join(map(str, declared)) or "none"
        raise ConfigError(
            f"devices has {device}, the model's device_specs say {said}; give both the same"
        )
    return device
