"""What records say of pictures and clips, checked against the pixels that the model gets."""

import io
import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.facts import Coordinates
from mlx_vlm_pipes.media.previews import MAX_FRAMES, MAX_PIXELS, KeptPreviews, Preview
from mlx_vlm_pipes.media.records import Cap, MediaRecord, Tiles
from mlx_vlm_pipes.processing.types import ProcessedPrompt, PromptRequest
from tests.fixtures_helper import FIXTURES
from tests.processing.folders import picture
from tests.processing.test_fixtures import load_processor

PATCH, MERGE = 8, 2  # of the Qwen fixtures
# by fixture: what one unit of the model's coordinates is, as the families' own papers have it
UNITS = {
    "idefics3": lambda size: (1, 1), "smolvlm": lambda size: (1, 1), "pixtral": lambda size: (1, 1),
    "internvl-qwen2": lambda size: (1000, 1000), "internvl-chat": lambda size: (1000, 1000),
    "qwen2vl": lambda size: (1000, 1000), "qwen25vl": lambda size: size,
    "qwen3vl": lambda size: (1000, 1000),
}  # fmt: skip
GIF = Path(__file__).parent.parent.parent / "examples" / "images" / "moving_circle.gif"


def seen(name: str, *images, videos=()) -> ProcessedPrompt:
    request = PromptRequest("What?", images=list(images), videos=list(videos))
    return load_processor(FIXTURES / name).process(request)


def pixels_of(name: str, out: ProcessedPrompt, record: MediaRecord) -> np.ndarray:
    """[H, W]: brightness of the resized picture, put together from what the model is given."""
    values, tiles = out.pixel_values, record.tiles
    if name.startswith("qwen"):
        _, rows, columns = record.grid
        shape = (rows // MERGE, columns // MERGE, MERGE, MERGE, 3, 2, PATCH, PATCH)
        patches = values.reshape(shape)[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6)
        return patches.reshape(3, rows * PATCH, columns * PATCH).mean(0)
    frames = values[0] if values.ndim == 5 else values  # [tiles, 3, H, W]
    assert len(frames) == len(tiles)
    rows = [frames[r * tiles.columns : (r + 1) * tiles.columns] for r in range(tiles.rows)]
    return np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1).mean(0)


