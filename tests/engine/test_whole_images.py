"""Pictures whose tokens see each other both ways (Gemma 3's) are never cut by a slice.

No room has them yet: Pixtral's prompts are given to the engine as if it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from mlx_vlm_pipes.engine.state import EngineConfig
from tests.fixtures_helper import FIXTURES, arguments, reference

FOLDER = FIXTURES / "pixtral"


def three() -> dict[str, Any]:
    facts, _ = reference(FOLDER)
    return arguments(FOLDER, next(p for p in facts["prompts"] if p["name"] == "three"))


def stay_whole(pipe: Pipeline) -> None:
    """From now on the contexts of this pipeline's requests say so."""
    plain = pipe.processor.make_context

    def whole(*args: Any) -> Any:
        context = plain(*args)
        assert isinstance(context, TextAndVisionContext)
        context.whole_images = True
        return context

    pipe.processor.make_context = whole


@pytest.fixture
def pipe() -> Iterator[Pipeline]:
    made = load(FOLDER, dtype="float32")
    yield made
    made.close()


def configure(pipe: Pipeline, **limits: Any) -> None:
    pipe.engine.forget()
    pipe.engine.scheduler.state.config = replace(EngineConfig(), **limits)


def test_slices_end_around_pictures(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    stay_whole(pipe)
    model, slices = pipe.engine.scheduler.state.model, []
    prepare = model.prepare_initial_token_inputs

    def spy(batches: Any, *args: Any, **options: Any) -> Any:
        (context,) = batches[0]
        slices.append((context.tokens.processed_length, context.tokens.current_position))
        return prepare(batches, *args, **options)

    request = three()
    images = pipe.encode(**request).images
    whole = pipe.generate(**request, max_tokens=8, logprobs=3)
    logits = pipe.logits(**request)
    monkeypatch.setattr(model, "prepare_initial_token_inputs", spy)
    configure(pipe, prefill_chunk=7)
    sliced = pipe.generate(**request, max_tokens=8, logprobs=3)
    assert len(slices) > len(images)
    for begin, end in slices:
        for image in images:
            assert not image.start_idx < begin < image.end_idx
            assert not image.start_idx < end < image.end_idx
    assert sliced.tokens == whole.tokens
    np.testing.assert_allclose(pipe.logits(**request), logits, atol=1e-4)


def test_both_ways_is_another_answer(pipe: Pipeline) -> None:
    logits = pipe.logits(**three())
    stay_whole(pipe)
    assert np.abs(pipe.logits(**three()) - logits).max() > 1e-2


def test_a_cached_prefix_ends_before_a_picture() -> None:
    """One token must run to give logits; where it is a picture's last, all of the picture does."""
    folder = FIXTURES / "qwen3vl"
    pictures = [str(next(folder.glob("media/shapes*")))]
    request: dict[str, Any] = {"prompt": "What? <|image_pad|>", "images": pictures, "raw": True}
    pipe = load(folder, dtype="float32")
    stay_whole(pipe)
    encoded = pipe.encode(**request)
    (image,) = encoded.images
    assert image.end_idx == len(encoded.input_ids)
    cold = pipe.generate(**request, max_tokens=8)
    warm = pipe.generate(**request, max_tokens=8)
    pipe.close()
    assert warm.usage.cached_tokens == image.start_idx
    assert warm.tokens == cold.tokens


def test_where_a_slice_can_end() -> None:
    images = [ImageMetadata(2, 5, np.zeros(1)), ImageMetadata(5, 9, np.zeros(1))]
    tokens = TokenBuffer(np.array([0, 0, 7, 7, 7, 7, 7, 7, 7, 0]))
    context = TextAndVisionContext(
        max_length=20, tokens=tokens, vision_token_ids=[7], images=images, whole_images=True
    )
    ends = {(0, 2): 2, (0, 3): 2, (2, 4): 5, (0, 5): 5, (0, 8): 5, (5, 8): 9, (0, 10): 10}
    assert {cut: context.uncut(*cut) for cut in ends} == ends
    assert context.uncut(-1, 4) == 2
    context.whole_images = False
    assert context.uncut(0, 3) == 3
