"""A random checkpoint of any size from a fixture: its processor and tokenizer, another network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def write_random_model(
    fixture: str, target: Path, changes: dict[str, dict[str, Any]], **outer: Any
) -> Path:
    """Copy a fixture with parts of its config.json changed and fitting random weights.

    The weights carry our canonical names, which every adapter leaves alone.
    """
    from mlx_vlm_pipes.doctor.device.random_model import weight_shapes

    source = ROOT / "tests" / "fixtures" / fixture
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "reference*"))
    config = json.loads((target / "config.json").read_text())
    for part, values in changes.items():
        config[part].update(values)
    config.update(outer)
    (target / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in weight_shapes(target, "float32").items():
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        values = rng.standard_normal(shape, dtype=np.float32) * scale
        tensors[name] = mx.array(np.abs(values) if "norm" in name else values)
    mx.save_safetensors(str(target / "model.safetensors"), tensors)
    return target
