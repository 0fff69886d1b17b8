"""Idefics3Model and Idefics3Config, by their documentation (`idefics3_modulev3` there)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.idefics3 import (
    Idefics3Config,
    Idefics3Inputs,
    Idefics3Model,
    Idefics3VisionConfig,
)
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from mlx_vlm_pipes.dtypes import DType
from tests.api.driving import Arrays, Room, pipeline_config
from tests.api.lora_contract import LoRAContract
from tests.api.vision_contract import VisionContract
from tests.fixtures_helper import FIXTURES


def make_context(config: dict[str, Any], arrays: Arrays, prompt: str) -> TextAndVisionContext:
    """Every frame is an image of its own, with an equal share of the image tokens."""
    ids, token = arrays[f"{prompt}/input_ids"], config["image_token_id"]
    frames = arrays[f"{prompt}/pixel_values"][0]
    runs = np.flatnonzero(ids == token).reshape(len(frames), -1)
    return TextAndVisionContext(
        max_length=2048,
        tokens=TokenBuffer(ids),
        vision_token_ids=[token],
        images=[
            ImageMetadata(int(run[0]), int(run[-1]) + 1, frame)
            for run, frame in zip(runs, frames, strict=True)
        ],
    )


ROOM = Room(
    model=Idefics3Model,
    inputs=Idefics3Inputs,
    config=Idefics3Config,
    folder=FIXTURES / "idefics3",
    prompts=("two", "one"),
    text="model.text_model.",
    head="lm_head.weight",
    cut=56,
    make_context=make_context,
)


class TestIdefics3(VisionContract):
    room = ROOM
    vision_fields = ("pixel_values", "image_token_indices")
    changes: ClassVar[dict[str, Any]] = {
        "tokens": lambda a: mx.where(mx.arange(a.shape[0]) == 1, a + 1, a),
        "pixel_values": lambda a: a + 0.5,
        "image_token_indices": lambda a: a[::-1],
    }
    effective: ClassVar[dict[str, Any]] = {
        "text_config__rms_norm_eps": 0.5, "text_config__rope_theta": 100.0,
        "text_config__hidden_act": "gelu", "vision_config__layer_norm_eps": 0.5,
        "vision_config__hidden_act": "gelu", "vision_config__num_attention_heads": 4,
    }  # fmt: skip
    refused: ClassVar[dict[str, Any]] = {
        "scale_factor": 4, "image_token_id": 5, "vision_config": None,
        "vision_config__hidden_size": 48, "vision_config__patch_size": 16,
        "vision_config__image_size": 64, "vision_config__num_hidden_layers": 1,
        "vision_config__intermediate_size": 24, "vision_config__num_attention_heads": 3,
        "text_config__num_hidden_layers": 1, "text_config__vocab_size": 300,
    }  # fmt: skip

    def vision_arguments(self, inputs: Any) -> list[mx.array]:
        return [inputs.pixel_values]


class TestLoRA(LoRAContract):
    room = ROOM


def test_the_configuration() -> None:
    pipeline = pipeline_config(ROOM.folder)
    config = Idefics3Config.initialize(pipeline)
    assert isinstance(config.vision_config, Idefics3VisionConfig)
    assert (config.scale_factor, config.image_token_id, config.image_seq_len) == (2, 333, 4)
    assert config.vision_config.hidden_size == config.text_config.hidden_size == 32
    draft = replace(pipeline.model, quantization_encoding="bfloat16")
    other = Idefics3Config.initialize(pipeline, draft)
    assert other.text_config.dtype is other.vision_config.dtype is DType.bfloat16
    assert other.get_kv_params().dtype is DType.bfloat16
