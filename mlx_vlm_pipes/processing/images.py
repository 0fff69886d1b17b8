"""Loading pictures from whatever people hold: paths, bytes, URLs, arrays, PIL images.

All end as RGB images, upright, with transparency on white, as the processors of transformers 5
make them.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mlx_vlm_pipes.errors import MediaError, PipesWarning
from mlx_vlm_pipes.paths import user_path
from mlx_vlm_pipes.processing import pdf
from mlx_vlm_pipes.processing.fetch import Access, fetch, file_path, is_url
from mlx_vlm_pipes.processing.formats import foreign, is_heif, open_heif

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_PIXELS = 178_956_970  # where Pillow itself refuses
MAX_FILE_BYTES = 2**30  # of a picture: as many pixels, uncompressed and 16 bits deep, take less
ANYWHERE = Access()
ORIENTATION = 0x0112  # the EXIF tag
TURNED = "original_orientation"  # where pillow-heif leaves it, having turned the picture itself
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
DEEP_PICTURE = (
    "grey pictures of more than 8 bits are cut off at 255, as transformers does: most of them"
    " becomes white; divide them by 257 first"
)
# Formats whose decoders are Pillow's own or well kept C libraries; EPS would start Ghostscript.
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF", "JPEG2000", "ICO", "TGA",
    "QOI", "DIB", "PCX", "SGI",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An RGB picture, upright. orientation: the EXIF value that it was stored with, 1 to 8."""

    image: Image
    orientation: int = 1

    @property
    def source_size(self) -> tuple[int, int]:
        """(width, height) as stored."""
        width, height = self.image.size
        return (height, width) if self.orientation >= 5 else (width, height)


def load_image(source: Any, access: Access = ANYWHERE, *, convert: bool = True) -> Image:
    """One picture as an RGB PIL image; arguments and errors as `load_picture`."""
    return load_picture(source, access, convert=convert).image


def load_picture(source: Any, access: Access = ANYWHERE, *, convert: bool = True) -> Picture:
    """One picture as RGB, and how it was stored.

    Args: source, a path, an http(s), file: or data: URL, bytes, a binary file object, a PIL image,
    a page of a PDF, or an array of numpy, MLX or the like: uint8 [H, W], [H, W, 1], [H, W, 3] or
    [H, W, 4], or floats from 0 to 1. Animations give their first frame, with a warning; EXIF
    orientation is applied. access: what a text may name.
    convert: False does as transformers where `do_convert_rgb` is false: files lose their
    transparency, pictures and arrays give their three channels whatever these mean.
    Raises: MediaError naming the source.
    """
    from PIL import Image as pil

    source = source if isinstance(source, pil.Image) else as_array(source)
    name = describe(source)
    if isinstance(source, (pil.Image, np.ndarray)):
        image = _from_array(source) if isinstance(source, np.ndarray) else source
        orientation = _orientation(image, name)
        rgb = to_rgb(image, name) if convert else _three_channels(image, name)
        return Picture(rgb, orientation)
    if isinstance(source, pdf.Page):
        return Picture(pdf.draw(source))
    data = read_bytes(source, access)
    if pdf.is_pdf(data):
        return Picture(pdf.draw(pdf.Document(data, name).only_page()))
    image = open_image(data, name)
    warn_of_more(image, name)
    orientation = _orientation(image, name)  # decoding a TIFF turns it and drops the tag
    rgb = to_rgb(image, name) if convert else _decoded(image, name).convert("RGB")
    return Picture(rgb, orientation)


def as_array(source: Any) -> Any:
    """An array of another library (MLX's, by numpy's own protocol) as numpy's; else the source.

    Raises: MediaError for an array that numpy cannot hold, as of bfloat16.
    """
    if isinstance(source, np.ndarray) or not callable(getattr(source, "__array__", None)):
        return source
    try:
        return np.asarray(source)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise MediaError(
            f"{type(source).__name__} object cannot be read as an array ({reason}); give uint8 or "
            "float32"
        ) from error


def warn_of_more(image: Image, name: str) -> None:
    """Warn where a file holds more than the one picture that is taken."""
    if image.format == "MPO":  # a photo, and what its camera keeps beside it
        return
    try:
        is_several = bool(getattr(image, "is_animated", False))
    except Exception:  # its first frame may still be whole
        return
    if is_several:
        hint = "split it" if image.format == "TIFF" else "give it as a video for all of them"
        warnings.warn(
            f"{name} holds several pictures, the first is taken; {hint}", PipesWarning, stacklevel=1
        )


def read_bytes(source: Any, access: Access = ANYWHERE) -> bytes:
    """The bytes behind a path, URL, bytes or file object. Raises: MediaError naming the source."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, str) and is_url(source):
        return fetch(source, allow_private=access.allow_private)
    if isinstance(source, (str, os.PathLike)):
        return read_file(local_file(source, access), describe(source))
    if callable(getattr(source, "read", None)):
        try:
            data = source.read()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise MediaError(f"{describe(source)} cannot be read: {reason}") from error
        if isinstance(data, bytes):
            return data
    raise MediaError(
        f"{describe(source)} is not a picture; give a path, URL, bytes, PIL image or array"
    )


def open_image(data: bytes, name: str) -> Image:
    """Decode the header of a picture. Raises: MediaError if it is no picture, or too large."""
    from PIL import Image as pil

    if not data:
        raise MediaError(f"{name} is empty")
    if is_heif(data):
        return open_heif(data, name, MAX_IMAGE_PIXELS)
    pil.init()
    known = [kind for kind in FORMATS if kind in pil.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pil.DecompressionBombWarning)
            image = pil.open(io.BytesIO(data), formats=known)
    except pil.DecompressionBombError as error:
        raise MediaError(f"{name}: more than {MAX_IMAGE_PIXELS} pixels") from error
    except Exception as error:
        what = foreign(data) or "cannot be read as a picture"
        raise MediaError(f"{name} {what}") from error
    check_size(image.size, name)
    return image


def check_size(size: tuple[int, int], name: str) -> None:
    """Raises: MediaError for an empty picture or one of more than MAX_IMAGE_PIXELS."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name} is {width}x{height} pixels; expected at least 1x1")
    if width * height > MAX_IMAGE_PIXELS:
        raise MediaError(
            f"{name} is {width}x{height} = {width * height} pixels; "
            f"the limit is {MAX_IMAGE_PIXELS}, make it smaller"
        )


