"""Idefics3 and SmolVLM against stored Hugging Face logits and greedy tokens."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.idefics3 import Idefics3Inputs
from mlx_vlm_pipes.architectures.llama3 import Llama3Inputs
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from mlx_vlm_pipes.errors import ConfigError, ImageTokenMismatch, MediaError
from mlx_vlm_pipes.interfaces import ReturnLogits
from tests.architectures.driving import load, new_cache, relative, run, run_in_chunks
from tests.architectures.idefics3.stored import CASES, PROMPTS, context, stored
from tests.device import bar
from tests.fixtures_helper import reference

every_prompt = pytest.mark.parametrize(
    ("path", "prompt"), PROMPTS, ids=[f"{path.name}-{name}" for path, name in PROMPTS]
)
every_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)


@every_prompt
def test_equals_transformers(path: Path, prompt: str) -> None:
    arrays = reference(path)[1]
    want, greedy = arrays[f"{prompt}/logits"], arrays[f"{prompt}/greedy"].tolist()
    (logits,), (tokens,) = run(load(path), [stored(path, prompt)], len(greedy))
    assert relative(logits, want) < bar(1e-5)
    assert np.array_equal(logits.argmax(-1), want.argmax(-1))
    assert tokens == greedy


@every_case
def test_a_ragged_batch_equals_its_rows(path: Path) -> None:
    facts, arrays = reference(path)
    names = [p["name"] for p in facts["prompts"]]
    steps = min(len(arrays[f"{name}/greedy"]) for name in names)
    logits, tokens = run(load(path), [stored(path, name) for name in names], steps, encoded=True)
    for name, found, chosen in zip(names, logits, tokens, strict=True):
        assert relative(found, arrays[f"{name}/logits"]) < bar(1e-5)
        assert chosen == arrays[f"{name}/greedy"][:steps].tolist()


@pytest.mark.parametrize("size", [7, 20])
def test_chunks_equal_the_whole(size: int) -> None:
    """Chunk borders inside images: rows that belong elsewhere have negative indices."""
    path = CASES[0]
    logits = run_in_chunks(load(path), stored(path, "two"), size)
    assert relative(logits, reference(path)[1]["two/logits"]) < bar(1e-5)


def test_last_token_logits() -> None:
    path = CASES[0]
    model = load(path, ReturnLogits.LAST_TOKEN)
    inputs = model.prepare_initial_token_inputs([[stored(path, "one")]], new_cache(model))
    out = model.execute(inputs)
    assert relative(np.array(out.logits[0]), reference(path)[1]["one/logits"][-1]) < bar(1e-5)
    assert out.logit_offsets is None


def test_inputs() -> None:
    path = CASES[0]
    model, request = load(path), stored(path, "one")
    inputs = model.prepare_initial_token_inputs([[request]], new_cache(model))
    assert inputs.has_vision_inputs
    assert inputs.pixel_values.shape == (len(request.images), *request.images[0].pixel_values.shape)
    assert np.array_equal(np.array(inputs.image_token_indices), request.image_token_indices)
    following = model.prepare_next_token_inputs(mx.array([5]), inputs)
    assert not following.has_vision_inputs
    assert (following.image_token_indices, following.image_embeddings) == (None, None)
    assert following.input_row_offsets.tolist() == [0, 1]
    assert following.kv_cache_inputs is inputs.kv_cache_inputs
    rows = mx.concatenate(model.encode_images(request.images))
    encoded = model.prepare_initial_token_inputs([[request]], image_embeddings=rows)
    assert (encoded.pixel_values, encoded.image_embeddings is rows) == (None, True)


def test_negative_indices_drop_their_rows() -> None:
    """A first image counted as processed: its rows are dropped, the second image's are merged."""
    path = CASES[0]
    model, request = load(path), stored(path, "two")
    inputs = model.prepare_initial_token_inputs([[request]], new_cache(model))
    plain = np.array(model.execute(inputs).logits)
    indices = np.array(inputs.image_token_indices)
    first = request.images[0].end_idx - request.images[0].start_idx
    indices[:first] = -1
    inputs.kv_cache_inputs, inputs.image_token_indices = new_cache(model), mx.array(indices)
    dropped = np.array(model.execute(inputs).logits)
    begin = request.images[0].start_idx
    assert relative(dropped[:begin], plain[:begin]) < bar(1e-5)
    assert relative(dropped[begin:], plain[begin:]) > 1e-2


def test_wrong_inputs_are_refused() -> None:
    path = CASES[0]
    model, request = load(path), stored(path, "one")
    inputs = model.prepare_initial_token_inputs([[request]], new_cache(model))
    with pytest.raises(ConfigError, match="2 replica batches"):
        model.prepare_initial_token_inputs([[request], []])
    llama = Llama3Inputs(inputs.tokens, inputs.input_row_offsets, [], inputs.return_n_logits)
    with pytest.raises(TypeError, match="Idefics3Inputs"):
        model.execute(llama)
    with pytest.raises(TypeError, match="Idefics3Inputs"):
        model.prepare_next_token_inputs(mx.array([1]), llama)
    with pytest.raises(ConfigError, match="kv_cache_inputs"):
        model.execute(model.prepare_initial_token_inputs([[request]]))
    short = Idefics3Inputs(
        inputs.tokens,
        inputs.input_row_offsets,
        inputs.return_n_logits,
        inputs.pixel_values,
        inputs.image_token_indices[:-1],
        kv_cache_inputs=inputs.kv_cache_inputs,
    )
    rows = len(inputs.image_token_indices)
    with pytest.raises(ImageTokenMismatch, match=f"{rows} vision rows for {rows - 1}"):
        model.execute(short)


def test_image_that_does_not_fit_its_tokens() -> None:
    model = load(CASES[0])
    config = model.model_config
    token, rows = config.image_token_id, config.image_seq_len
    vision = config.vision_config
    frame = np.ones((3, vision.image_size, vision.image_size), np.float32)
    request = context(np.array([1, *[token] * (rows - 1), 2]), frame[None], token)
    with pytest.raises(
        ImageTokenMismatch, match=rf"image 1 of 1.*{rows - 1} image .*{rows} vision"
    ):
        model.prepare_initial_token_inputs([[request]])
    foreign = TextAndVisionContext(
        max_length=99,
        tokens=TokenBuffer(np.array([7] * rows)),
        vision_token_ids=[7],
        images=[ImageMetadata(0, rows, frame)],
    )
    with pytest.raises(ImageTokenMismatch, match=rf"0 image tokens \({token}\)"):
        model.prepare_initial_token_inputs([[foreign]])
    odd = context(np.array([token] * rows), frame[None, :, vision.patch_size :], token)
    side = vision.patches_per_side
    with pytest.raises(MediaError, match=f"{side - 1} x {side} patches"):
        model.prepare_initial_token_inputs([[odd]])


def test_pixels_may_come_as_bfloat16_bits() -> None:
    path = CASES[0]
    model, image = load(path), stored(path, "one").images[0]
    bits = (image.pixel_values.view(np.uint32) >> 16).astype(np.uint16)
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    pair = [ImageMetadata(0, 1, pixels) for pixels in (bits, rounded)]
    found, expected = (np.array(model.encode_images([image])[0]) for image in pair)
    assert np.array_equal(found, expected)
