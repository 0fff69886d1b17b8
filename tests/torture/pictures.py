"""Pictures and clips as people send them: drawn, stored in every form, and then damaged."""

from __future__ import annotations

import base64
import io
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODES = ["RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "F", "I", "YCbCr", "HSV", "LAB", "PA"]
SIDES = [1, 2, 7, 16, 28, 31, 48, 75, 97, 150]
# formats that keep a mode's pixels, so that the stored picture is the drawn one
KEEPS = {
    "PNG": ("RGB", "L", "LA", "P", "RGBA", "I;16", "1"), "TIFF": MODES[:11],
    "BMP": ("RGB", "L", "P", "1"), "GIF": ("L", "P"), "WEBP": ("RGB", "RGBA"),
    "JPEG": ("RGB", "L", "CMYK"), "PPM": ("RGB", "L"), "TGA": ("RGB", "L", "RGBA"),
}  # fmt: skip


def draw_picture(rng: random.Random, sides: list[int] = SIDES, mode: str = "RGB") -> Image.Image:
    """Noise or a gradient of a drawn size."""
    width, height = rng.choice(sides), rng.choice(sides)
    if rng.random() < 0.5:
        numbers = np.random.default_rng(rng.randrange(2**32))
        pixels = numbers.integers(0, 256, (height, width, 3), np.uint8)
    else:
        across = np.linspace(0, 255, width)[None, :, None] * np.array([1, 0.5, 0.1])
        pixels = np.broadcast_to(across, (height, width, 3)).astype(np.uint8)
    return in_mode(Image.fromarray(np.ascontiguousarray(pixels)), mode)


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L"), np.uint16))
    if mode == "LAB":
        return Image.frombytes("LAB", picture.size, picture.tobytes())
    if mode == "PA":
        return picture.convert("P").convert("PA")
    return picture.convert(mode)


def stored(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture.save(buffer, kind, **options)
    return buffer.getvalue()


def animated(rng: random.Random, kind: str) -> bytes:
    """A clip of a few frames."""
    sides = [rng.choice(SIDES[3:])]
    frames = [draw_picture(rng, sides) for _ in range(rng.randint(2, 6))]
    if kind == "GIF":
        frames = [frame.convert("P") for frame in frames]
    duration = rng.choice([0, 20, 100, 1000])
    return stored(frames[0], kind, save_all=True, append_images=frames[1:], duration=duration)


Form = Callable[[bytes, Path, random.Random], Any]


def _written(data: bytes, folder: Path, rng: random.Random) -> Path:
    path = folder / f"{rng.randrange(10**9)}{rng.choice(['.png', '.jpg', '', '.é', '.txt'])}"
    path.write_bytes(data)
    return path


def _link(data: bytes, folder: Path, rng: random.Random) -> Path:
    link = folder / f"link-{rng.randrange(10**9)}"
    link.symlink_to(_written(data, folder, rng))
    return link


def data_url(data: bytes, rng: random.Random) -> str:
    text = base64.b64encode(data).decode()
    if rng.random() < 0.3:
        text = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    kind = rng.choice(["image/png", "image/jpeg", "", "text/plain", "image/png;charset=x"])
    return (
        f"{rng.choice(['data', 'DATA', 'Data'])}:{kind};{rng.choice(['base64', 'BASE64'])},{text}"
    )


FORMS: dict[str, Form] = {
    "bytes": lambda data, folder, rng: data,
    "bytearray": lambda data, folder, rng: bytearray(data),
    "memoryview": lambda data, folder, rng: memoryview(data),
    "path": _written,
    "text": lambda data, folder, rng: str(_written(data, folder, rng)),
    "link": _link,
    "stream": lambda data, folder, rng: io.BytesIO(data),
    "file": lambda data, folder, rng: _written(data, folder, rng).open("rb"),
    "data URL": lambda data, folder, rng: data_url(data, rng),
}


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes after it."""
    kind = rng.choice(sorted(_DAMAGE))
    return kind, _DAMAGE[kind](data, rng)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed, reach = bytearray(data), rng.choice([64, len(data)])
    for _ in range(rng.randint(1, 12)):
        changed[rng.randrange(min(reach, len(changed)))] = rng.randrange(256)
    return bytes(changed)


def _moved(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data)), rng.randint(1, 40)
    return data[:at] + rng.randbytes(size) * rng.choice([0, 1]) + data[at + size :]


def _lying_size(data: bytes, rng: random.Random) -> bytes:
    """Another width and height where PNG, GIF and BMP keep theirs."""
    sides = [0, 1, 65535, 2**31 - 1, 2**32 - 1, 20000, 100_000]
    wide, high = rng.choice(sides), rng.choice(sides)
    if data[:4] == b"\x89PNG":
        head = b"IHDR" + struct.pack(">II", wide, high) + data[24:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    if data[:4] == b"GIF8":
        return data[:6] + struct.pack("<HH", wide % 65536, high % 65536) + data[10:]
    return data[:18] + struct.pack("<II", wide, high) + data[26:]


_DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "cut short": lambda data, rng: data[: -rng.randint(1, 20)],
    "flipped": _flipped,
    "moved": _moved,
    "lying size": _lying_size,
    "prefixed": lambda data, rng: rng.randbytes(rng.randint(1, 9)) + data,
    "tail": lambda data, rng: data + rng.randbytes(rng.randint(1, 5000)),
    "zeros": lambda data, rng: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "noise": lambda data, rng: rng.randbytes(len(data)),
    "another's head": lambda data, rng: rng.choice([b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF"])
    + data[8:],
    "empty": lambda data, rng: b"",
}  # fmt: skip


def png_bomb(side: int) -> bytes:
    """A black PNG of many pixels in few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + (side + 7) // 8) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif_bomb(frames: int, side: int) -> bytes:
    """Many large frames in few bytes: each says one pixel of a screen that is all copied."""
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = (
        b"\x21\xf9\x04\0\0\0\0\0"
        + b"\x2c"
        + struct.pack("<4HB", 0, 0, 1, 1, 0)
        + b"\x02\x02\x44\x01\0"
    )
    return head + frame * frames + b";"


class _Raising:
    def read(self) -> bytes:
        raise OSError("gone")


class _Saying:
    def read(self) -> str:
        return "text"


def _closed() -> io.BytesIO:
    stream = io.BytesIO(b"x")
    stream.close()
    return stream


# what is no picture, or no one should decode: by what it is
ODD: dict[str, Callable[[Path], Any]] = {
    "a FIFO": lambda folder: folder / "fifo",
    "a loop": lambda folder: folder / "loop",
    "40 GB": lambda folder: folder / "sparse.png",
    "a folder": lambda folder: folder / "pictures.png",
    "a text": lambda folder: folder / "text.png",
    "no file": lambda folder: folder / "none.png",
    "a read that raises": lambda folder: _Raising(),
    "a read that gives text": lambda folder: _Saying(),
    "a closed stream": lambda folder: _closed(),
    "a text stream": lambda folder: io.StringIO("x"),
    "a bomb of pixels": lambda folder: png_bomb(30_000),
    "a GIF of many frames": lambda folder: gif_bomb(20_000, 6000),
    "a GIF of small frames": lambda folder: gif_bomb(300_000, 10),
    "many empty bytes": lambda folder: bytes(10**6),
}
ODD_NAMES: dict[str, Any] = {
    "/dev/zero": "/dev/zero", "a long name": "x" * 300, "NUL": "a\0b.png",
    "half a character": "\ud800.png", "~$x.png": "~$x.png", "~nouser/x": "~nouser/x.png",
    "empty text": "", "a dot": ".", "a root": "/", "None": None, "5": 5,
    "a URL without host": "http://", "file URL": "file:///etc/passwd", "ftp": "ftp://x/y",
    "data without comma": "data:image/png;base64", "bad base64": "data:image/png;base64,@@@",
    "empty data URL": "data:,", "percent": "data:image/png,%89PNG", "a dict": {"url": "x"},
}  # fmt: skip


def odd_source(about: str, folder: Path) -> Any:
    """One of ODD or ODD_NAMES."""
    if about in ODD_NAMES:
        return ODD_NAMES[about]
    fifo, loop = folder / "fifo", folder / "loop"
    if not fifo.exists():
        os.mkfifo(fifo)
        loop.symlink_to(loop)
        with (folder / "sparse.png").open("wb") as file:
            file.truncate(40 * 2**30)
        (folder / "pictures.png").mkdir()
        (folder / "text.png").write_text("no picture")
    return ODD[about](folder)


def odd_arrays(rng: random.Random) -> tuple[str, np.ndarray]:
    """An array that may be a picture, and what it is."""
    shape = rng.choice([(8, 9), (8, 9, 1), (8, 9, 3), (8, 9, 4), (3, 8, 9), (8, 9, 2), (8,),
                        (), (0, 5, 3), (5, 0, 3), (1, 1, 3), (2, 8, 9, 3), (1, 2, 8, 9, 3),
                        ])  # fmt: skip
    kind = rng.choice(["u1", "bool", "f4", "f8", "f2", ">f4", "i8", ">u2", "i1", "c8", "O", "U1",
                       "M8[s]", "V3", "u8"])  # fmt: skip
    high = rng.choice([0, 1, 255, 256, -1, 2**15])
    array = np.full(shape, high % 2 if kind in ("bool", "U1", "V3") else 0).astype("O")
    if kind in ("U1", "V3", "M8[s]"):
        return f"array {kind} {shape}", np.zeros(shape, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = np.full(shape, float(high)).astype(kind)
        if kind.lstrip(">")[0] == "f" and rng.random() < 0.3 and array.size:
            array.flat[0] = rng.choice([np.nan, np.inf, -np.inf])
    about = f"array {kind} {shape} of {high}"
    if rng.random() < 0.3 and array.ndim > 1:
        return f"{about} reversed", array[::-1]
    return about, array
