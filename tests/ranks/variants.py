"""Fixtures written in other ways that answer the same: each query head with its own keys, or
packed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.fixtures_helper import copy_case
from tests.weights.test_repack import pack_awq, pack_down


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The text part of a config.json, in place."""
    return config.get("text_config") or config.get("llm_config") or config


def with_all_heads(case: str, target: Path) -> Path:
    """A fixture whose KV heads are repeated for each query head: the same numbers, and a model
    that can be cut for as many ranks as it has heads."""
    copy_case(case, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    text = text_of(config)
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    text["num_key_value_heads"] = heads
    path.write_text(json.dumps(config))
    for file in target.glob("*.safetensors"):
        tensors: dict[str, mx.array] = mx.load(str(file))  # pyright: ignore[reportAssignmentType]  # of safetensors, a dict
        for name, array in tensors.items():
            tensors[name] = _repeated(name, array, heads, kv_heads)
        mx.save_safetensors(str(file), tensors, {"format": "pt"})
    return target


def _repeated(name: str, array: mx.array, heads: int, kv_heads: int) -> mx.array:
    """A tensor of keys or values (or of both, behind the queries) with its heads repeated."""
    if "vision" in name or "visual" in name:
        return array
    if re.search(r"self_attn\.[kv]_proj\.", name):
        return _repeat(array, heads, kv_heads)
    if "self_attn.qkv_proj." in name:
        dim = array.shape[0] // (heads + 2 * kv_heads)
        ends = [heads * dim, (heads + kv_heads) * dim]
        queries, keys, values = mx.split(array, ends)
        both = [_repeat(part, heads, kv_heads) for part in (keys, values)]
        return mx.concatenate([queries, *both])
    return array


def _repeat(array: mx.array, heads: int, kv_heads: int) -> mx.array:
    apart = array.reshape(kv_heads, -1, *array.shape[1:])
    return mx.repeat(apart, heads // kv_heads, axis=0).reshape(-1, *array.shape[1:])


MLX_FORMATS = {
    "affine4": {"group_size": 64, "bits": 4},
    "affine3": {"group_size": 32, "bits": 3},
    "affine8": {"group_size": 32, "bits": 8},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "coarse": {"group_size": 128, "bits": 8},
}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"all": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}},
}


def pack(plain: Path, target: Path, form: str) -> Path:
    """A folder's matrices packed: a name of MLX_FORMATS, or "gptq", "awq" or "int8"."""
    target.mkdir()
    config = json.loads((plain / "config.json").read_text())
    tensors: dict[str, mx.array] = {}
    loaded: dict[str, mx.array] = mx.load(str(plain / "model.safetensors"))  # pyright: ignore[reportAssignmentType]  # of safetensors, a dict
    is_affine = form in MLX_FORMATS and "mode" not in MLX_FORMATS[form]
    for name, array in loaded.items():
        if array.ndim == 2 and (is_affine or "_proj" in name):  # so the others compute in float32
            tensors |= _packed(name.removesuffix("weight"), array, form)
        else:
            tensors[name] = array
    key = "quantization" if form in MLX_FORMATS else "quantization_config"
    said = {"gptq": GPTQ, "awq": AWQ, "int8": INT8}
    config[key] = MLX_FORMATS.get(form) or said[form]
    (target / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(target / "model.safetensors"), tensors, {"format": "pt"})
    return target


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False, "version": "gemm"}


def _packed(module: str, array: mx.array, form: str) -> dict[str, mx.array]:
    """The tensors of one matrix. Those of other tools get drawn codes: nothing reads `array`."""
    rows, columns = array.shape
    if form in MLX_FORMATS:
        parts = mx.quantize(array, **MLX_FORMATS[form])
        names = [f"{module}{part}" for part in ("weight", "scales", "biases")]
        return dict(zip(names, parts, strict=False))  # scaled floats have no biases
    rng = np.random.default_rng(rows * columns + len(module))
    if form == "int8":
        codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
        scales = rng.uniform(0.5, 1.5, (rows, 1)).astype(np.float32) / 127 / columns**0.5
        return {f"{module}weight": mx.array(codes), f"{module}weight_scale": mx.array(scales)}
    codes = rng.integers(0, 16, (columns, rows))
    scales = rng.uniform(0.5, 1.5, (columns // 32, rows)).astype(np.float32) / 8 / columns**0.5
    words = pack_down(codes, 4) if form == "gptq" else pack_awq(codes)
    return {f"{module}qweight": mx.array(words), f"{module}scales": mx.array(scales)}


def write_lora(folder: Path, shapes: dict[str, tuple[int, int]], *, dora: bool = False) -> Path:
    """An adapter of rank 4 as mlx-lm saves it. shapes: module -> (inputs, outputs)."""
    numbers, tensors = np.random.default_rng(len(shapes)), {}
    for module, (inputs, outputs) in shapes.items():
        parts = {"lora_a": (inputs, 4), "lora_b": (4, outputs)} | (
            {"m": (outputs,)} if dora else {}
        )
        for part, shape in parts.items():
            values = numbers.normal(1.0 if part == "m" else 0.0, 0.3, shape)
            tensors[f"{module}.{part}"] = mx.array(values.astype(np.float32))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