def to_rgb(image: Image, name: str) -> Image:
    """Upright RGB; transparency composited on white.

    Raises: MediaError if the pixels cannot be decoded. Source: transformers image_transforms.py,
    convert_to_rgb.
    """
    from PIL import Image as pil

    image = _decoded(image, name)
    try:
        if image.mode in DEEP_MODES and _reaches_beyond_bytes(image):
            warnings.warn(DEEP_PICTURE, PipesWarning, stacklevel=1)  # one place: said once
        if image.mode == "RGB" and image.info.get("transparency") is None:
            return image
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = pil.new("RGBA", image.size, (255, 255, 255, 255))
            return pil.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except Exception as error:
        raise _undecodable(name, error) from error


def _three_channels(image: Image, name: str) -> Image:
    """Raises: MediaError for another number of channels, as transformers fails there."""
    from PIL import Image as pil

    image = _decoded(image, name)
    if len(image.getbands()) != 3:
        raise MediaError(
            f"{name} has mode {image.mode}; this checkpoint takes pictures as they are "
            "(do_convert_rgb is false), convert it to RGB"
        )
    return pil.frombytes("RGB", image.size, image.tobytes())


def _decoded(image: Image, name: str) -> Image:
    """All pixels, upright. Raises: MediaError if they cannot be decoded."""
    from PIL import ImageOps

    check_size(image.size, name)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise anything from OSError to SyntaxError
        raise _undecodable(name, error) from error


def _orientation(image: Image, name: str) -> int:
    """The EXIF orientation, 1 where none is named. Raises: MediaError for EXIF without sense."""
    check_size(image.size, name)  # reading the tag of a PNG decodes it
    try:
        value = image.info.get(TURNED) or image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # the same parsers, and errors, as in decoding
        raise _undecodable(name, error) from error
    return value if value in range(1, 9) else 1


def _undecodable(name: str, error: Exception) -> MediaError:
    reason = " ".join(str(error).split())[:120]
    return MediaError(f"{name} cannot be decoded as a picture: {reason}")


def _reaches_beyond_bytes(image: Image) -> bool:
    _, highest = image.getextrema()
    return isinstance(highest, (int, float)) and highest > 255


def describe(source: Any) -> str:
    """A short name of a source for error messages, never its content."""
    if isinstance(source, str):
        is_data = source[:5].lower() == "data:"
        return f"data URL of {len(source)} characters" if is_data else _quoted(source)
    if isinstance(source, os.PathLike):
        return _quoted(str(os.fspath(source)))
    if isinstance(source, (bytes, bytearray)):
        return f"picture of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"array {source.dtype} {list(source.shape)}"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    if isinstance(name, str) and name:
        return _quoted(name)
    return f"{type(source).__name__} object"


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:100]}...{name[-97:]}")


def local_file(source: str | os.PathLike[str], access: Access) -> Path:
    """A path, or file: URL, that a user names. Raises: MediaError where no text may name one."""
    if not isinstance(source, str):
        return user_path(source)
    if not access.local_files:
        raise MediaError(f"{describe(source)}: only http(s) and data: URLs are allowed here")
    if not source:
        raise MediaError("an empty text names no file")
    path = file_path(source)
    return user_path(source) if path is None else Path(path)


def read_file(path: Path, name: str) -> bytes:
    """Raises: MediaError as `open_file`, and above MAX_FILE_BYTES."""
    with open_file(path, name) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise MediaError(f"{name} has {size} bytes; the limit is {MAX_FILE_BYTES}")
            return file.read()
        except OSError as error:
            raise MediaError(f"{name} cannot be read ({error.strerror})") from error


def open_file(path: Path, name: str) -> BinaryIO:
    """A regular file, to read from. Raises: MediaError naming it, with what the system says."""
    try:
        file = path.open("rb") if stat.S_ISREG(os.stat(path).st_mode) else None
    except FileNotFoundError as error:
        raise MediaError(f"{name}: no such file") from error
    except OSError as error:
        raise MediaError(f"{name} cannot be opened ({error.strerror})") from error
    except ValueError as error:
        raise MediaError(f"{name} cannot be the name of a file") from error
    if file is None:
        kind = (
            "a folder; name its files, or give frames as a video" if path.is_dir() else "a device"
        )
        raise MediaError(f"{name} is {kind}")
    return file


def _from_array(array: np.ndarray) -> Image:
    from PIL import Image as pil

    name = describe(array)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise MediaError(f"{name}: expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    check_size((array.shape[1], array.shape[0]), name)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise MediaError(f"{name}: floats must lie between 0 and 1; divide by 255")
        array = np.round(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
            raise MediaError(f"{name}: expected uint8, or floats from 0 to 1")
        array = array.astype(np.uint8)
    return pil.fromarray(np.ascontiguousarray(array))
