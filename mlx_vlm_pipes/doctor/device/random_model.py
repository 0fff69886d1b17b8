"""Random weights in SmolVLM-256M's shape: what a real model costs, without a download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_vlm_pipes.checkpoint.modules import expected_shapes
from mlx_vlm_pipes.checkpoint.state import StateDict
from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.json_files import require_json
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.registry import find_room

_TEXT = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
_TOWER = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16,
}  # fmt: skip
_SCALE = 4  # by so many patches each way, one image token


@dataclass(frozen=True)
class Shape:
    """Layers of decoder and tower, tokens, side of a picture in pixels: whole, or less of it."""

    layers: int = 30
    tower_layers: int = 12
    vocab_size: int = 49280
    side: int = 512

    @property
    def name(self) -> str:
        layers = f"{self.layers} layers and {self.tower_layers} of the tower"
        return f"random weights of SmolVLM-256M's widths, {layers}"


def write_random_model(target: Path, shape: Shape) -> Path:
    """The bundled model's tokenizer and processor around another network, in bfloat16."""
    shutil.copytree(BUNDLED, target, ignore=shutil.ignore_patterns("*.safetensors"))
    text = {**_TEXT, "num_hidden_layers": shape.layers, "vocab_size": shape.vocab_size}
    tower = {**_TOWER, "num_hidden_layers": shape.tower_layers, "image_size": shape.side}
    config = require_json(target / "config.json")
    config["text_config"].update(text)
    config["vision_config"].update(tower)
    config.update(scale_factor=_SCALE, tie_word_embeddings=True)
    _rewrite(target / "config.json", config)
    edge = {"longest_edge": shape.side}
    pictures = require_json(target / "preprocessor_config.json")
    _rewrite(
        target / "preprocessor_config.json", {**pictures, "size": edge, "max_image_size": edge}
    )
    tokens = (shape.side // _TOWER["patch_size"] // _SCALE) ** 2
    settings = require_json(target / "processor_config.json")
    _rewrite(target / "processor_config.json", {**settings, "image_seq_len": tokens})
    _write_weights(target)
    return target


def _rewrite(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def weight_shapes(folder: Path, encoding: str) -> Mapping[str, tuple[int, ...]]:
    """What the config.json of a folder without weights asks for, under our canonical names, which
    every adapter leaves alone."""
    parsed = read_config(folder)
    model = ModelConfig(
        model_path=str(folder), quantization_encoding=encoding, huggingface_config=parsed
    )
    model_class = find_room(parsed).model_class()
    return expected_shapes(model_class, PipelineConfig(model=model), StateDict({}))


def _write_weights(target: Path) -> None:
    shapes = weight_shapes(target, "bfloat16")
    keys = iter(mx.random.split(mx.random.key(0), len(shapes)))
    tensors = {}
    for name, shape in shapes.items():
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        values = mx.random.normal(shape, scale=scale, key=next(keys))
        tensors[name] = (mx.abs(values) if "norm" in name else values).astype(mx.bfloat16)
        mx.eval(tensors[name])
    mx.save_safetensors(str(target / "model.safetensors"), tensors, metadata={"format": "mlx"})
