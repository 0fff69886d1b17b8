"""PixtralModel and PixtralConfig, by their documentation."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.pixtral import PixtralConfig, PixtralInputs, PixtralModel
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from tests.api.driving import Arrays, Room, model_of, new_cache, pipeline_config
from tests.api.lora_contract import LoRAContract
from tests.api.vision_contract import VisionContract
from tests.fixtures_helper import FIXTURES

PATCH = 8


def make_context(config: dict[str, Any], arrays: Arrays, prompt: str) -> TextAndVisionContext:
    """An image's range holds an image token for each patch, and [IMG_BREAK] between its rows."""
    ids, token = arrays[f"{prompt}/input_ids"], config["image_token_index"]
    where, images = np.flatnonzero(ids == token), []
    padded, sizes = arrays[f"{prompt}/pixel_values"], arrays[f"{prompt}/image_sizes"]
    for pixels, (height, width) in zip(padded, sizes, strict=True):
        count = (height // PATCH) * (width // PATCH)
        own, where = where[:count], where[count:]
        images.append(ImageMetadata(int(own[0]), int(own[-1]) + 1, pixels[:, :height, :width]))
    return TextAndVisionContext(
        max_length=2048, tokens=TokenBuffer(ids), vision_token_ids=[token], images=images
    )


ROOM = Room(
    model=PixtralModel,
    inputs=PixtralInputs,
    config=PixtralConfig,
    folder=FIXTURES / "pixtral",
    prompts=("turns", "one"),
    text="language_model.model.",
    head="language_model.lm_head.weight",
    cut=46,
    make_context=make_context,
)


class TestPixtral(VisionContract):
    room = ROOM
    vision_fields = (
        "pixel_patches", "vision_attention_mask", "vision_position_ids", "image_token_indices",
    )  # fmt: skip
    changes: ClassVar[dict[str, Any]] = {
        "tokens": lambda a: mx.where(mx.arange(a.shape[0]) == 1, a + 1, a),
        "pixel_patches": lambda a: a + 0.5,
        "vision_attention_mask": lambda a: mx.array([[a.prod(1).sum().item(), 1]], mx.int32),
        "vision_position_ids": lambda a: a * 0,
        "image_token_indices": lambda a: a[::-1],
    }
    effective: ClassVar[dict[str, Any]] = {
        "text_config__rms_norm_eps": 0.5, "text_config__rope_theta": 100.0,
        "vision_config__rope_theta": 100.0, "vision_config__hidden_act": "gelu",
        "projector_hidden_act": "relu", "vision_feature_layer": 0,
    }  # fmt: skip
    refused: ClassVar[dict[str, Any]] = {
        "image_token_index": 5, "vision_config": None, "multimodal_projector_bias": False,
        "vision_config__model_type": "clip_vision_model", "vision_config__patch_size": 16,
        "vision_config__hidden_size": 48, "vision_config__num_hidden_layers": 1,
        "vision_config__head_dim": 8, "vision_config__num_channels": 4,
        "text_config__head_dim": 16, "text_config__num_hidden_layers": 1,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip

    own_defaults: ClassVar[dict[str, str]] = {
        "image_token_index": "transformers takes 32000, which is no token of Pixtral's",
    }

    def vision_arguments(self, inputs: Any) -> list[mx.array]:
        return [inputs.pixel_patches, inputs.vision_attention_mask, inputs.vision_position_ids]

    def test_patches_are_cut_row_by_row(self) -> None:
        context = ROOM.context("one")
        assert isinstance(context, TextAndVisionContext)
        pixels = context.images[0].pixel_values  # [3, 72, 56]: 9 rows of 7 patches
        inputs = self.prepared(context)
        assert inputs.pixel_patches.shape == (63, 3 * PATCH**2)
        second_row = pixels[:, PATCH : 2 * PATCH, :PATCH].reshape(-1)
        np.testing.assert_array_equal(np.array(inputs.pixel_patches[7]), second_row)
        assert np.array(inputs.vision_position_ids[:9]).tolist() == [*range(7), 20, 21]

    @staticmethod
    def prepared(context: Any) -> Any:
        model = model_of(ROOM)
        return model.prepare_initial_token_inputs([[context]], new_cache(model))


class TestLoRA(LoRAContract):
    room = ROOM


def test_the_configuration() -> None:
    config = PixtralConfig.initialize(pipeline_config(ROOM.folder))
    text, vision = ROOM.config_json["text_config"], ROOM.config_json["vision_config"]
    assert (config.feed_forward_length, config.head_dim) == (text["intermediate_size"], 12)
    assert config.attention_multiplier == 12**-0.5
    assert (config.image_size, config.patch_size, config.num_channels) == (160, PATCH, 3)
    assert config.vision_intermediate_size == vision["intermediate_size"]
    assert (config.vision_head_dim, config.vision_rope_theta) == (16, 10000.0)
