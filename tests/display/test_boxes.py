"""Boxes as people give them and as models write them."""

import time

import numpy as np
import pytest

from mlx_vlm_pipes.display.boxes import Box, drawn_boxes, given_boxes, written_boxes
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.facts import Coordinates
from mlx_vlm_pipes.media.records import MediaRecord, Tiles


def record(coordinates: Coordinates = Coordinates.THOUSANDTHS, kind: str = "image") -> MediaRecord:
    tiles = Tiles(1, 1, (28, 28), (1, 1))
    return MediaRecord(kind, (56, 56), (28, 28), (1, 1), tiles, coordinates=coordinates)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (
            '```json\n[\n{"bbox_2d": [10, 20.5, 300, 400], "label": "a cat"},\n'
            '{"point_2d": [5, 6], "label": "its {nose}"}, {"bbox_2d": [1, 2, 3, 4]}\n]\n```',
            [Box((10, 20.5, 300, 400), "a cat"), Box((1, 2, 3, 4))],
        ),
        (
            "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(1,2),(300,400)<|box_end|>",
            [Box((1, 2, 300, 400), "the dog")],
        ),
        (
            "There are two.\nA cup(1,2),(3,4), a plate(5, 6), (7, 8).",
            [Box((1, 2, 3, 4), "A cup"), Box((5, 6, 7, 8), "a plate")],
        ),
        (
            "<ref>cat</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box> and dog[[9, 10, 11, 12]]",
            [Box((1, 2, 3, 4), "cat"), Box((5, 6, 7, 8), "cat"), Box((9, 10, 11, 12), "and dog")],
        ),
        ("At [1, 2, 3, 4] of f(1,2), {x} and [[1, 2], [3, 4]].", []),
        (f"far({'9' * 400},2),(3,4) near(1,2),(3,4)", [Box((1, 2, 3, 4), "near")]),
        ('{"bbox_2d": [1, 2, 3]} {"bbox_2d": "all"} {"bbox_2d": [1, 2, 3, 4', []),
    ],
)
def test_written_forms(text: str, boxes: list[Box]) -> None:
    assert written_boxes(text, [record()]) == boxes


def test_who_writes_boxes_and_on_what_they_are_drawn() -> None:
    text = "cat[[1, 2, 3, 4]]"
    assert written_boxes(text, [record(Coordinates.FRACTIONS)]) == written_boxes(text, []) == []
    assert drawn_boxes(text, [record()]) == [Box((1, 2, 3, 4), "cat")]
    assert (
        drawn_boxes(text, [record(), record()]) == drawn_boxes(text, [record(kind="video")]) == []
    )
    assert len(written_boxes("[[1, 2, 3, 4]]" * 999, [record()])) == 200


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[1, 2, 3, 4]  ,  " * 3000,
        "{" * 50000,
        "(1,2),(" * 9000,
        '{"a": 1 ' * 9000,
        "[[" * 9000,
    ],
)
def test_no_answer_takes_long(text: str) -> None:
    begun = time.perf_counter()
    assert written_boxes(text, [record()]) == []
    assert time.perf_counter() - begun < 1


def test_given_boxes() -> None:
    named = {"bbox_2d": [1, 2, 3, 4], "label": "cat"}
    expected = [Box((1, 2, 3, 4)), Box((0.5, 2)), Box((1, 2, 3, 4), "cat")]
    assert given_boxes([(1, 2, 3, 4), [0.5, 2], named]) == expected
    assert given_boxes(np.array([[1, 2, 3, 4]])) == given_boxes([np.array([1, 2, 3, 4])])
    assert given_boxes([Box((1, 2), "x")]) == [Box((1, 2), "x")]
    for wrong in ((1, 2, 3), "1234", {"label": "cat"}, (1, 2, 3, float("nan")), (1, 2, 3, "4")):
        with pytest.raises(InputError, match=r"a box is .*; expected 4 numbers"):
            given_boxes([wrong])
    with pytest.raises(InputError, match="expected a list of boxes"):
        given_boxes("abcd")
