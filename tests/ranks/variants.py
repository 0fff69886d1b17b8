"""Fixtures written in other ways that answer the same: each query head with its own keys, or
packed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.fixtures_helper import copy_case


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
