"""Files that Pillow does not read: HEIC, through libheif, and others that are named as such."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from mlx_vlm_pipes.errors import MediaError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
AVIF_BRANDS = (b"avif", b"avis")
FILM_HEADS = (b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS")  # matroska and webm, flash, ogg


def is_heif(data: bytes) -> bool:
    """Whether bytes begin as a picture of an iPhone does; AVIF, which Pillow reads, is no HEIC."""
    brands = _brands(data)
    return any(b in HEIF_BRANDS for b in brands) and not any(b in AVIF_BRANDS for b in brands)


def open_heif(data: bytes, name: str, max_pixels: int) -> Image:
    """The main picture of a HEIC file, upright, of 8 bits.

    Raises: MediaError where pillow-heif (extra `heif`) is missing, for more than max_pixels, and
    for what libheif refuses.
    """
    try:
        import pillow_heif
    except ImportError as error:
        raise MediaError(
            f'{name} is a HEIC picture, which needs libheif; pip install "mlx-vlm-pipes[heif]"'
        ) from error
    try:
        file = pillow_heif.open_heif(io.BytesIO(data))
        width, height = file.size
        if width * height > max_pixels:
            raise MediaError(f"{name}: more than {max_pixels} pixels")
        return file.to_pillow()
    except MediaError:
        raise
    except Exception as error:
        reason = one_line(error)
        raise MediaError(f"{name} cannot be decoded as a picture: {reason}") from error


def foreign(data: bytes) -> str | None:
    """What bytes are that are no picture, and what to do with them, if they can be told."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<svg") or (
        head.startswith((b"<?xml", b"<!doctype svg")) and b"<svg" in head
    ):
        return "is an SVG drawing; have a browser or rsvg-convert draw it as PNG"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is a web page; give the address of the picture itself"
    is_riff_film = data[:4] == b"RIFF" and data[8:12] == b"AVI "
    is_mp4 = bool(_brands(data)) and not is_heif(data)
    if is_riff_film or data.startswith(FILM_HEADS) or is_mp4:
        return "is a film; give it as a video"
    return None


def _brands(data: bytes) -> list[bytes]:
    """The brands of an ISO media file, the major one first; none where it is no such file."""
    if data[4:8] != b"ftyp":
        return []
    end = min(int.from_bytes(data[:4], "big"), 256, len(data))
    return [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]
