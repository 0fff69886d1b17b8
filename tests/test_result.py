"""Answers carry what the model saw, wherever they are read from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_vlm_pipes import Pipeline, load
from tests.display.test_html import Checker
from tests.fixtures_helper import FIXTURES

IMAGES = Path(__file__).parent.parent / "examples" / "images"
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load() as made:
        yield made


def test_media_are_the_same_everywhere(pipe: Pipeline) -> None:
    images = [IMAGES / "wide.png", IMAGES / "red_circle.png"]
    media = tuple(pipe.encode(QUESTION, images).media)
    assert [record.source_size for record in media] == [(512, 256), (256, 256)]
    assert pipe.generate(QUESTION, images, max_tokens=1).media == media
    assert pipe.submit(QUESTION, images, max_tokens=1).media == media
    chunks = pipe.stream(QUESTION, images, max_tokens=1)
    assert chunks.media == media
    assert [result.media for result in pipe.generate_n(QUESTION, 2, images, max_tokens=1)] == [
        media
    ] * 2
    assert pipe.generate("Hi", max_tokens=1).media == ()


def test_a_pipeline_shows_what_it_is(pipe: Pipeline) -> None:
    shown = Checker(pipe._repr_html_()).text
    for told in (
        "idefics3",
        "5.33 MB",
        "float32",
        "2048 tokens",
        "adaptersnone",
        "in fractions of",
    ):
        assert told in shown
    with load(FIXTURES / "llama-tied") as text_only:
        assert "boxes" not in Checker(text_only._repr_html_()).text