def marked(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    return image


def centre(pixels: np.ndarray) -> tuple[float, float]:
    """(x, y) of what is bright; the middle of the first pixel lies at a half."""
    weight = np.clip(pixels - pixels.min(), 0, None)
    weight = np.where(weight > 0.2 * weight.max(), weight, 0)
    y, x = np.mgrid[0 : pixels.shape[0], 0 : pixels.shape[1]] + 0.5
    return float((x * weight).sum() / weight.sum()), float((y * weight).sum() / weight.sum())


@pytest.mark.parametrize("name", UNITS)
def test_a_mark_is_found_where_the_record_says(name: str) -> None:
    draw = random.Random(5)
    for _ in range(6):
        size = draw.randint(40, 400), draw.randint(40, 400)
        left, top = (int(side * draw.uniform(0.1, 0.6)) for side in size)
        box = (left, top, left + size[0] // 4, top + size[1] // 4)
        out = seen(name, marked(size, box))
        (record,) = out.media
        pixels = pixels_of(name, out, record)
        assert record.source_size == record.upright_size == size
        assert record.resized_size == pixels.shape[::-1] == record.preview.images[0].size
        at, units = centre(pixels), UNITS[name](record.resized_size)
        place = [
            c * unit / whole for c, unit, whole in zip(at, units, pixels.shape[::-1], strict=True)
        ]
        found, true = record.to_source(place), ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        for got, wanted, whole, cut in zip(found, true, size, record.resized_size, strict=True):
            assert abs(got - wanted) < 0.6 * whole / cut + 0.5, (size, record)


@pytest.mark.parametrize("coordinates", Coordinates)
def test_there_and_back_is_within_half_a_unit(coordinates: Coordinates) -> None:
    draw, exact = random.Random(3), coordinates is Coordinates.FRACTIONS
    for _ in range(200):
        source, resized = ((draw.randint(1, 5000), draw.randint(1, 5000)) for _ in range(2))
        record = MediaRecord(
            "image", source, resized, (1, 1), Tiles(1, 1, resized, (1, 1)),
            orientation=draw.randint(1, 8), coordinates=coordinates,
        )  # fmt: skip
        size = record.upright_size
        box = [draw.uniform(0, size[i % 2]) for i in range(4)]
        written = record.to_model(box)
        for i, (there, back) in enumerate(zip(box, record.to_source(written), strict=True)):
            unit = size[i % 2] / record.units[i % 2]
            assert abs(there - back) <= (1e-9 * size[i % 2] if exact else unit / 2 + 1e-9)
        assert exact or all(isinstance(value, int) for value in written)
        assert record.to_model(record.to_source(written)) == pytest.approx(written)


def test_numbers_that_are_known() -> None:
    """transformers' smart_resize makes 1148x840 of 4000x3000 turned; docs of Qwen2.5-VL, 3-VL."""
    tiles = Tiles(1, 1, (840, 1148), (41, 30))
    qwen = MediaRecord("image", (3000, 4000), (840, 1148), (1, 82, 60), tiles)
    pixels = Coordinates.PIXELS, (420, 574, 840, 1148)
    for coordinates, box in (pixels, (Coordinates.THOUSANDTHS, (500, 500, 1000, 1000))):
        record = MediaRecord(**{**vars(qwen), "coordinates": coordinates})
        assert record.to_source(box) == (1500, 2000, 3000, 4000)
        assert record.to_model((1500, 2000, 3000, 4000)) == box
        assert record.to_source(box[:2]) == (1500, 2000)
    for wrong in ((1, 2, 3), (1, math.nan), (), "ab", 5):
        with pytest.raises(InputError, match="expected the 2 numbers of a point or 4 of a box"):
            qwen.to_source(wrong)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "HEIF"])
