"""What a check of the machine consists of; each part runs in a process of its own."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_pipes import __version__
from mlx_vlm_pipes.doctor.device.agreement import check_agreement
from mlx_vlm_pipes.doctor.device.attention import check_attention, check_products
from mlx_vlm_pipes.doctor.device.figures import measure_machine
from mlx_vlm_pipes.doctor.device.precision import check_precision
from mlx_vlm_pipes.doctor.device.report import Emit, Recorder
from mlx_vlm_pipes.doctor.device.sampling import check_sampling
from mlx_vlm_pipes.doctor.report import GB
from mlx_vlm_pipes.dtypes import default_device
from mlx_vlm_pipes.engine.memory import host_memory, machine_memory
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.loading import BUNDLED

FACTS = "machine"


@dataclass(frozen=True)
class Part:
    """run takes the user's model, if there is one. exact: float32 must not be rounded to TF32,
    which MLX decides when it is first used. remedy: what to do where the process dies."""

    run: Callable[[Recorder, Path | None], None]
    exact: bool = True
    remedy: str = "report it, and use load(device='cpu') meanwhile"


PARTS = {
    "precision": Part(lambda record, _: check_precision(record, BUNDLED)),
    "agreement": Part(lambda record, _: check_agreement(record, BUNDLED)),
    "attention": Part(lambda record, _: check_attention(record)),
    "products": Part(lambda record, _: check_products(record)),
    "sampling": Part(lambda record, _: check_sampling(record)),
    "speed": Part(measure_machine, exact=False),
}


def run_part(name: str, model: Path | None, emit: Emit) -> None:
    """Run one part in this process; what it finds goes to `emit`.

    Raises: InputError for a part that there is not.
    """
    if name == FACTS:
        emit({FACTS: machine_facts()})
    elif name in PARTS:
        PARTS[name].run(Recorder(name, emit), model)
    else:
        raise InputError(f"no part {name!r}; there are {', '.join([FACTS, *PARTS])}")


def machine_facts() -> dict[str, Any]:
    """Chip, system, versions, memory, and the variables that MLX reads."""
    device = default_device()
    info = mx.device_info(device.mx_device)
    recommended = info.get("max_recommended_working_set_size")
    settings = {name: value for name, value in os.environ.items() if name.startswith("MLX_")}
    return {
        "chip": str(info.get("device_name", platform.processor())),
        "architecture": str(info.get("architecture", platform.machine())),
        "device": str(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "mlx": mx.__version__,  # pyright: ignore[reportAttributeAccessIssue]  # not in the stubs
        "mlx_vlm_pipes": __version__,
        "memory, GB": round(host_memory() / GB, 2),
        "recommended, GB": round(int(recommended) / GB, 2) if recommended else "MLX names none",
        "for models, GB": round(machine_memory(device) / GB, 2),
        "cores": os.cpu_count(),
        "settings": " ".join(f"{k}={v}" for k, v in sorted(settings.items())) or "none",
    }
