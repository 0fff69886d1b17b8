"""Qwen2-VL end to end against stored Hugging Face logits and greedy tokens."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from mlx_vlm_pipes.architectures.qwen2_vl.context import Qwen2VLTextAndVisionContext
from mlx_vlm_pipes.architectures.qwen2_vl.processing import Qwen2VLProcessor
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from mlx_vlm_pipes.errors import ImageTokenMismatch, InputError
from tests.architectures.driving import load, new_cache, relative, run, run_in_chunks
from tests.device import bar
from tests.fixtures_helper import SAME_PILLOW, cases, reference
from tests.processing.test_fixtures import to_request

BAR = bar(2e-5)  # of the largest logit
every_case = pytest.mark.parametrize("path", cases("qwen2_vl"), ids=lambda path: path.name)
pytestmark = pytest.mark.skipif(not SAME_PILLOW, reason="pixels of another Pillow")


@functools.cache
def processor(path: Path) -> Qwen2VLProcessor:
    return Qwen2VLProcessor(path, json.loads((path / "config.json").read_text()))


def names(path: Path) -> list[str]:
    return [prompt["name"] for prompt in reference(path)[0]["prompts"]]


def context(path: Path, name: str) -> Qwen2VLTextAndVisionContext:
    prompt = next(p for p in reference(path)[0]["prompts"] if p["name"] == name)
    made = processor(path).process(to_request(path, prompt))
    own = processor(path).new_context(made, max_length=4096)
    assert isinstance(own, Qwen2VLTextAndVisionContext)
    return own


def stored(path: Path, prompt: str, name: str) -> np.ndarray:
    """The reference that counts a clip's time, where the two differ."""
    arrays = reference(path)[1]
    other = f"{prompt}/position_ids_alt" in arrays.files
    return arrays[f"{prompt}/{name}{'_alt' if other else ''}"]


@every_case
@pytest.mark.parametrize("encoded", [False, True])
def test_one_ragged_batch_of_all_prompts(path: Path, *, encoded: bool) -> None:
    contexts = [context(path, name) for name in names(path)]
    found, greedy = run(load(path), contexts, steps=8, encoded=encoded)
    for name, rows, tokens in zip(names(path), found, greedy, strict=True):
        assert relative(rows, stored(path, name, "logits")) < BAR, name
        assert tokens == stored(path, name, "greedy")[:8].tolist(), name


@every_case
def test_chunks_that_cut_pictures(path: Path) -> None:
    for name in names(path):
        found = run_in_chunks(load(path), context(path, name), 7)
        assert relative(found, stored(path, name, "logits")) < BAR, name


def test_refusals() -> None:
    path = cases("qwen2_vl")[0]
    model, own = load(path), context(path, "one")
    plain = TextAndVisionContext(max_length=9, tokens=TokenBuffer(np.ones(3)), vision_token_ids=[])
    with pytest.raises(TypeError, match="TextAndVisionContext"):
        model.prepare_initial_token_inputs([[plain]], new_cache(model))
    (rows,) = model.encode_images(own.images)
    short = model.prepare_initial_token_inputs(
        [[own]], new_cache(model), image_embeddings=rows[:-1]
    )
    with pytest.raises(ImageTokenMismatch):
        model.execute(short)
    own.images = [ImageMetadata(i.start_idx, i.end_idx, i.pixel_values) for i in own.images]
    with pytest.raises(InputError, match="pictures without grids"):
        own.refresh_positions()


def test_work_of_a_clip_is_that_of_its_frames() -> None:
    path = cases("qwen2_vl")[0]
    (clip,) = context(path, "long-clip").images
    work = load(path).vision_work(clip)
    times, rows, columns = clip.grid_thw  # pyright: ignore[reportAttributeAccessIssue]  # a GridImage
    assert times == 6
    assert work.scores == 2 * times * (rows * columns) ** 2
