"""Sources, modes, orientation, transparency, limits; what a hash tells apart."""

import base64
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes.errors import MediaError, PipesWarning
from mlx_vlm_pipes.processing import images
from mlx_vlm_pipes.processing.fetch import Access
from mlx_vlm_pipes.processing.images import load_image
from mlx_vlm_pipes.processing.transforms import image_hash
from tests.processing.folders import picture


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_sources_agree(tmp_path) -> None:
    image = picture(7, 5)
    data = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    array = np.asarray(image)
    sources = [image, data, path, str(path), io.BytesIO(data), url, array, array / np.float32(255)]
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), array)


def test_a_stream_that_cannot_be_read() -> None:
    stream = io.BytesIO(encoded(picture(3, 2)))
    stream.close()
    with pytest.raises(
        MediaError, match=r"^BytesIO object cannot be read: I/O operation on closed"
    ):
        load_image(stream)


def test_transparency_lies_on_white_and_orientation_is_applied() -> None:
    clear = Image.new("RGBA", (2, 3), (255, 0, 0, 0))
    half = Image.new("LA", (2, 3), (0, 128))
    palette = Image.new("P", (2, 3))
    palette.info["transparency"] = 0
    for image, value in ((clear, 255), (half, 127), (palette, 255)):
        for source in (image, encoded(image)):
            assert set(np.asarray(load_image(source)).ravel().tolist()) == {value}
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert load_image(encoded(picture(4, 2), "JPEG", exif=exif)).size == (2, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F", "HSV"])
def test_every_mode_becomes_rgb(mode) -> None:
    assert load_image(Image.new(mode, (3, 2))).mode == "RGB"


def test_deep_grey_is_cut_off_as_transformers_does_and_that_is_said() -> None:
    """test_reference.py compares with transformers itself."""
    levels = np.array([[0, 100, 255, 256, 30_000, 65_535]], np.uint16)
    with pytest.warns(PipesWarning, match="cut off at 255"):
        loaded = load_image(encoded(Image.fromarray(levels)))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 100, 255, 255, 255, 255]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(Image.fromarray(levels[:, :3]))


def test_without_conversion_three_channels_are_taken_as_they_are() -> None:
    image = picture(5, 4)
    for mode in ("RGB", "YCbCr", "HSV"):
        raw = image.convert(mode)
        found = load_image(raw, convert=False)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), np.asarray(raw))
    for mode in ("L", "LA", "RGBA", "P", "CMYK", "1", "I;16"):
        with pytest.raises(MediaError, match=f"has mode {mode}; .*do_convert_rgb is false"):
            load_image(Image.new(mode, (3, 2)), convert=False)
    clear = Image.new("RGBA", (2, 3), (255, 7, 0, 0))  # a file is opened as RGB, not laid on white
    assert load_image(encoded(clear), convert=False).getpixel((0, 0)) == (255, 7, 0)
    indexed = clear.convert("RGB").quantize(2)
    indexed.info["transparency"] = indexed.getpixel((0, 0))
    assert load_image(encoded(indexed), convert=False).getpixel((0, 0)) == (255, 7, 0)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(PipesWarning, match="holds several pictures, the first is taken; give it as"):
        assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        ("", "an empty text names no file"),
        (b"not a picture", "13 bytes cannot be read"),
        (encoded(picture(50, 50))[:500], "cannot be decoded"),
        ("/nowhere/x.png", "'/nowhere/x.png': no such file"),
        ("\x00", "cannot be the name of a file"),
        ("file:///no%20where.png", "'file:///no%20where.png': no such file"),
        ("file://host/x.png", "a file of another machine"),
        (str(Path(__file__).parent), "is a folder; name its files, or give frames as a video"),
        (b'<?xml version="1.0"?>\n<svg width="9"/>', "SVG drawing; have a browser or rsvg-convert"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isommp42", "is a film; give it as a video"),
        ("ftp://x/y.png", "only http, https and data"),
        ("http://[::1", "only http, https and data"),
        ("data:image/png;base64,@@", "base64"),
        (np.zeros((2, 2, 2), np.uint8), r"array uint8 \[2, 2, 2\]"),
        (np.full((2, 2, 3), 200.0), "between 0 and 1"),
        (np.zeros((0, 2, 3), np.uint8), "2x0"),
        (3, "int object"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
    ],
)
def test_unusable_source_is_named(source, message) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)


def test_limits(monkeypatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(MediaError, match="7x3 = 21 pixels; the limit is 20"):
        load_image(encoded(picture(7, 3)))
    with pytest.raises(MediaError, match="only http"):
        load_image("a.png", Access(local_files=False))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~$report.png", r"'~\$report.png': no such file"),
        ("~no-such-user/a.png", "no such file"),
        ("a" * 300 + ".png", "cannot be opened \\(File name too long"),
        ("/dev/zero", "is a device$"),
        ("/tmp", "is a folder; name its files"),
        ("a\x00b", "cannot be the name"),
    ],
)
def test_names_that_no_file_has(name, message) -> None:
    for source in (name, Path(name)):
        with pytest.raises(MediaError, match=message) as caught:
            load_image(source)
        assert len(str(caught.value)) < 300


def test_a_lock_file_of_office_is_a_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(3, 2).save("~$a.png")
    assert load_image("~$a.png").size == (3, 2)


def test_a_file_of_any_size_is_refused_unread(tmp_path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(40 * 2**30)  # a hole: it takes no room
    with pytest.raises(MediaError, match="42949672960 bytes; the limit is 1073741824"):
        load_image(path)


def test_hash_is_of_content_shape_dtype_and_settings() -> None:
    pixels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    same = image_hash(np.asfortranarray(pixels), "a")
    assert image_hash(pixels, "a") == same
    others = [
        image_hash(pixels, "b"),
        image_hash(pixels.reshape(3, 2, 4), "a"),
        image_hash(pixels.view(np.int32), "a"),
        image_hash(pixels + 1, "a"),
    ]
    assert len({same, *others}) == 5
    assert all(0 <= value < 2**63 for value in (same, *others))
