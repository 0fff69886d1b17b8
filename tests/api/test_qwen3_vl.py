"""Qwen3VLModel: no documented page, but the same API as the rooms that have one."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import mlx.core as mx

from mlx_vlm_pipes.architectures.qwen3_vl import Qwen3VLConfig, Qwen3VLInputs, Qwen3VLModel
from mlx_vlm_pipes.architectures.qwen3_vl.context import Qwen3VLTextAndVisionContext
from tests.api.driving import Room
from tests.api.grids import GridContract, grid_context
from tests.api.lora_contract import LoRAContract
from tests.fixtures_helper import FIXTURES

ROOM = Room(
    model=Qwen3VLModel,
    inputs=Qwen3VLInputs,
    config=Qwen3VLConfig,
    folder=FIXTURES / "qwen3vl",
    prompts=("two", "one"),
    text="model.language_model.",
    head="lm_head.weight",
    cut=14,
    make_context=partial(grid_context, Qwen3VLTextAndVisionContext),
)


class TestQwen3VL(GridContract):
    room = ROOM
    features = 2  # deepstack_visual_indexes: what the first layers add to each row
    vision_fields = (
        "pixel_values", "vision_position_ids", "interpolation_indices", "interpolation_weights",
        "cu_seqlens", "image_token_indices",
    )  # fmt: skip
    changes: ClassVar[dict[str, Any]] = {
        "tokens": lambda a: mx.where(mx.arange(a.shape[0]) == 1, a + 1, a),
        "position_ids": lambda a: a * 2,
        "pixel_values": lambda a: a + 0.5,
        "vision_position_ids": lambda a: a[::-1],
        "interpolation_indices": lambda a: a[::-1],
        "interpolation_weights": lambda a: a * 0.5,
        "cu_seqlens": lambda a: mx.array([0, a[-1].item()], mx.uint32),
        "image_token_indices": lambda a: a[::-1],
    }
    effective: ClassVar[dict[str, Any]] = {
        "text_config__rms_norm_eps": 0.5, "text_config__rope_theta": 100.0,
        "vision_config__num_heads": 1, "vision_config__hidden_act": "relu",
        "vision_config__deepstack_visual_indexes": [1, 0],
    }  # fmt: skip
    refused: ClassVar[dict[str, Any]] = {
        "vision_config": None, "vision_config__spatial_merge_size": 4,
        "vision_config__patch_size": 16, "vision_config__depth": 2,
        "vision_config__hidden_size": 48, "vision_config__out_hidden_size": 48,
        "vision_config__in_channels": 4, "vision_config__temporal_patch_size": 1,
        "vision_config__num_position_embeddings": 37, "text_config__num_hidden_layers": 1,
        "vision_config__deepstack_visual_indexes": [0],
    }  # fmt: skip


class TestLoRA(LoRAContract):
    room = ROOM
