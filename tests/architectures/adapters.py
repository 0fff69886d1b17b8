"""LoRA adapters by hand, and what weights they come to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

SCALE = 2.0


def write_adapter(
    base: Path,
    folder: Path,
    merged: Path,
    is_adapted: Callable[[str], bool],
    *,
    rank: int,
    spread: float,
    seed: int,
) -> None:
    """An adapter of mlx-lm's form, and the checkpoint with W + s B A in place of W, by numpy.

    is_adapted: asked of the path of each matrix. spread: deviation of the adapter's numbers.
    """
    numbers = np.random.default_rng(seed)
    (file,) = base.glob("*.safetensors")
    tensors: dict[str, Any] = mx.load(str(file))  # pyright: ignore[reportAssignmentType]  # a dictionary for safetensors
    pairs: dict[str, mx.array] = {}
    for stored in list(tensors):
        path, _, kind = stored.rpartition(".")
        if kind != "weight" or tensors[stored].ndim != 2 or not is_adapted(path):
            continue
        weight = np.array(tensors[stored].astype(mx.float32))
        a = numbers.normal(0, spread, (rank, weight.shape[1])).astype(np.float32)
        b = numbers.normal(0, spread, (weight.shape[0], rank)).astype(np.float32)
        tensors[stored] = mx.array(weight + SCALE * b @ a)
        pairs[f"{path}.lora_a"], pairs[f"{path}.lora_b"] = mx.array(a.T), mx.array(b.T)
    assert pairs
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), pairs)
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": rank, "scale": SCALE}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(base, merged)
    mx.save_safetensors(str(merged / file.name), tensors, {"format": "pt"})
