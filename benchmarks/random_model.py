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

SMOLVLM_256M: dict[str, dict[str, Any]] = {
    "text_config": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280,
        "max_position_embeddings": 8192,
    },
    "vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
    },
}  # fmt: skip


def write_random_model(
    fixture: str, target: Path, changes: dict[str, dict[str, Any]], **outer: Any
) -> Path:
    """Copy a fixture with parts of its config.json changed and fitting random weights.

    The weights carry our canonical names, which every adapter leaves alone.
    """
    from mlx_vlm_pipes.checkpoint.modules import expected_shapes
    from mlx_vlm_pipes.checkpoint.state import StateDict
    from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
    from mlx_vlm_pipes.hf_config import read_config
    from mlx_vlm_pipes.registry import find_room

    source = ROOT / "tests" / "fixtures" / fixture
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "reference*"))
    config = json.loads((target / "config.json").read_text())
    for part, values in changes.items():
        config[part].update(values)
    config.update(outer)
    (target / "config.json").write_text(json.dumps(config))
    parsed = read_config(target)
    model_config = ModelConfig(
        model_path=str(target), quantization_encoding="float32", huggingface_config=parsed
    )
    model_class = find_room(parsed).model_class()
    shapes = expected_shapes(model_class, PipelineConfig(model=model_config), StateDict({}))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        values = rng.standard_normal(shape, dtype=np.float32) * scale
        tensors[name] = mx.array(np.abs(values) if "norm" in name else values)
    mx.save_safetensors(str(target / "model.safetensors"), tensors)
    return target
