"""Pictures beyond what Pillow reads: pages of PDFs, HEIC, arrays of MLX, files by URL."""

import base64
import io
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes import load
from mlx_vlm_pipes.errors import InputError, MediaError
from mlx_vlm_pipes.processing import pdf
from mlx_vlm_pipes.processing.fetch import Access
from mlx_vlm_pipes.processing.images import load_image
from mlx_vlm_pipes.processing.messages import conversation
from mlx_vlm_pipes.processing.pages import spread
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import ClipPlan, load_clip
from tests.processing.folders import picture

COLOURS = ("red", "green", "blue")
HERE = Access()


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PDF of three pages of 1.5 x 1 inches, each of one colour."""
    path = tmp_path_factory.mktemp("pdf") / "three pages.pdf"
    pages = [Image.new("RGB", (108, 72), colour) for colour in COLOURS]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def numbers(source: Any, access: Access = HERE) -> list[int]:
    return [page.number for page in spread(source, access)]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_page_is_drawn_at_150_dots_an_inch(document: Path) -> None:
    for page, colour in zip(spread(document, HERE), COLOURS, strict=True):
        image = load_image(page)
        assert (image.mode, image.size) == ("RGB", (225, 150))
        expected = np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))
        assert abs(np.asarray(image).astype(int) - expected).max() <= 2  # the file holds a JPEG


def test_a_document_stands_for_its_pages(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, b"3\n", b"")
    monkeypatch.setattr(pdf, "_run", lambda *_: done)  # a process for each takes its time
    data = document.read_bytes()
    url = "data:application/pdf;base64," + base64.b64encode(data).decode()
    with document.open("rb") as file:
        for source in (document, str(document), document.as_uri(), data, url, file):
            assert numbers(source) == [1, 2, 3], source
    assert numbers(f"{document}#page=2") == [2]
    assert numbers(Path(f"{document}#page=2-3")) == [2, 3]
    assert numbers(document.as_uri() + "#page=1-2") == [1, 2]
    assert spread("cat.png", HERE) == ["cat.png"]
    literal = document.with_name("x.png#page=2")
    literal.write_bytes(encoded(picture(3, 2), "PNG"))
    assert spread(str(literal), HERE) == [str(literal)]


def test_pages_take_the_place_of_their_picture(document: Path) -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "x"}
    source = {"type": "base64", "media_type": "application/pdf", "data": ""}
    source["data"] = base64.b64encode(document.read_bytes()).decode()
    turns = [{"role": "user", "content": [{"type": "document", "source": source}, image, text]}]
    found = conversation(PromptRequest(turns, images=["a.png"]))
    assert found.messages[0]["content"] == [image, image, image, image, text]
    assert [getattr(s, "number", s) for s in found.images] == [1, 2, 3, "a.png"]
    for parts in (1, 3):  # one for the document, or one for each page
        turns = [{"role": "user", "content": [image] * parts + [text]}]
        found = conversation(PromptRequest(turns, images=[document]))
        assert found.messages[0]["content"] == [image, image, image, text]
    with pytest.raises(InputError, match="3 images for 2 image parts"):
        conversation(PromptRequest([{"role": "user", "content": [image] * 2}], images=[document]))


def test_unusable_documents_are_named(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, png = document.read_bytes(), encoded(picture(3, 2), "PNG")

    def refused(source: Any, access: Access = HERE) -> str:
        with pytest.raises(MediaError) as caught:
            [load_image(page) for page in spread(source, access)]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is a PDF of 3 pages; it has no pages 3 to 4" in refused(f"{document}#page=3-4")
    assert "is a PDF of 3 pages; name them behind it, as #page=1-3" in refused(io.BytesIO(data))
    assert "cannot be read as a PDF: Failed to load document" in refused(data[:400])
    assert "no such file" in refused("no.pdf#page=2")
    assert "only http(s) and data: URLs" in refused(str(document), Access(local_files=False))
    assert "only http(s) and data: URLs" in refused(document.as_uri(), Access(local_files=False))
    (document.parent / "a.png").write_bytes(png)
    assert "only a PDF has pages" in refused(f"{document.parent / 'a.png'}#page=1")
    monkeypatch.setattr(pdf, "MAX_PAGES", 2)
    assert "of which at most 2 are taken at once; name them" in refused(document)
    with pytest.raises(MediaError, match="takes PDFium too long to draw; give it as a picture"):
        pdf.Document(data, "x", seconds=0.001).pages(None)
    monkeypatch.setattr(pdf, "MAX_REQUEST_PAGES", 1)
    with load() as pipe, pytest.raises(MediaError, match="2 pages of documents; a request may"):
        pipe.encode("x", images=[f"{document}#page=1-2"])
    monkeypatch.setattr(pdf, "MAX_PDF_BYTES", 9)
    assert "the limit of a PDF is 9" in refused(data)
    monkeypatch.setattr(pdf, "find_spec", lambda name: None)
    assert 'pip install "mlx-vlm-pipes[pdf]"' in refused(data)


def one_page(box: str, drawing: str) -> bytes:
    """A PDF with a page that is so large, and draws itself so; its table of objects is left out."""
    return (
        "%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        "2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        f"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[{box}]/Contents 4 0 R"
        "/Resources<</XObject<</I 4 0 R>>>>>>endobj\n"
        f"4 0 obj<</Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</XObject<</I 4 0 R>>>>"
        f"/Length {len(drawing)}>>stream\n{drawing}\nendstream endobj\n"
        "trailer<</Root 1 0 R>>\n%%EOF"
    ).encode()


def test_a_page_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "MAX_PAGE_PIXELS", 2**16)
    wide = load_image(one_page("0 0 14400 7200", "0 0 99 99 re f"))
    assert 2**15 < wide.width * wide.height <= 1.01 * 2**16
    assert wide.width == pytest.approx(2 * wide.height, abs=2)


@pytest.mark.slow
def test_a_page_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "MAX_MEMORY_BYTES", 2**29)
    with pytest.raises(MediaError, match=r"gave up|too long"):
        load_image(one_page("0 0 9 9", "/I Do " * 40))  # draws itself, forty times each time


def test_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken upright: turn it by 90 degrees to the right
    data = io.BytesIO()
    heif.from_pillow(image).save(data, exif=exif.tobytes(), quality=100)
    found = load_image(data.getvalue())
    assert found.size == (20, 40)
    top, bottom = found.getpixel((10, 3)), found.getpixel((10, 36))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert top[2] > 200 > 60 > top[0]
    assert bottom[0] > 200 > 60 > bottom[2]
    for cut in (300, 40):
        with pytest.raises(MediaError, match="cannot be decoded as a picture"):
            load_image(data.getvalue()[:-cut] if cut == 40 else data.getvalue()[:cut])
    monkeypatch.setattr("mlx_vlm_pipes.processing.images.MAX_IMAGE_PIXELS", 700)
    with pytest.raises(MediaError, match="more than 700 pixels"):
        load_image(data.getvalue())
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(MediaError, match=r'pip install "mlx-vlm-pipes\[heif\]"'):
        load_image(data.getvalue())


def test_every_way_to_give_one_picture(tmp_path: Path) -> None:
    image = picture(50, 30)
    path = tmp_path / "a b%.png"
    image.save(path)
    data = path.read_bytes()
    plain = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{plain}"
    anthropic = {"type": "base64", "media_type": "image/png", "data": plain}
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": image},
        {"type": "image", "image": np.asarray(image)},
        {"type": "image", "image": mx.array(np.asarray(image))},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "base64": plain},
        {"type": "image", "source": anthropic},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "input_file", "file_data": url},
        {"type": "file", "file": {"filename": "a.png", "file_data": url}},
        {"image": path},
    ]
    with load() as pipe:
        expected = pipe.encode("Hello", images=image).images[0].image_hash
        for part in parts:
            messages = [{"role": "user", "content": [part, {"type": "text", "text": "Hello"}]}]
            assert pipe.encode(messages).images[0].image_hash == expected, part["type"]
        floats = mx.array(np.asarray(image)).astype(mx.float32) / 255
        assert pipe.encode("Hello", images=io.BytesIO(data)).images[0].image_hash == expected
        given: list[Any] = [mx.array(np.asarray(image)), floats, data, path]
        for source in (*given, str(path), path.as_uri(), url):
            assert pipe.encode("Hello", images=source).images[0].image_hash == expected
            assert pipe.encode("Hello", images=[source]).images[0].image_hash == expected
        clip = mx.array(np.stack([np.asarray(image)] * 2))
        plan = ClipPlan(1.0, lambda _: np.arange(2), lambda frame, *_: frame)
        assert [frame.tobytes() for frame in load_clip(clip, plan).frames] == [image.tobytes()] * 2
        with pytest.raises(MediaError, match=r"bfloat16.*; give uint8 or float32"):
            pipe.encode("Hello", images=floats.astype(mx.bfloat16))
        for wrong in ({"type": "file", "file_id": "f"}, {"type": "text", "text": "hi"}):
            parts = [{"type": "image", "source": wrong}]
            with pytest.raises(InputError, match=r"a part's source has .* expected a url"):
                pipe.encode([{"role": "user", "content": parts}])
