"""InternVLModel against stored Hugging Face numbers, and the contract of its steps."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.internvl import InternVLInputs, InternVLModel
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext
from mlx_vlm_pipes.errors import ConfigError, ImageTokenMismatch, InputError, WeightsError
from mlx_vlm_pipes.interfaces import ModelInputs, ReturnLogits
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs, increment_cache_lengths
from mlx_vlm_pipes.processing.transforms import cut_tiles
from tests.architectures.driving import relative
from tests.architectures.internvl.driving import (
    IMAGE_TOKEN,
    NATIVE,
    TEXT,
    context,
    load,
    random_checkpoint,
    run,
    tiles,
)
from tests.device import bar
from tests.fixtures_helper import cases, reference

STORED = [*cases("internvl"), *cases("internvl_chat")]
IDS = np.array([5, 6, *[IMAGE_TOKEN] * 8, 7, *[IMAGE_TOKEN] * 4, 8, 9])  # two tiles, then one
PIXELS = tiles(3)


def stored_context(arrays: Any, name: str) -> TextAndVisionContext:
    """A stored prompt; the id that a prompt with pictures repeats most is the image token."""
    ids, pixels = arrays[f"{name}/input_ids"], arrays.get(f"{name}/pixel_values")
    return context(ids, pixels, int(np.bincount(ids).argmax()))


@pytest.mark.parametrize("folder", STORED, ids=lambda f: f.name)
def test_equals_hugging_face(folder: Path) -> None:
    """Logits of all positions and greedy tokens, each prompt alone and all in one batch."""
    facts, arrays = reference(folder)
    model = load(folder)
    names = [p["name"] for p in facts["prompts"] if not p["videos"]]
    for group in [*([name] for name in names), names]:
        steps = len(arrays[f"{group[0]}/greedy"])
        contexts = [stored_context(arrays, name) for name in group]
        logits, tokens = run(model, contexts, steps)
        for name, row, chosen in zip(group, logits, tokens, strict=True):
            assert relative(row, arrays[f"{name}/logits"]) < bar(1e-5), (name, len(group))
            assert chosen.tolist() == arrays[f"{name}/greedy"].tolist(), (name, len(group))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("internvl"), NATIVE)


@pytest.fixture(scope="module")
def model(folder: Path) -> InternVLModel:
    return load(folder)


def prompt(pixels: np.ndarray | None = PIXELS) -> TextAndVisionContext:
    return context(IDS, pixels, IMAGE_TOKEN)


def prefill(
    model: InternVLModel,
    request: TextAndVisionContext,
    chunk: int | None = None,
    image_embeddings: mx.array | None = None,
) -> np.ndarray:
    """Logits of the whole prompt, in chunks."""
    cache, parts = KVCache(model.kv_params), []
    row = cache.new_row()
    while request.tokens.active_length:
        request.tokens.chunk(min(chunk or 10**6, request.tokens.active_length))
        kv = cache_inputs(cache, [row])
        inputs = model.prepare_initial_token_inputs(
            [[request]], kv, image_embeddings=image_embeddings
        )
        parts.append(np.array(model.execute(inputs).logits))
        increment_cache_lengths(kv, [request.tokens.active_length])
        request.tokens.advance_chunk()
    return np.concatenate(parts)


def test_pixels_matter_and_layouts_agree(model: InternVLModel) -> None:
    whole = prefill(model, prompt())
    assert relative(prefill(model, prompt(tiles(3, seed=1))), whole) > 0.01
    assert relative(prefill(model, prompt(cut_tiles(PIXELS, 4))), whole) < bar(1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 11])
def test_chunked_prefill_is_the_whole(model: InternVLModel, chunk: int) -> None:
    """Chunks that cut images in two; every chunk's rows and indices agree in number."""
    assert relative(prefill(model, prompt(), chunk), prefill(model, prompt())) < bar(1e-5)


def test_encoded_images_replace_pixels(model: InternVLModel) -> None:
    request = prompt()
    rows = model.encode_images(request.images)
    assert [r.shape for r in rows] == [(8, 32), (4, 32)]
    joined = mx.concatenate(rows)
    inputs = model.prepare_initial_token_inputs([[request]], image_embeddings=joined)
    assert not inputs.has_vision_inputs
    assert relative(
        prefill(model, request, image_embeddings=joined), prefill(model, prompt())
    ) < bar(1e-6)


