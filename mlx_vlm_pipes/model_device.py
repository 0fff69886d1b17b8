"""The one device of a model: which it may be, and that its steps run there."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from mlx_vlm_pipes.dtypes import Device, DeviceRef
from mlx_vlm_pipes.errors import ConfigError, InputError
from mlx_vlm_pipes.session import InferenceSession

_STEPS = (
    "load_model", "prepare_initial_token_inputs", "execute", "encode_images",
    "prepare_next_token_inputs",
)  # fmt: skip


class StepsOnDevice:
    """Subclasses load and run their steps on `device`, whatever MLX's default is.

    only_thread: the one that may run them; None for any.
    """

    device: Device
    only_thread: int | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in _STEPS:
            if name in vars(cls):
                setattr(cls, name, _on_own_device(vars(cls)[name]))


def _on_own_device(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def run(self: StepsOnDevice, *arguments: Any, **named: Any) -> Any:
        if self.only_thread not in (None, threading.get_ident()):
            raise InputError(
                f"{step.__name__}: not with several ranks, which must all run it; ask the pipeline "
                "(generate, logits), or load the model in one process"
            )
        with self.device.active():
            return step(self, *arguments, **named)

    return run


def require_device(
    devices: Sequence[Device], session: InferenceSession, declared: Sequence[DeviceRef]
) -> Device:
    """The device that a model runs on, which is there and which all agree about.

    Of a session with several ranks, devices has one for each, alike. declared: what the
    configuration says. Raises: ConfigError for no device, one that MLX does not have here, or one
    that session or configuration contradict; NotImplementedError for any other number; TypeError
    for anything but a list of Device, such as a DeviceRef.
    """
    is_list = isinstance(devices, Sequence)
    if devices and not (is_list and all(isinstance(device, Device) for device in devices)):
        raise TypeError(
            f"devices is {devices!r}, expected a list of one Device; DeviceRef.to_device() gives it"
        )
    if not devices:
        raise ConfigError("devices is empty; give the one device that the model is to run on")
    size = session.ranks.size
    if len(devices) != size and not session.ranks.are_many:
        raise NotImplementedError(f"{len(devices)} devices; one unified-memory device is run")
    if len(devices) != size or len(set(devices)) > 1:
        raise NotImplementedError(f"devices has {len(devices)} for {size} ranks; give one for each")
    device = devices[session.ranks.rank]
    if not device.is_available:
        raise ConfigError(f"devices has {device}, which MLX does not have here; use another one")
    if session.devices and device not in session.devices:
        known = ", ".join(map(str, session.devices))
        raise ConfigError(f"devices has {device}, the session has {known}; give both the same")
    if list(declared) != [DeviceRef.from_device(device)] * size:
        said = ", ".join(map(str, declared)) or "none"
        raise ConfigError(
            f"devices has {device}, the model's device_specs say {said}; give both the same"
        )
    return device
