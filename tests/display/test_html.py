"""HTML that is safe to show, has an alternative text for each picture, and stays small."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes.contexts import ImageMetadata
from mlx_vlm_pipes.display import html
from mlx_vlm_pipes.display.boxes import Box
from mlx_vlm_pipes.display.pictures import MAX_SHOWN
from mlx_vlm_pipes.display.view import View
from mlx_vlm_pipes.engine.plan import Plan
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.media.previews import Preview
from mlx_vlm_pipes.media.records import MediaRecord, Tiles
from mlx_vlm_pipes.processing.types import ProcessedPrompt
from tests.processing.folders import picture

BAD = "</div><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
TAGS = {
    "div", "figure", "figcaption", "img", "br", "span", "table", "tr", "td"
}  # fmt: skip


class Checker(HTMLParser):
    """Counts what is there; fails on what could run, or does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        assert {name for name, _ in attrs} <= {"style", "src", "alt", "width"}
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def record(image: Image.Image | None = None, **fields: Any) -> MediaRecord:
    image = image or picture(64, 32)
    made = MediaRecord(
        "image", (640, 320), image.size, (1, 2), Tiles(1, 2, (32, 32), (4, 4), overview=True),
        num_tokens=48, start_idx=3, end_idx=60, preview=Preview([image]),
    )  # fmt: skip
    return replace(made, **fields)


def test_nothing_from_outside_is_markup() -> None:
    view = View([record()], [Box((0.1, 0.2, 0.5, 0.6), BAD)], answer=BAD, figures=BAD)
    prompt = ProcessedPrompt(BAD, [1, 2], list[ImageMetadata](), [record()])
    for text in (view._repr_html_(), prompt._repr_html_(), html.table_html(BAD, {BAD: BAD})):
        assert BAD in Checker(text).text


def test_pictures_are_small_and_described() -> None:
    noise = record(picture(1024, 1024), num_tokens=7)
    checked = Checker(View([noise] * 14)._repr_html_())
    assert len(checked.images) == 2 * MAX_SHOWN
    assert "and 2 more" in checked.text
    for image in checked.images:
        assert image["alt"]
        assert image["src"].startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
        data = base64.b64decode(image["src"].partition(",")[2])
        assert len(data) <= html.MAX_PICTURE_BYTES
        assert Image.open(io.BytesIO(data)).width == int(image["width"])


def test_captions_say_what_the_record_says() -> None:
    text = Checker(View([record()])._repr_html_()).text
    assert "640 × 320 pixels, resized to 64 × 32; 1 row of 2 tiles of 32 × 32 and the whole" in text
    assert "4 rows of 4 tokens each; 48 in all, at 3 to 60 of the prompt" in text
    turned = Checker(View([record(orientation=6)])._repr_html_()).text
    assert "640 × 320 pixels, turned clockwise, resized to 64 × 32, 4 times too wide" in turned
    clip = record(kind="video", grid=(2, 4, 4), num_frames=3, total_frames=9, times_s=(0, 1, 2))
    clip = replace(clip, tiles=Tiles(1, 1, (64, 32), (4, 6)))
    text = Checker(View([clip])._repr_html_()).text
    assert "3 of 9 frames of 640 × 320 pixels" in text
    assert "4 rows of 6 tokens for 2 frames each; 48 in all" in text
    lost = record()
    lost.preview.forget()
    assert "the picture is not kept any more" in Checker(View([lost])._repr_html_()).text
    box = View([record()], [Box((0.5, 0.5, 1, 1), "cat")])
    assert "1 cat (0.5, 0.5, 1, 1) is (320, 160, 640, 320) in the source" in re.sub(
        r"\s+", " ", Checker(box._repr_html_()).text
    )


def test_plan_bars() -> None:
    plan = Plan(40, 16, 100, 2_000_000, 5_000_000, 1_000_000, 10, 8_000_000, 16_000_000, True)
    shown = Checker(plan._repr_html_()).text
    assert "Plan: fits" in shown
    for size in ("5 MB", "2 MB", "1 MB", "10 bytes", "8 MB", "16 MB"):
        assert size in shown
    assert "the peak is 50 % of the 16 MB" in shown


def test_views_that_cannot_be(tmp_path) -> None:
    with pytest.raises(InputError, match="no picture number 1 to draw boxes on; there are 1"):
        View([record()], [Box((0, 0))], image=1)
    with pytest.raises(InputError, match="nothing to draw"):
        View([]).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="no picture number '0'"):
        View([record()], [Box((0, 0))], image="0")  # pyright: ignore[reportArgumentType]
    view = View([record()])
    with pytest.raises(InputError, match=r"a.txt: a picture's name ends in .png"):
        view.save(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"cannot be written \(No such file"):
        view.save(tmp_path / "none" / "a.png")
    for wrong in (tmp_path / ("a" * 251 + ".png"), tmp_path / "\0.png"):
        with pytest.raises(InputError, match=r"cannot be (written|the name of a file)"):
            view.save(wrong)
    view.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(view.picture))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
