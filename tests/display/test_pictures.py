"""What is drawn equals stored pictures; `python -m tests.display.test_pictures` makes them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes.architectures.internvl.processing import InternVLProcessor
from mlx_vlm_pipes.architectures.qwen2_5vl.processing import Qwen2_5VLProcessor
from mlx_vlm_pipes.display.boxes import Box
from mlx_vlm_pipes.display.pictures import (
    GAP_PX,
    draw_frames,
    draw_overview,
    draw_picture,
    draw_record,
    wrapped,
)
from mlx_vlm_pipes.display.view import View
from mlx_vlm_pipes.media.records import MediaRecord
from mlx_vlm_pipes.processing.base import VisionProcessor
from mlx_vlm_pipes.processing.types import PromptRequest

HERE = Path(__file__).parent
EXAMPLES = HERE.parent.parent / "examples"
WIDE, GIF = EXAMPLES / "images" / "wide.png", EXAMPLES / "images" / "moving_circle.gif"
BOXES = [Box((14, 12, 36, 34)), Box((75, 27)), Box((60, 10, 999, 999))]


def seen(room: type[VisionProcessor], name: str, **media: list[Path]) -> MediaRecord:
    folder = EXAMPLES / "models" / name
    processor = room(folder, json.loads((folder / "config.json").read_text()))
    (record,) = processor.process(PromptRequest("What?", **media)).media
    return record


def drawn() -> Iterator[tuple[str, Image.Image]]:
    tiled = seen(InternVLProcessor, "tiny-internvl", images=[WIDE])
    yield "tiles", draw_picture(tiled)
    overview = draw_overview(tiled)
    assert overview is not None
    yield "overview", overview
    blocks = seen(Qwen2_5VLProcessor, "tiny-qwen2_5vl", images=[WIDE])
    yield "boxes", draw_picture(blocks, BOXES)
    yield "small", draw_picture(blocks, BOXES, side=64)
    clip = seen(InternVLProcessor, "tiny-internvl", videos=[GIF])
    yield "frame", draw_frames(clip)[-1]


def test_equal_to_stored_pictures() -> None:
    """Letters differ between releases of Pillow: a hundredth of the pixels may be others."""
    for name, image in drawn():
        with Image.open(HERE / f"{name}.png") as stored:
            assert image.size == stored.size, name
            away = np.abs(np.asarray(image, int) - np.asarray(stored.convert("RGB"), int)).max(-1)
        assert (away > 24).mean() < 0.01, name


def test_boxes_lie_on_what_they_name() -> None:
    """The square of wide.png, found in its own pixels, is what the first box encloses."""
    record = seen(Qwen2_5VLProcessor, "tiny-qwen2_5vl", images=[WIDE])
    pixels = np.asarray(Image.open(WIDE).convert("RGB"), int)
    ys, xs = np.nonzero(pixels[..., 0] - pixels[..., 2] > 150)  # orange
    square = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    box = record.to_model(square)
    plain = np.asarray(draw_picture(record), int)
    marked = np.asarray(draw_picture(record, [Box(box)]), int)
    rows, columns = np.nonzero((plain != marked).any(-1))
    scale = plain.shape[1] / 512
    assert (columns.min() / scale, columns.max() / scale) == pytest.approx(square[::2], abs=9)
    assert rows.max() / scale == pytest.approx(square[3], abs=9)


def test_sheets_hold_the_pictures_and_captions() -> None:
    record = seen(InternVLProcessor, "tiny-internvl", images=[WIDE])
    sheet, picture, whole = draw_record(record), draw_picture(record), draw_overview(record)
    assert whole is not None
    left = 2 * GAP_PX + picture.width
    for part, at in ((picture, GAP_PX), (whole, left)):
        box = (at, GAP_PX, at + part.width, GAP_PX + part.height)
        np.testing.assert_array_equal(np.asarray(sheet.crop(box)), np.asarray(part))
    clip = seen(InternVLProcessor, "tiny-internvl", videos=[GIF])
    both = View([record, clip]).picture
    assert both.height == sheet.height + draw_record(clip).height
    many = View([record] * 20).picture
    assert 12 * sheet.height < many.height < 13 * sheet.height
    lines = wrapped("one two three " * 9, 100)
    assert " ".join(lines).split() == ["one", "two", "three"] * 9
    assert len(lines) > 5


if __name__ == "__main__":
    for made, image in drawn():
        image.save(HERE / f"{made}.png", optimize=True)