def test_turned_pictures(orientation: int, kind: str) -> None:
    """Sizes are told as stored, places as displayed."""
    stored = marked((80, 48), (8, 8, 24, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    if kind == "HEIF":
        heif = pytest.importorskip("pillow_heif")
        heif.from_pillow(stored).save(file, exif=exif.tobytes(), quality=100)
    else:
        stored.save(file, kind, exif=exif)
    turned = stored.copy()
    turned.getexif()[0x0112] = orientation
    shown = ImageOps.exif_transpose(turned)
    out = seen("pixtral", file.getvalue())
    (record,) = out.media
    assert (record.source_size, record.orientation) == ((80, 48), orientation)
    assert record.upright_size == shown.size
    assert bool(record.turn) == (orientation > 1)
    x, y = centre(pixels_of("pixtral", out, record))
    found = record.to_source((x / record.resized_size[0], y / record.resized_size[1]))
    assert found == pytest.approx(centre(np.asarray(shown.convert("L"), float)), abs=1)


@pytest.mark.parametrize(
    ("name", "size", "cap"),
    [
        ("qwen25vl", (400, 300), Cap("max_pixels", 10240)),
        ("qwen25vl", (64, 64), None),
        ("qwen25vl", (10, 10), Cap("min_pixels", 1024)),
        ("qwen3vl", (400, 300), Cap("max_pixels", 2560)),
        ("pixtral", (200, 100), Cap("longest_edge", 160)),
        ("pixtral", (160, 80), None),
        ("idefics3", (200, 100), Cap("longest_edge", 96)),
        ("idefics3", (50, 20), None),
        ("internvl-qwen2", (300, 300), Cap("max_tiles", 6)),
        ("internvl-qwen2", (30, 30), None),  # shrunk to a tile, however many there may be
    ],
)
def test_caps(name: str, size: tuple[int, int], cap: Cap | None) -> None:
    assert seen(name, picture(*size)).media[0].cap == cap


@pytest.mark.parametrize(
    ("name", "size", "cap"),
    [
        ("qwen25vl", (200, 200), Cap("max_pixels", 5120)),  # of each frame
        ("qwen25vl", (64, 48), None),
        ("qwen3vl", (200, 200), Cap("max_pixels", 4096)),  # of the four together
        ("qwen3vl", (32, 32), None),
        ("smolvlm", (200, 200), Cap("max_image_size", 64)),
        ("smolvlm", (64, 48), None),
        ("internvl-qwen2", (200, 200), Cap("image_size", 28)),
    ],
)
def test_caps_of_clips(name: str, size: tuple[int, int], cap: Cap | None) -> None:
    clip = [picture(*size, i) for i in range(4)]
    assert seen(name, videos=[clip]).media[0].cap == cap


@pytest.mark.parametrize("name", UNITS)
def test_tokens_of_tiles(name: str) -> None:
    """Spans of all tiles hold all image tokens, in order, and as many as a tile's grid has."""
    processor = load_processor(FIXTURES / name)
    out = processor.process(PromptRequest("What?", images=[picture(200, 90), picture(40, 50)]))
    ids = np.array(out.input_ids)
    ends = 0
    for record in out.media:
        rows, columns = record.tiles.tokens
        assert len(record.tile_spans) == len(record.tiles) == record.num_parts
        assert record.num_tokens == len(record.tiles) * rows * columns
        assert (record.tile_spans[0][0], record.tile_spans[-1][1]) == record.span
        for start, end in record.tile_spans:
            assert ends <= start < end
            is_image = np.isin(ids[start:end], processor.tokens.ids)
            assert is_image.all()
            assert (ids[start:end] == processor.tokens.ids[0]).sum() == rows * columns
            ends = end
    assert np.isin(ids, processor.tokens.ids).sum() == sum(
        e - s for r in out.media for s, e in r.tile_spans
    )


@pytest.mark.parametrize("name", ["smolvlm", "internvl-qwen2", "qwen25vl", "qwen3vl"])
def test_clips(name: str) -> None:
    frames = [picture(70, 50, i) for i in range(4)]
    listed, film = seen(name, videos=[frames, GIF]).media
    assert (listed.kind, listed.source_size, listed.total_frames) == ("video", (70, 50), 4)
    assert listed.num_frames == len(listed.times_s) == len(listed.preview.images) == 4
    assert listed.times_s == (0, 0.5, 1, 1.5)  # two frames a second, unless said otherwise
    with Image.open(GIF) as gif:
        assert (film.total_frames, film.source_size) == (gif.n_frames, gif.size)
    assert film.num_frames == len(film.times_s) <= film.total_frames
    assert listed.tiles.size == listed.resized_size
    assert len(listed.tile_spans) == listed.num_parts == (2 if name.startswith("qwen") else 4)
    assert listed.tile_spans[0][0] == listed.start_idx
    rows, columns = listed.tiles.tokens
    assert {end - start for start, end in listed.tile_spans} == {rows * columns}


def test_previews_are_references_until_there_are_too_many() -> None:
    small, large = Image.new("RGB", (10, 10)), Image.new("RGB", (3000, 2000))
    assert Preview([large]).images[0] is large
    many = Preview([Image.new("RGB", (512, 512))] * 200)
    assert len(many.images) == MAX_FRAMES
    assert (many.places[0], many.places[-1]) == (0, 199)
    many.shrink()
    assert many.num_pixels <= MAX_PIXELS
    kept = KeptPreviews(limit_pixels=4 * MAX_PIXELS)
    for _ in range(99):
        kept.add(Preview([large]))  # what nobody holds makes nothing go
    held = [Preview([large]), *(Preview([small]) for _ in range(5))]
    for one in held:
        kept.add(one)
    assert [one.images[0].size for one in held] == [(1000, 667), *[(10, 10)] * 5]
    last = [Preview([Image.new("RGB", (1024, 1024))]) for _ in range(4)]
    for one in last:
        kept.add(one)
    assert [len(one.images) for one in (*held, *last)] == [0] * 7 + [1] * 3
