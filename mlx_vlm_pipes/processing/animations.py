"""How many frames an animated GIF, WebP or PNG has, how large, and how long each stands.

Read from the containers' headers alone: a picture library decodes a frame to tell its duration,
and a file of a megabyte can hold gigabytes of frames.
Source: GIF89a specification; APNG specification; WebP container specification.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

GIF_IMAGE, GIF_EXTENSION, GIF_CONTROL = 0x2C, 0x21, 0xF9
PNG_HUNDREDTHS = 100  # what a denominator of 0 stands for


@dataclass(frozen=True)
class Animation:
    """durations_ms: of each frame, 0 where none is named. width, height: of the largest frame."""

    durations_ms: list[float]
    width: int
    height: int

    @property
    def num_pixels(self) -> int:
        """Pixels of all frames."""
        return len(self.durations_ms) * self.width * self.height


def is_animation(head: bytes) -> bool:
    """Whether a file that begins with these 12 bytes may be one; a still picture is one frame."""
    return head[:4] in (b"GIF8", b"\x89PNG") or head[8:12] == b"WEBP"


def read_animation(data: bytes, size: tuple[int, int]) -> Animation:
    """Args: size, (width, height) that the picture library reads. A cut file ends where it does."""
    if data[:4] == b"GIF8":
        return _read_gif(data, size)
    frames = _png_durations(data) if data[:4] == b"\x89PNG" else _webp_durations(data)
    return Animation(list(frames) or [0.0], *size)


def _read_gif(data: bytes, size: tuple[int, int]) -> Animation:
    """A frame that reaches beyond the screen makes the picture larger."""
    width, height = size
    durations: list[float] = []
    delay_ms, at = 0.0, 13
    if data[10] & 0x80:
        at += 3 << (data[10] & 7) + 1
    while at + 10 <= len(data) and data[at] in (GIF_IMAGE, GIF_EXTENSION, 0):
        if data[at] == GIF_EXTENSION:
            if data[at + 1] == GIF_CONTROL:
                delay_ms = 10.0 * int.from_bytes(data[at + 4 : at + 6], "little")
            at = _after_blocks(data, at + 2)
        elif data[at] == GIF_IMAGE:
            left, top, wide, high, flags = struct.unpack_from("<4HB", data, at + 1)
            width, height = max(width, left + wide), max(height, top + high)
            durations.append(delay_ms)
            palette = 3 << (flags & 7) + 1 if flags & 0x80 else 0
            delay_ms, at = 0.0, _after_blocks(data, at + 11 + palette)
        else:
            at += 1
    return Animation(durations or [0.0], width, height)


def _after_blocks(data: bytes, at: int) -> int:
    """Where a chain of sub-blocks ends: each has its length in front, an empty one is the last."""
    while at < len(data) and data[at]:
        at += data[at] + 1
    return at + 1


def _png_durations(data: bytes) -> Iterator[float]:
    """Frames by their control chunks; data in front of the first control is a frame by itself."""
    remaining, begun = 0, False
    for kind, body in _chunks(data, 8, ">I4s", 12):
        if kind == b"acTL" and body + 4 <= len(data):
            (remaining,) = struct.unpack_from(">I", data, body)
        elif kind == b"IDAT" and remaining and not begun:
            begun = True
            yield 0.0
        elif kind == b"fcTL" and remaining and body + 26 <= len(data):
            begun, remaining = True, remaining - 1
            delay, per_second = struct.unpack_from(">HH", data, body + 20)
            yield delay / (per_second or PNG_HUNDREDTHS) * 1000


def _webp_durations(data: bytes) -> Iterator[float]:
    for kind, body in _chunks(data, 12, "<4sI", 8):
        if kind == b"ANMF" and body + 16 <= len(data):
            yield float(int.from_bytes(data[body + 12 : body + 15], "little"))


def _chunks(data: bytes, at: int, head: str, overhead: int) -> Iterator[tuple[bytes, int]]:
    """(kind, offset of its body) of PNG's or RIFF's chunks; RIFF pads a body to an even length."""
    while at + 8 <= len(data):
        first, second = struct.unpack_from(head, data, at)
        kind, length = (first, second) if isinstance(first, bytes) else (second, first)
        yield kind, at + 8
        padding = length % 2 if overhead == 8 else 0
        at += overhead + length + padding