def test_images_of_several_sizes(model: InternVLModel) -> None:
    """Encoded in one batch a size; each image as if alone."""
    sizes = [tiles(2), tiles(1, side=24), tiles(1, seed=5)]
    images = [ImageMetadata(0, 1, pixels) for pixels in sizes]
    together = model.encode_images(images)
    assert [len(r) for r in together] == [8, 9, 4]
    for image, rows in zip(images, together, strict=True):
        (alone,) = model.encode_images([image])
        assert relative(np.array(rows), np.array(alone)) < bar(1e-6)
    assert model.encode_images([]) == []
    ids = np.array([*[IMAGE_TOKEN] * 8, 1, *[IMAGE_TOKEN] * 9])
    mixed = context(ids, None, IMAGE_TOKEN)
    mixed.images = [ImageMetadata(0, 8, sizes[0]), ImageMetadata(9, 18, sizes[1])]
    with pytest.raises(InputError, match="image_embeddings"):
        model.prepare_initial_token_inputs([[mixed]])


def test_inputs(model: InternVLModel) -> None:
    inputs = model.prepare_initial_token_inputs([[prompt(), prompt(None)]], None, 2)
    assert inputs.pixel_values is not None
    assert inputs.pixel_values[0].shape == (3, 4, 4, 3, 4, 4)
    assert inputs.input_row_offsets[0].tolist() == [0, 17, 34]
    assert inputs.image_token_indices is not None
    assert inputs.image_token_indices[0].tolist() == [*range(2, 10), *range(11, 15)]
    assert [b.shape for b in inputs.signal_buffers] == [(0,)]
    assert inputs.return_n_logits.tolist() == [2]
    after = model.prepare_next_token_inputs(mx.array([1, 2]), inputs)
    assert not after.has_vision_inputs
    assert after.image_token_indices is None
    assert after.input_row_offsets[0].tolist() == [0, 1, 2]
    text = model.prepare_initial_token_inputs([[prompt(None)]])
    assert text.pixel_values is None
    assert text.image_token_indices is None


def test_negative_indices_are_skipped(model: InternVLModel) -> None:
    """A row without a place leaves its token's own embedding."""
    cache = KVCache(model.kv_params)
    inputs = model.prepare_initial_token_inputs(
        [[prompt()]], cache_inputs(cache, [cache.new_row()])
    )
    assert inputs.image_token_indices is not None
    inputs.image_token_indices = [mx.full((12,), np.iinfo(np.int32).min, dtype=mx.int32)]
    found = np.array(model.execute(inputs).logits)
    assert relative(found, prefill(model, prompt(None))) < bar(1e-6)


def test_wrong_counts(model: InternVLModel) -> None:
    request = prompt(None)
    request.images = [ImageMetadata(2, 10, tiles(3))]
    with pytest.raises(ImageTokenMismatch, match=r"8 image tokens .* 12 vision rows"):
        model.prepare_initial_token_inputs([[request]])
    cache = KVCache(model.kv_params)
    kv = cache_inputs(cache, [cache.new_row()])
    inputs = model.prepare_initial_token_inputs([[prompt()]], kv)
    assert inputs.image_token_indices is not None
    inputs.image_token_indices = [inputs.image_token_indices[0][:-1]]
    with pytest.raises(ImageTokenMismatch, match="12 vision rows for 11"):
        model.execute(inputs)


def test_refusals(model: InternVLModel) -> None:
    with pytest.raises(ConfigError, match="2 replica"):
        model.prepare_initial_token_inputs([[], []])
    with pytest.raises(TypeError, match="InternVLInputs"):
        model.execute(ModelInputs())
    with pytest.raises(TypeError, match="InternVLInputs"):
        model.prepare_next_token_inputs(mx.array([1]), ModelInputs())
    with pytest.raises(ConfigError, match="kv_cache_inputs"):
        model.execute(model.prepare_initial_token_inputs([[prompt()]]))


def test_last_token_logits(model: InternVLModel, folder: Path) -> None:
    last = prefill(load(folder, ReturnLogits.LAST_TOKEN), prompt())
    assert relative(last, prefill(model, prompt())[-1:]) < bar(1e-6)


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"use_qk_norm": True}, {}, r"missing: .*q_norm"),
        ({"attention_bias": False}, {}, r"unexpected: .*bias"),
        ({"use_mean_pooling": False}, {}, "layernorm"),
        ({"norm_type": "rms_norm"}, {}, r"norm1\.bias"),
        ({"num_hidden_layers": 3}, {}, "fewer layers"),
        ({}, {"model_type": "qwen2"}, r"missing: .*self_attn"),
    ],
)
def test_config_against_weights(
    folder: Path, tmp_path: Path, vision: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    changed = {
        **NATIVE,
        "vision_config": {**NATIVE["vision_config"], **vision},
        "text_config": {**TEXT, **text},
    }
    wrong = random_checkpoint(tmp_path, changed)
    (wrong / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=message):
        load(wrong)


def test_inputs_are_the_documented_ones() -> None:
    inputs = InternVLInputs(mx.array([1]), [mx.array([0, 1])], [], mx.array([1]))
    assert not inputs.has_vision_inputs
    assert inputs.image_embeddings is None
