"""When the next decode step is handed to the device: while the last one runs, or once it is done.

MLX writes an array in place only where nobody else holds it. A step that runs still holds the
cache: on a CPU its attention does, on Metal the completion handlers of its command buffers. So
what is handed over meanwhile writes keys and values into a copy of all of them. MLX itself lets
no more than ten tasks run ahead (ten operations each on a CPU, a command buffer of some 50 kernels
on Metal), so the copies are those of a step that is shorter than that; a longer one takes many
times the wait below.

Waiting leaves the device idle until the first kernels arrive: the graph is built before, and the
text is delivered after. Below `EngineConfig.overlap_bytes` the copy is cheaper than that.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_vlm_pipes.dtypes import Device
from mlx_vlm_pipes.engine.state import EngineState

ALWAYS, NEVER = 1 << 40, 0  # values of EngineConfig.overlap_bytes


def overlaps(state: EngineState) -> bool:
    """Whether the next step is handed over while the last one runs, by the size of the cache."""
    return state.cache.nbytes <= state.config.overlap_bytes


def copied_share(state: EngineState, step: Callable[[], object], device: Device) -> float:
    """How much of the cache is held twice while two decode steps run: 0 where it is written in
    place, about 1 where it is copied.

    step: makes one decode step of the same rows. For measuring: MLX's peak memory begins anew,
    and other models of the process must rest.
    """
    device.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    step()
    device.synchronize()
    return (mx.get_peak_memory() - before) / state.cache.nbytes
