"""Pixtral against stored Hugging Face logits and greedy tokens."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.llama3 import Llama3Inputs
from mlx_vlm_pipes.architectures.pixtral import PixtralInputs
from mlx_vlm_pipes.errors import ConfigError, ImageTokenMismatch
from mlx_vlm_pipes.interfaces import ReturnLogits
from tests.architectures.driving import load, new_cache, relative, run, run_in_chunks
from tests.architectures.pixtral.stored import CASES, PROMPTS, context, stored
from tests.device import bar
from tests.fixtures_helper import reference

PACKED = next(path for path in CASES if path.name == "pixtral")  # has a prompt of three images
every_prompt = pytest.mark.parametrize(
    ("path", "prompt"), PROMPTS, ids=[f"{path.name}-{name}" for path, name in PROMPTS]
)


@every_prompt
def test_equals_transformers(path: Path, prompt: str) -> None:
    arrays = reference(path)[1]
    want, greedy = arrays[f"{prompt}/logits"], arrays[f"{prompt}/greedy"].tolist()
    (logits,), (tokens,) = run(load(path), [stored(path, prompt)], len(greedy))
    assert relative(logits, want) < bar(1e-5)
    assert np.array_equal(logits.argmax(-1), want.argmax(-1))
    assert tokens == greedy


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_a_ragged_batch_equals_its_rows(path: Path) -> None:
    facts, arrays = reference(path)
    names = [p["name"] for p in facts["prompts"]]
    steps = min(len(arrays[f"{name}/greedy"]) for name in names)
    logits, tokens = run(load(path), [stored(path, name) for name in names], steps, encoded=True)
    for name, found, chosen in zip(names, logits, tokens, strict=True):
        assert relative(found, arrays[f"{name}/logits"]) < bar(1e-5)
        assert chosen == arrays[f"{name}/greedy"][:steps].tolist()


@pytest.mark.parametrize("size", [13, 64])
def test_chunks_equal_the_whole(size: int) -> None:
    """Chunk borders inside images: rows that belong elsewhere have negative indices."""
    logits = run_in_chunks(load(PACKED), stored(PACKED, "three"), size)
    assert relative(logits, reference(PACKED)[1]["three/logits"]) < bar(1e-5)


def test_last_token_logits() -> None:
    model = load(PACKED, ReturnLogits.LAST_TOKEN)
    assert model.model_config.return_logits is ReturnLogits.LAST_TOKEN
    inputs = model.prepare_initial_token_inputs([[stored(PACKED, "one")]], new_cache(model))
    out = model.execute(inputs)
    assert relative(np.array(out.logits[0]), reference(PACKED)[1]["one/logits"][-1]) < bar(1e-5)


def test_inputs() -> None:
    model, request = load(PACKED), stored(PACKED, "three")
    config, rows = model.model_config, len(request.image_token_indices)
    inputs = model.prepare_initial_token_inputs([[request]], new_cache(model))
    assert inputs.has_vision_inputs
    assert inputs.pixel_patches.shape == (rows, 3 * config.patch_size**2)
    assert inputs.vision_position_ids.shape == (rows,)
    grids = np.array(inputs.vision_attention_mask)
    assert grids.shape == (3, 2)
    assert grids.prod(axis=1).sum() == rows
    assert np.array_equal(np.array(inputs.image_token_indices), request.image_token_indices)
    is_image = request.tokens.all[request.image_token_indices] == config.image_token_index
    assert is_image.all()  # no break token among them
    following = model.prepare_next_token_inputs(mx.array([5]), inputs)
    vision = (
        following.pixel_patches, following.vision_attention_mask, following.vision_position_ids,
        following.image_token_indices, following.image_embeddings,
    )  # fmt: skip
    assert vision == (None,) * 5
    assert following.input_row_offsets.tolist() == [0, 1]
    assert following.kv_cache_inputs is inputs.kv_cache_inputs
    embeddings = mx.concatenate(model.encode_images(request.images))
    encoded = model.prepare_initial_token_inputs([[request]], image_embeddings=embeddings)
    assert (encoded.pixel_patches, encoded.vision_attention_mask) == (None, None)
    assert encoded.image_embeddings is embeddings


def test_negative_indices_drop_their_rows() -> None:
    model, request = load(PACKED), stored(PACKED, "one")
    inputs = model.prepare_initial_token_inputs([[request]], new_cache(model))
    plain = np.array(model.execute(inputs).logits)
    indices = np.array(inputs.image_token_indices)
    changed_at = int(indices[4])
    indices[4:] = -1
    inputs.kv_cache_inputs, inputs.image_token_indices = new_cache(model), mx.array(indices)
    dropped = np.array(model.execute(inputs).logits)
    assert relative(dropped[:changed_at], plain[:changed_at]) < bar(1e-5)
    assert relative(dropped[changed_at:], plain[changed_at:]) > 1e-2


def test_wrong_inputs_are_refused() -> None:
    model, request = load(PACKED), stored(PACKED, "one")
    inputs = model.prepare_initial_token_inputs([[request]], new_cache(model))
    with pytest.raises(ConfigError, match="0 replica batches"):
        model.prepare_initial_token_inputs([])
    llama = Llama3Inputs(inputs.tokens, inputs.input_row_offsets, [], inputs.return_n_logits)
    with pytest.raises(TypeError, match="PixtralInputs"):
        model.execute(llama)
    with pytest.raises(TypeError, match="PixtralInputs"):
        model.prepare_next_token_inputs(mx.array([1]), llama)
    with pytest.raises(ConfigError, match="kv_cache_inputs"):
        model.execute(model.prepare_initial_token_inputs([[request]]))
    rows = len(inputs.image_token_indices)
    short = PixtralInputs(
        inputs.tokens,
        inputs.input_row_offsets,
        inputs.return_n_logits,
        inputs.pixel_patches,
        inputs.vision_attention_mask,
        inputs.vision_position_ids,
        inputs.image_token_indices[1:],
        kv_cache_inputs=inputs.kv_cache_inputs,
    )
    with pytest.raises(ImageTokenMismatch, match=f"{rows} vision rows for {rows - 1}"):
        model.execute(short)


def test_image_that_does_not_fit_its_tokens() -> None:
    model = load(PACKED)
    token, p = model.model_config.image_token_index, model.model_config.patch_size
    request = context(np.array([1, *[token] * 6, 2]), [np.ones((3, 2 * p, 3 * p))], token, p)
    wider = np.ones((3, 2 * p, 4 * p), np.float32)
    object.__setattr__(request.images[0], "pixel_values", wider)
    with pytest.raises(ImageTokenMismatch, match=r"image 1 of 1.*6 image tokens.*8 vision rows"):
        model.prepare_initial_token_inputs([[request]])
