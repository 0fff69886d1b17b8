"""Qwen2.5-VL end to end against stored Hugging Face logits and greedy tokens."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.qwen2_5vl import Qwen2_5VLInputs, Qwen2_5VLModel
from mlx_vlm_pipes.architectures.qwen2_5vl.context import (
    Qwen2_5VLImage,
    Qwen2_5VLTextAndVisionContext,
    RopeTokens,
    VisionData,
    VisionSizes,
)
from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from mlx_vlm_pipes.dtypes import default_device
from mlx_vlm_pipes.errors import ConfigError, ImageTokenMismatch, InputError
from mlx_vlm_pipes.interfaces import InferenceSession, ModelInputs, ReturnLogits
from mlx_vlm_pipes.kv_cache import KVCacheInputs, increment_cache_lengths
from mlx_vlm_pipes.weights import find_weight_files, load_weights
from tests.architectures.driving import new_cache
from tests.device import bar, device, device_spec
from tests.fixtures_helper import cases, reference

Context = Qwen2_5VLTextAndVisionContext
CASES = cases("qwen2_5_vl")
ROPE = RopeTokens(2, 2, 90, 91, 92)
every_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)


@functools.cache
def load(path: Path) -> Qwen2_5VLModel:
    files, chosen = find_weight_files(path), device()
    specs = [device_spec()]
    config = ModelConfig(str(path), files, quantization_encoding="float32", device_specs=specs)
    return Qwen2_5VLModel(
        PipelineConfig(config),
        InferenceSession([chosen]),
        [chosen],
        config.kv_cache,
        load_weights(files),
        return_logits=ReturnLogits.ALL,
    )


def context(
    ids: np.ndarray, rope: RopeTokens, images: Sequence[Qwen2_5VLImage], sizes: VisionSizes
) -> Context:
    made = Context(
        max_length=4096,
        tokens=TokenBuffer(ids),
        vision_token_ids=[rope.image_token_id, rope.video_token_id],
        images=list(images),
        rope=rope,
        vision_data=VisionData(tuple(images), sizes) if images else None,
    )
    made.refresh_positions()
    return made


def stored(path: Path, prompt: str) -> Context:
    """A prompt of the reference as the processor would hand it over."""
    config, arrays = load(path).model_config, reference(path)[1]
    assert config is not None
    ids, merge = arrays[f"{prompt}/input_ids"], config.spatial_merge_size
    rope = RopeTokens(
        merge,
        config.tokens_per_second,
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
    )
    kinds = (
        ("pixel_values", "image_grid_thw", rope.image_token_id),
        ("pixel_values_videos", "video_grid_thw", rope.video_token_id),
    )
    images = []
    for name, grids, token in kinds:
        spots, patch = np.flatnonzero(ids == token), 0
        found = arrays[f"{prompt}/{grids}"].tolist() if f"{prompt}/{grids}" in arrays else []
        for i, (t, h, w) in enumerate(found):
            end, start = patch + t * h * w, int(spots[patch // merge**2])
            is_video = token == rope.video_token_id
            images.append(
                Qwen2_5VLImage(
                    start,
                    start + (end - patch) // merge**2,
                    arrays[f"{prompt}/{name}"][patch:end],
                    grid_thw=(t, h, w),
                    is_video=is_video,
                    second_per_grid=arrays[f"{prompt}/second_per_grid_ts"][i] if is_video else 1.0,
                )
            )
            patch = end
    images.sort(key=lambda image: image.start_idx)
    vision = config.vision_config
    return context(ids, rope, images, VisionSizes(merge, vision.patch_size, vision.window_size))


def step(model: Qwen2_5VLModel, inputs: ModelInputs, lengths: Sequence[int]) -> Any:
    outputs = model.execute(inputs)
    assert inputs.kv_cache_inputs is not None
    mx.eval(outputs.logits)
    increment_cache_lengths(inputs.kv_cache_inputs, lengths)
    return outputs


def prefill(
    model: Qwen2_5VLModel, own: Context, chunk: int, *, encoded: bool = False
) -> tuple[np.ndarray, Qwen2_5VLInputs]:
    """Logits of all tokens, prefilled in chunks; pictures encoded ahead or by the step."""
    cache, parts = new_cache(model, 1), []
    while True:
        own.tokens.chunk(min(chunk, own.tokens.active_length))
        rows = None
        images = [i for i in own.next_images if i.start_idx < own.tokens.current_position]
        if encoded and images:
            rows = mx.concatenate(model.encode_images(images))
        inputs = model.prepare_initial_token_inputs([[own]], cache, image_embeddings=rows)
        assert not (encoded and inputs.has_vision_inputs)
        parts.append(np.array(step(model, inputs, [own.tokens.active_length]).logits))
        if not own.tokens.is_chunked:
            return np.concatenate(parts), inputs
        own.tokens.advance_chunk()


def truth(path: Path, prompt: str) -> tuple[np.ndarray, list[int]]:
    """Logits and greedy tokens; for long clips those of the positions we follow."""
    arrays = reference(path)[1]
    alt = "_alt" if f"{prompt}/position_ids_alt" in arrays else ""
    return arrays[f"{prompt}/logits{alt}"], arrays[f"{prompt}/greedy{alt}"].tolist()


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return np.abs(got - want).max() < bar(2e-5) * np.abs(want).max()


def prompts(path: Path) -> list[str]:
    return [prompt["name"] for prompt in reference(path)[0]["prompts"]]


def busiest(path: Path) -> str:
    """The last prompt with the most pictures and clips."""
    return max(reversed(prompts(path)), key=lambda name: len(stored(path, name).images))


@every_case
def test_one_ragged_batch_of_all_prompts(path: Path) -> None:
    model, names = load(path), prompts(path)
    contexts = [stored(path, name) for name in names]
    inputs = model.prepare_initial_token_inputs([contexts], new_cache(model, len(names)))
    outputs = step(model, inputs, [c.tokens.active_length for c in contexts])
    bounds = np.array(outputs.logit_offsets)
    greedy = []
    for i, name in enumerate(names):
        got = np.array(outputs.logits)[bounds[i] : bounds[i + 1]]
        assert close(got, truth(path, name)[0]), name
    shortest = min(len(truth(path, name)[1]) for name in names)
    for _ in range(shortest):
        tokens = mx.argmax(outputs.next_token_logits, axis=-1)
        greedy.append(tokens.tolist())
        inputs = model.prepare_next_token_inputs(tokens, inputs)
        assert not inputs.has_vision_inputs
        outputs = step(model, inputs, [1] * len(names))
    for name, got in zip(names, np.array(greedy).T.tolist(), strict=True):
        assert got == truth(path, name)[1][:shortest], name


@every_case
@pytest.mark.parametrize("chunk", [7, 1000])
def test_chunks_and_images_encoded_ahead(path: Path, chunk: int) -> None:
    for name in prompts(path) if chunk > 7 else [busiest(path)]:
        own = stored(path, name)
        own.vision_data = None  # the engine's cache has the rows, the pixels are gone
        got, _ = prefill(load(path), own, chunk, encoded=True)
        assert close(got, truth(path, name)[0]), name
    name = busiest(path)
    assert close(prefill(load(path), stored(path, name), chunk)[0], truth(path, name)[0])


@every_case
@pytest.mark.parametrize("place", ["first", "last", "behind"])
def test_a_prefix_that_is_in_the_cache_already(path: Path, place: str) -> None:
    model, name = load(path), busiest(path)
    first, second, cache = stored(path, name), stored(path, name), new_cache(model, 1)
    assert len(first.images) > 1
    done = first.images[0 if place == "first" else -1].end_idx + (1 if place == "behind" else -2)
    first.tokens.chunk(done)
    step(model, model.prepare_initial_token_inputs([[first]], cache), [done])
    second.tokens.skip_processing(done)
    inputs = model.prepare_initial_token_inputs([[second]], cache)
    assert inputs.has_vision_inputs == (place != "behind")
    got = np.array(step(model, inputs, [second.tokens.active_length]).logits)
    assert close(got, truth(path, name)[0][done:])


@every_case
def test_rows_without_a_place_are_dropped_and_counts_must_agree(path: Path) -> None:
    model, own = load(path), stored(path, busiest(path))
    inputs = model.prepare_initial_token_inputs([[own]], new_cache(model, 1))
    assert inputs.image_token_indices is not None
    count = inputs.image_token_indices[0].shape[0]
    inputs.image_token_indices = [mx.full((count,), np.iinfo(np.int32).min, dtype=mx.int32)]
    dropped = np.array(step(model, inputs, [own.tokens.active_length]).logits)
    plain = model.prepare_initial_token_inputs([[own]], new_cache(model, 1))
    plain.pixel_values = plain.image_token_indices = None
    want = np.array(step(model, plain, [own.tokens.active_length]).logits)
    np.testing.assert_allclose(dropped, want, atol=bar(1e-5))
    inputs.image_token_indices = [mx.zeros((count - 1,), mx.int32)]
    with pytest.raises(ImageTokenMismatch, match=f"{count} vision rows for {count - 1}"):
        model.execute(inputs)


@every_case
def test_refusals(path: Path) -> None:
    model, own = load(path), stored(path, busiest(path))
    with pytest.raises(ConfigError, match="kv_cache_inputs"):
        model.prepare_initial_token_inputs([[own]])
    with pytest.raises(ConfigError, match="2 replica"):
        model.prepare_initial_token_inputs([[own], [own]], new_cache(model, 2))
    with pytest.raises(TypeError, match="ModelInputs"):
        model.execute(ModelInputs())
    with pytest.raises(TypeError, match="ModelInputs"):
        model.prepare_next_token_inputs(mx.array([1]), ModelInputs())
    plain = TextAndVisionContext(max_length=9, tokens=TokenBuffer(np.ones(3)), vision_token_ids=[])
    with pytest.raises(TypeError, match="TextAndVisionContext"):
        model.prepare_initial_token_inputs([[plain]], new_cache(model, 1))
    with pytest.raises(TypeError, match="ImageMetadata"):
        model.encode_images([ImageMetadata(0, 1, np.zeros((4, 1176)))])
    own.vision_data = None
    with pytest.raises(InputError, match="no vision_data"):
        model.prepare_initial_token_inputs([[own]], new_cache(model, 1))


@every_case
def test_documented_fields(path: Path) -> None:
    model = load(path)
    assert model.encode_images([]) == []
    assert (
        model.estimate_activation_memory(model.pipeline_config, model.huggingface_config)
        == 5 * 2**30
    )
    own = stored(path, busiest(path))
    inputs = model.prepare_initial_token_inputs([[own]], new_cache(model, 1))
    data = own.vision_data
    assert data is not None
    names = ("window_index", "vision_position_ids", "cu_seqlens", "max_seqlen", "max_grid_size")
    for name in names:
        (field,) = getattr(inputs, name)
        np.testing.assert_array_equal(field, getattr(data, name))
    for field, name in (
        (inputs.cu_window_seqlens, "cu_window_seqlens_unique"),
        (inputs.max_window_seqlen, "window_max_seqlen"),
        (inputs.pixel_values, "concatenated_pixel_values"),
    ):
        assert field is not None
        np.testing.assert_array_equal(field[0], getattr(data, name))
    assert [buffer.shape for buffer in inputs.signal_buffers] == [(0,)]
    assert inputs.position_ids.dtype == mx.uint32
    longer = replace(model.pipeline_config.model, max_length=9999)
    with pytest.raises(ConfigError, match="9999"):
        model.calculate_max_seq_len(PipelineConfig(longer), model.huggingface_config)


def tail_image() -> Context:
    """[3 text, vision start, image (1, 4, 6)], and nothing behind it."""
    image = Qwen2_5VLImage(4, 10, np.zeros((24, 24), np.float32), grid_thw=(1, 4, 6))
    ids = np.array([1, 2, 3, 92, *[90] * 6])
    return context(ids, ROPE, [image], VisionSizes(2, 2, 16))


def positions(*contexts: Context) -> list[list[int]]:
    return Qwen2_5VLModel.prepare_decoder_position_ids(contexts, []).tolist()  # pyright: ignore[reportReturnType]  # 2-D


def test_decoder_positions_in_their_three_cases() -> None:
    own = tail_image()
    stored_ids = [
        [0, 1, 2, 3, 4, 4, 4, 4, 4, 4],
        [0, 1, 2, 3, 4, 4, 4, 5, 5, 5],
        [0, 1, 2, 3, 4, 5, 6, 4, 5, 6],
    ]
    assert positions(own) == stored_ids
    own.tokens.chunk(6)
    own.tokens.advance_chunk()
    assert positions(own) == [row[6:] for row in stored_ids]
    own.update(7)
    own.update(90)  # a generated placeholder is plain text
    assert own.rope_delta == -3
    assert positions(own) == [[8]] * 3
    own.reset()
    own.rope_delta = 100
    assert positions(own) == [[*row, 7, 8] for row in stored_ids]
    assert own.rope_delta == -3
    text = context(np.arange(5), ROPE, [], VisionSizes())
    text.tokens.skip_processing(2)
    assert positions(own, text) == [[*row, 7, 8, 2, 3, 4] for row in stored_ids]
    assert positions() == [[], [], []]


def test_next_positions_follow_lazily() -> None:
    text = context(np.arange(5), ROPE, [], VisionSizes())
    ids = mx.concatenate(
        [Qwen2_5VLModel.prepare_decoder_position_ids([c], []) for c in (text, tail_image())], axis=1
    )
    model = object.__new__(Qwen2_5VLModel)
    model.device = default_device()
    inputs = Qwen2_5VLInputs(
        tokens=mx.zeros((15,), mx.int32),
        input_row_offsets=[mx.array([0, 5, 15], dtype=mx.uint32)],
        signal_buffers=[],
        position_ids=ids,
        return_n_logits=mx.array([1]),
        kv_cache_inputs=KVCacheInputs(),
    )
    for expected in ([5, 7], [6, 8]):
        inputs = model.prepare_next_token_inputs(mx.array([1, 2]), inputs)
        assert inputs.position_ids.tolist() == [expected] * 3
        assert inputs.input_row_offsets[0].tolist() == [0, 1, 2]
