"""Qwen2VLModel: no documented page, but the same API as the rooms that have one."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import mlx.core as mx

from mlx_vlm_pipes.architectures.qwen2_vl import Qwen2VLConfig, Qwen2VLInputs, Qwen2VLModel
from mlx_vlm_pipes.architectures.qwen2_vl.context import Qwen2VLTextAndVisionContext
from tests.api.driving import Room
from tests.api.grids import GridContract, grid_context
from tests.api.lora_contract import LoRAContract
from tests.fixtures_helper import FIXTURES

ROOM = Room(
    model=Qwen2VLModel,
    inputs=Qwen2VLInputs,
    config=Qwen2VLConfig,
    folder=FIXTURES / "qwen2vl",
    prompts=("two", "mixed"),
    text="model.",
    head="model.embed_tokens.weight",
    cut=40,
    make_context=partial(grid_context, Qwen2VLTextAndVisionContext),
)


class TestQwen2VL(GridContract):
    room = ROOM
    vision_fields = ("pixel_values", "vision_position_ids", "cu_seqlens", "image_token_indices")
    changes: ClassVar[dict[str, Any]] = {
        "tokens": lambda a: mx.where(mx.arange(a.shape[0]) == 1, a + 1, a),
        "position_ids": lambda a: a * 2,
        "pixel_values": lambda a: a + 0.5,
        "vision_position_ids": lambda a: a[::-1],
        "cu_seqlens": lambda a: mx.array([0, a[-1].item()], mx.uint32),
        "image_token_indices": lambda a: a[::-1],
    }
    effective: ClassVar[dict[str, Any]] = {
        "rms_norm_eps": 0.5, "rope_theta": 100.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "vision_config__num_heads": 4, "vision_config__hidden_act": "relu",
    }  # fmt: skip
    refused: ClassVar[dict[str, Any]] = {
        "vision_config": None, "vision_config__spatial_merge_size": 4,
        "vision_config__patch_size": 16, "vision_config__depth": 1,
        "vision_config__embed_dim": 48, "vision_config__hidden_size": 48,
        "vision_config__mlp_ratio": 4, "vision_config__in_channels": 4,
        "vision_config__temporal_patch_size": 1,
    }  # fmt: skip


class TestLoRA(LoRAContract):
    room = ROOM
