"""How much memory a device has for a model, what MLX keeps of freed buffers, and fused attention.

MLX's limits are the process's. They are set when an engine is made; what the user set lower stays.
"""

from __future__ import annotations

import functools
import os

import mlx.core as mx

from mlx_vlm_pipes.dtypes import Device, default_device
from mlx_vlm_pipes.rounding import is_fused

POOL_SHARE = 20  # freed buffers may take 1/20 of the memory,
POOL_BYTES = 1 << 30  # and no more than this
KEPT_BYTES = 16 << 20  # a pool of so much is not worth emptying


def machine_memory(device: Device | None = None) -> int:
    """Bytes: the working set that the device recommends (a Mac's GPU shares its memory with all
    else), or the device's memory, or the machine's: what it has a figure for.

    device: MLX's default where none is given.
    """
    info = mx.device_info((device or default_device()).mx_device)
    for name in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        size = info.get(name)
        if isinstance(size, int) and size > 0:
            return size
    return host_memory()


def host_memory() -> int:
    """Bytes of the machine's memory, all of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def set_limits(device: Device) -> None:
    """Bound the pool of freed buffers and, on Metal, keep what is in use from being paged out."""
    limit = min(POOL_BYTES, machine_memory(device) // POOL_SHARE)
    before = mx.set_cache_limit(limit)
    if before < limit:
        mx.set_cache_limit(before)
    if not device.is_host and mx.metal.is_available():
        wire_once(machine_memory(device))


@functools.cache
def wire_once(limit: int) -> None:
    """Once in a process: MLX must not change it while a step of another model is in flight."""
    before = mx.set_wired_limit(limit)
    if before:
        mx.set_wired_limit(before)


def trim_pool(in_use: int) -> None:
    """Give freed buffers back where they come to more than half of the cache in use.

    MLX itself keeps them for arrays of their size. That serves steps, whose arrays are alike, and
    not a cache that has grown, nor the transients of a prompt that is done.
    """
    if mx.get_cache_memory() > KEPT_BYTES + in_use // 2:
        mx.clear_cache()


@functools.cache
def fuses_attention(device: Device, head_dim: int, dtype: mx.Dtype) -> bool:
    """Whether this MLX attends to many queries there without their scores in memory.

    In 0.32 that is heads of 64, 72, 80, 96 and 128 on Metal; on CUDA half precision only.
    """
    if device.is_host:
        return False
    shape = (1, 1, 16, head_dim)  # of up to 8 queries the scores are small anyway
    q = mx.zeros(shape, dtype, stream=device.mx_device)
    return is_fused(q, q, q, "causal", device.mx_device)
