"""The device that the suite runs on, and how far its numbers may be from stored ones there.

    MLX_VLM_PIPES_TEST_DEVICE=gpu python -m pytest                      float32 as it is
    MLX_VLM_PIPES_TEST_DEVICE=gpu MLX_ENABLE_TF32=1 python -m pytest    as users have it

Without the variable it is the CPU. Commands that tests start as processes of their own run on MLX's
default device. The GPU's tolerances were set without one at hand (what others measured).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.dtypes import Device, DeviceRef, DeviceSpec

VARIABLE = "MLX_VLM_PIPES_TEST_DEVICE"
NAME = os.environ.get(VARIABLE) or "cpu"
IS_ROUNDED = os.environ.get("MLX_ENABLE_TF32", "0") != "0"  # float32 products on a GPU


@dataclass(frozen=True)
class Tolerances:
    """least: no bar of a comparison of float32 numbers is below it, as a share of the largest
    number. same_tokens: whether greedy tokens must be the stored ones."""

    least: float
    same_tokens: bool = True

    def bar(self, on_cpu: float) -> float:
        """The bar here of a comparison that has this one on a CPU."""
        return max(on_cpu, self.least)


CPU = Tolerances(0.0)
GPU = Tolerances(1e-4)  # sums in other orders
ROUNDED_GPU = Tolerances(2e-2, same_tokens=False)  # products of 10 bits, through all layers
TOLERANCES = CPU if NAME == "cpu" else ROUNDED_GPU if IS_ROUNDED else GPU
bar = TOLERANCES.bar


def use_device() -> None:
    """Make it MLX's default. Raises: UsageError in one line for a name or device there is not."""
    if NAME not in ("cpu", "gpu"):
        raise pytest.UsageError(f"{VARIABLE} is {NAME!r}, expected cpu or gpu")
    if not device().is_available:
        raise pytest.UsageError(f"{VARIABLE} is {NAME!r}, which MLX does not have here; use cpu")
    mx.set_default_device(device().mx_device)


def device_ref() -> DeviceRef:
    return DeviceRef(NAME)


def device() -> Device:
    return device_ref().to_device()


def device_spec() -> DeviceSpec:
    return DeviceSpec(0, NAME)


def on_cpu_only(reason: str) -> pytest.MarkDecorator:
    """For tests that say something about MLX's CPU back end."""
    return pytest.mark.skipif(NAME != "cpu", reason=f"about the CPU: {reason}")


def same_best(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether the best of logits [T, V] is the same; where two are as close as the least bar, any
    of them may be it."""
    best = wanted.max(axis=-1)
    chosen = np.take_along_axis(wanted, found.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return bool((best - chosen <= 2 * TOLERANCES.least * np.abs(wanted).max()).all())
