"""Qwen2_5VLModel, Qwen2_5VLConfig, Qwen2_5VLInputs and VisionConfig, by their documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.qwen2_5vl import (
    Qwen2_5VLConfig,
    Qwen2_5VLInputs,
    Qwen2_5VLModel,
    VisionConfig,
)
from mlx_vlm_pipes.architectures.qwen2_5vl.context import (
    Qwen2_5VLImage,
    Qwen2_5VLTextAndVisionContext,
    RopeTokens,
    VisionData,
    VisionSizes,
)
from mlx_vlm_pipes.contexts import TokenBuffer
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError, InputError
from tests.api.driving import (
    BAR,
    Arrays,
    Room,
    build,
    model_of,
    new_cache,
    pipeline_config,
    prefill,
    relative,
    with_config,
)
from tests.api.lora_contract import LoRAContract
from tests.api.vision_contract import VisionContract
from tests.device import device
from tests.fixtures_helper import FIXTURES

MERGE = 2
KINDS = (
    ("pixel_values", "image_grid_thw", "image_token_id"),
    ("pixel_values_videos", "video_grid_thw", "video_token_id"),
)


def make_context(
    config: dict[str, Any], arrays: Arrays, prompt: str
) -> Qwen2_5VLTextAndVisionContext:
    ids, vision = arrays[f"{prompt}/input_ids"], config["vision_config"]
    images = []
    for values, grids, token in KINDS:
        found = arrays[f"{prompt}/{grids}"].tolist() if f"{prompt}/{grids}" in arrays else []
        spots, first = np.flatnonzero(ids == config[token]), 0
        for i, (t, h, w) in enumerate(found):
            patches = arrays[f"{prompt}/{values}"][first : first + t * h * w]
            start = int(spots[first // MERGE**2])
            is_video = token == "video_token_id"
            second = arrays[f"{prompt}/second_per_grid_ts"][i] if is_video else 1.0
            images.append(
                Qwen2_5VLImage(
                    start,
                    start + len(patches) // MERGE**2,
                    patches,
                    grid_thw=(t, h, w),
                    is_video=is_video,
                    second_per_grid=float(second),
                )
            )
            first += len(patches)
    images.sort(key=lambda image: image.start_idx)
    sizes = VisionSizes(MERGE, vision["patch_size"], vision["window_size"])
    tokens = (config[f"{n}_token_id"] for n in ("image", "video", "vision_start"))
    made = Qwen2_5VLTextAndVisionContext(
        max_length=2048,
        tokens=TokenBuffer(ids),
        vision_token_ids=[config["image_token_id"], config["video_token_id"]],
        images=list(images),
        rope=RopeTokens(MERGE, vision["tokens_per_second"], *tokens),
        vision_data=VisionData(tuple(images), sizes),
    )
    made.refresh_positions()
    return made


ROOM = Room(
    model=Qwen2_5VLModel,
    inputs=Qwen2_5VLInputs,
    config=Qwen2_5VLConfig,
    folder=FIXTURES / "qwen25vl",
    prompts=("two", "mixed"),
    text="model.",
    head="lm_head.weight",
    cut=40,
    make_context=make_context,
)


class TestQwen2_5VL(VisionContract):
    room = ROOM
    plain_positions = False
    activation_bytes = 5 * 2**30
    vision_fields = (
        "pixel_values", "vision_position_ids", "window_index", "cu_seqlens", "cu_window_seqlens",
        "max_seqlen", "max_window_seqlen", "max_grid_size", "image_token_indices",
    )  # fmt: skip
    documented_without_effect = ("max_seqlen", "max_window_seqlen")
    bounds = ("max_grid_size",)
    changes: ClassVar[dict[str, Any]] = {
        "tokens": lambda a: mx.where(mx.arange(a.shape[0]) == 1, a + 1, a),
        "position_ids": lambda a: a * 2,
        "pixel_values": lambda a: a + 0.5,
        "vision_position_ids": lambda a: a[::-1],
        "window_index": lambda a: a[::-1],
        "cu_seqlens": lambda a: mx.array([0, a[-1].item()], mx.uint32),
        "cu_window_seqlens": lambda a: mx.array([0, a[-1].item()], mx.uint32),
        "image_token_indices": lambda a: a[::-1],
    }

    def test_max_grid_size_bounds_the_patches(self) -> None:
        with pytest.raises(InputError, match="max_grid_size 1"):
            self.logits(max_grid_size=lambda a: mx.array(1, a.dtype))

    effective: ClassVar[dict[str, Any]] = {
        "rms_norm_eps": 0.5, "rope_theta": 100.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "vision_config__fullatt_block_indexes": [0], "vision_config__num_heads": 4,
        "vision_config__hidden_act": "gelu",
    }  # fmt: skip
    refused: ClassVar[dict[str, Any]] = {
        "vision_config": None, "vision_config__spatial_merge_size": 4,
        "vision_config__patch_size": 16, "vision_config__depth": 2,
        "vision_config__hidden_size": 48, "vision_config__out_hidden_size": 48,
        "vision_config__in_channels": 4, "vision_config__temporal_patch_size": 1,
        "vision_config__intermediate_size": 24, "num_hidden_layers": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]},
    }  # fmt: skip

    def vision_arguments(self, inputs: Any) -> list[mx.array]:
        return [
            inputs.pixel_values[0], inputs.vision_position_ids[0], inputs.window_index[0],
            inputs.cu_seqlens[0], inputs.cu_window_seqlens[0], inputs.max_seqlen[0],
            inputs.max_window_seqlen[0], inputs.max_grid_size[0],
        ]  # fmt: skip

    def language_arguments(self, inputs: Any, rows: mx.array) -> list[Any]:
        return [*super().language_arguments(inputs, rows), inputs.position_ids]

    def test_positions_are_transformers(self) -> None:
        contexts = ROOM.contexts()
        ids = Qwen2_5VLModel.prepare_decoder_position_ids(contexts, [device()])  # pyright: ignore[reportArgumentType]  # one room's contexts
        assert ids.dtype == mx.uint32
        want = [ROOM.arrays[f"{prompt}/position_ids"] for prompt in ROOM.prompts]
        np.testing.assert_array_equal(np.array(ids), np.concatenate(want, axis=1))

    def test_generated_tokens_of_a_reset_context_get_new_positions(self) -> None:
        model, context = model_of(ROOM), ROOM.context("two")
        inputs, kept = prefill(model, [context])
        for token in ROOM.greedy("two"):
            context.update(token)
            _, kept = prefill(model, [context], inputs.kv_cache_inputs)
        context.reset()
        assert context.tokens.active_length == len(ROOM.logits("two")) + len(ROOM.greedy("two"))
        _, anew = prefill(model, [context])
        assert relative(anew.next_token_logits, np.array(kept.next_token_logits)) < BAR

    def test_signal_buffers_are_one_empty_array(self) -> None:
        model = model_of(ROOM)
        inputs = model.prepare_initial_token_inputs([ROOM.contexts()], new_cache(model, 2))
        assert inputs.signal_buffers is model.signal_buffers
        assert [(a.shape, a.dtype) for a in inputs.signal_buffers] == [((0,), mx.uint8)]

    def test_a_cache_is_needed_to_prepare(self) -> None:
        with pytest.raises(ConfigError, match="kv_cache_inputs"):
            model_of(ROOM).prepare_initial_token_inputs([ROOM.contexts()])


class TestLoRA(LoRAContract):
    room = ROOM


def test_the_configuration() -> None:
    config = Qwen2_5VLConfig.initialize(pipeline_config(ROOM.folder))
    assert isinstance(config.vision_config, VisionConfig)
    ids = (config.image_token_id, config.video_token_id, config.vision_start_token_id)
    assert ids == (324, 325, 321)
    assert (config.spatial_merge_size, config.tokens_per_second) == (MERGE, 2)
    assert config.mrope_section == [1, 1, 2]
    assert config.vision_config.window_size == 64
    model = model_of(ROOM)
    assert model.model_config.vision_config.dtype is DType.float32
    assert Qwen2_5VLModel.model_config is None


def test_a_key_of_the_rope_dictionary_that_nobody_reads_is_refused() -> None:
    """Interleaved sections are another rotation (Qwen3-VL's)."""
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    with pytest.raises(ConfigError, match="mrope_interleaved"):
        Qwen2_5VLConfig.initialize(
            pipeline_config(ROOM.folder, huggingface_config=with_config(ROOM, rope_scaling=rope))
        )


def test_the_record_of_an_fp8_tower(tmp_path: Path) -> None:
    """Tower linears in fp8 with one scale each; the text side in floats."""
    config = {
        **ROOM.config_json,
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors: dict[str, mx.array] = {}
    for name, values in ROOM.tensors.items():
        is_linear = name.startswith("visual.blocks.") and values.ndim == 2
        if is_linear:
            scale = np.abs(values).max() / 448
            tensors[name] = mx.to_fp8(mx.array(values / scale))
            tensors[f"{name}_scale"] = mx.array(np.array([scale], np.float32))
        else:
            tensors[name] = mx.array(values)
    save_fp8(tmp_path / "model.safetensors", tensors)
    model = build(Qwen2_5VLModel, tmp_path)
    record = model.model_config.vision_config.quant_config
    assert record is not None
    depth = set(range(ROOM.config_json["vision_config"]["depth"]))
    assert record.attn_quantized_layers == record.mlp_quantized_layers == depth
    assert model.model_config.llm_config.quant_config is None
    _, outputs = prefill(model, [ROOM.context("two")])
    assert 1e-5 < relative(outputs.logits, ROOM.logits("two")) < 0.2


def save_fp8(path: Path, tensors: dict[str, mx.array]) -> None:
    """As mx.save_safetensors, with F8_E4M3 in the header for the bytes of fp8 tensors."""
    mx.save_safetensors(str(path), tensors, {"format": "pt"})
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].replace(b'"dtype":"U8"', b'"dtype":"F8_E4M3"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
