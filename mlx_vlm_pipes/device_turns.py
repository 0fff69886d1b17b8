"""Whose device MLX computes on: its default is one variable of the process, not of a thread.

Threads that want the same device are inside together; for another one they wait their turn, in
order. An array keeps the device it was made on, whoever waits for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import mlx.core as mx


class _Own(threading.local):
    """What this thread is inside of."""

    device: mx.Device | None = None


class DeviceTurns:
    """The threads that are inside, and those that wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._device: mx.Device | None = None
        self._inside = 0
        self._before: mx.Device | None = None  # the default that comes back; None: not touched
        self._own = _Own()

    @contextlib.contextmanager
    def on(self, device: mx.Device) -> Iterator[None]:
        """MLX's default is this device. Nested on another device, this thread does not wait."""
        held = self._own.device
        if held is not None:
            with contextlib.nullcontext() if held == device else self._nested(held, device):
                yield
            return
        self._enter(device)
        self._own.device = device
        try:
            yield
        finally:
            self._own.device = None
            self._leave()

    def default(self) -> mx.Device:
        """MLX's default device, as it is while nobody is inside."""
        with self._changed:
            return mx.default_device() if self._before is None else self._before

    @contextlib.contextmanager
    def _nested(self, held: mx.Device, device: mx.Device) -> Iterator[None]:
        self._own.device = device
        mx.set_default_device(device)
        try:
            yield
        finally:
            mx.set_default_device(held)
            self._own.device = held

    def _enter(self, device: mx.Device) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(
                lambda: self._waiting[0] is ticket and (not self._inside or self._device == device)
            )
            self._waiting.popleft()
            if not self._inside and mx.default_device() != device:
                self._before = mx.default_device()
                mx.set_default_device(device)
            self._device = device
            self._inside += 1
            self._changed.notify_all()  # the next may want the same device

    def _leave(self) -> None:
        with self._changed:
            self._inside -= 1
            if not self._inside and self._before is not None:
                mx.set_default_device(self._before)
                self._before = None
            self._changed.notify_all()


TURNS = DeviceTurns()
