"""InternVLModel, InternVLConfig, InternVLInputs and VisionConfig, by their documentation."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.internvl import (
    InternVLConfig,
    InternVLInputs,
    InternVLModel,
    VisionConfig,
)
from mlx_vlm_pipes.config import RuntimeConfig
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from mlx_vlm_pipes.errors import ConfigError
from tests.api.driving import Arrays, Room, model_of, new_cache, pipeline_config, with_config
from tests.api.lora_contract import LoRAContract
from tests.api.vision_contract import VisionContract
from tests.fixtures_helper import FIXTURES


def make_context(config: dict[str, Any], arrays: Arrays, prompt: str) -> TextAndVisionContext:
    """A run of image tokens is an image; each of its tiles takes four of them."""
    ids, token = arrays[f"{prompt}/input_ids"], config["image_token_id"]
    tiles, images, used = arrays[f"{prompt}/pixel_values"], [], 0
    where = np.flatnonzero(ids == token)
    for run in np.split(where, np.flatnonzero(np.diff(where) > 1) + 1):
        count = len(run) // config["image_seq_length"]
        pixels = tiles[used : used + count]
        images.append(ImageMetadata(int(run[0]), int(run[-1]) + 1, pixels))
        used += count
    return TextAndVisionContext(
        max_length=2048, tokens=TokenBuffer(ids), vision_token_ids=[token], images=images
    )


ROOM = Room(
    model=InternVLModel,
    inputs=InternVLInputs,
    config=InternVLConfig,
    folder=FIXTURES / "internvl-qwen2",
    prompts=("one", "two"),
    text="language_model.model.",
    head="language_model.lm_head.weight",
    cut=16,
    make_context=make_context,
)


class TestInternVL(VisionContract):
    room = ROOM
    vision_fields = ("pixel_values", "image_token_indices")
    changes: ClassVar[dict[str, Any]] = {
        "tokens": lambda a: mx.where(mx.arange(a.shape[0]) == 1, a + 1, a),
        "pixel_values": lambda a: a + 0.5,
        "image_token_indices": lambda a: a[::-1],
    }
    effective: ClassVar[dict[str, Any]] = {
        "text_config__rms_norm_eps": 0.5, "text_config__rope_theta": 100.0,
        "vision_config__layer_norm_eps": 0.5, "vision_config__num_attention_heads": 4,
        "vision_feature_layer": 0,
    }  # fmt: skip
    refused: ClassVar[dict[str, Any]] = {
        "downsample_ratio": 0.25, "vision_config": None, "vision_config__use_qk_norm": True,
        "vision_config__attention_bias": False, "vision_config__hidden_size": 48,
        "vision_config__norm_type": "rms_norm",
        "vision_config__patch_size": 14, "vision_config__num_hidden_layers": 1,
        "vision_config__intermediate_size": 24, "text_config__model_type": "qwen3",
        "text_config__num_hidden_layers": 1,
    }  # fmt: skip

    activation_bytes = 8192 // 4 * 128 * 2**20 + 8192 * 100 * 2**10  # four tokens a tile

    def vision_arguments(self, inputs: Any) -> list[mx.array]:
        return [inputs.pixel_values[0]]

    def test_signal_buffers_are_one_empty_array(self) -> None:
        model = model_of(ROOM)
        inputs = model.prepare_initial_token_inputs([ROOM.contexts()], new_cache(model, 2))
        assert inputs.signal_buffers is model.signal_buffers
        assert [(a.shape, a.dtype) for a in inputs.signal_buffers] == [((0,), mx.uint8)]

    def test_pixels_are_tiles_of_patches(self) -> None:
        model, context = model_of(ROOM), ROOM.context("one")
        inputs = model.prepare_initial_token_inputs([[context]], new_cache(model))
        (tiles,) = inputs.pixel_values
        assert tiles.shape == (7, 4, 4, 3, 7, 7)
        pixels = ROOM.arrays["one/pixel_values"]
        np.testing.assert_array_equal(np.array(tiles[2, 1, 3]), pixels[2, :, 7:14, 21:28])


class TestLoRA(LoRAContract):
    room = ROOM


def test_the_configuration() -> None:
    config = InternVLConfig.initialize(pipeline_config(ROOM.folder))
    assert isinstance(config.vision_config, VisionConfig)
    assert (config.downsample_ratio, config.num_image_token) == (0.5, 4)
    vision = VisionConfig.initialize_from_config(
        pipeline_config(ROOM.folder).model.huggingface_config.vision_config
    )
    assert vision == config.vision_config
    assert (vision.image_size, vision.patch_size, vision.head_dim) == (28, 7, 16)


def test_the_documented_estimate() -> None:
    """Numbers of the documentation: 8192 tokens, one device, 448 / 14 / 0.5."""
    config = with_config(ROOM, vision_config__image_size=448, vision_config__patch_size=14)
    for chunked, wanted in ((True, 5_133_828_096), (False, 6_878_658_560)):
        runtime = RuntimeConfig(enable_chunked_prefill=chunked)
        pipeline = pipeline_config(ROOM.folder, runtime=runtime)
        assert InternVLModel.estimate_activation_memory(pipeline, config) == wanted
    fewer = pipeline_config(
        ROOM.folder,
        runtime=RuntimeConfig(enable_chunked_prefill=False),
        vision_config_overrides={"max_dynamic_patch": 2},
    )
    wanted = 5_133_828_096 + 3 * 128 * 2**20
    assert InternVLModel.estimate_activation_memory(fewer, config) == wanted
    with pytest.raises(ConfigError, match="vision_config"):
        InternVLModel.estimate_activation_memory(fewer, with_config(ROOM, vision_config=None))
