"""Names of files in a line of text, as terminals write them when a file is dragged in.

Terminals write an absolute path with a backslash before each space, one in quotes, a file: URL, or
the bare name, spaces and all. What is named must be there: that tells a path from other words.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_vlm_pipes.paths import user_path

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif",
    ".pdf", ".jp2", ".ico", ".tga", ".qoi", ".ppm",
)  # fmt: skip
VIDEO_SUFFIXES = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".flv", ".3gp", ".ts",
)  # fmt: skip
MAX_WORDS = 16  # of a bare name with spaces
MAX_NAME_CHARS = 4096  # longer than any path may be
_START = re.compile(r"""(?<!\S)(?=['"]?(?:/|~/|file:/))""")
_QUOTED = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+""")
_ESCAPED = re.compile(r"(?:\\.|[^\s\\])+")
_PIECE = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)|([^'"\\]+)""")


@dataclass(frozen=True)
class Named:
    """A file that stands in a line from start to end."""

    path: Path
    start: int
    end: int


def dropped_files(line: str) -> tuple[str, list[Path]]:
    """The line without the pictures and clips that it names, and these.

    Only what is absolute, from the home folder or a file: URL, and of a known suffix, counts.
    """
    found: list[Named] = []
    for match in _START.finditer(line):
        named = file_at(line, match.start())
        is_new = named is not None and (not found or named.start >= found[-1].end)
        if named is not None and is_new and is_media(named.path):
            found.append(named)
    pieces, end = [], 0
    for named in found:
        pieces.append(line[end : named.start])
        end = named.end
    words = [piece.strip() for piece in [*pieces, line[end:]]]
    return " ".join(word for word in words if word), [named.path for named in found]


def leading_files(text: str) -> tuple[list[Path], str]:
    """The files that a text begins with, relative names too, and the rest.

    The first may be of any kind, those behind it are pictures and clips by their suffixes.
    """
    paths: list[Path] = []
    text = text.strip()
    while text and (named := file_at(text, 0)) is not None:
        if paths and not is_media(named.path):
            break
        paths.append(named.path)
        text = text[named.end :].strip()
    return paths, text


def first_word(text: str) -> str:
    """The first word of a text, as a shell reads it: what was meant to be a file's name."""
    match = _QUOTED.match(text)
    return _unquoted(match[0]) if match else text.split(maxsplit=1)[0]


def file_at(text: str, start: int) -> Named | None:
    """The file or folder whose name begins there, the longest of the ways to read it."""
    for name, end in _readings(text, start):
        path = user_path(_from_url(name))
        if 0 < len(name) <= MAX_NAME_CHARS and _is_there(path):
            return Named(path, start, end)
    return None


def is_media(path: Path) -> bool:
    return path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)


def is_clip(path: Path) -> bool:
    """Whether a dragged file is one of several pictures: a film, or an animated GIF."""
    if path.suffix.lower() != ".gif":
        return path.suffix.lower() in VIDEO_SUFFIXES
    from PIL import Image

    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # whoever reads it as a picture says what is wrong
        return False


def _readings(text: str, start: int) -> Iterator[tuple[str, int]]:
    """(name, end): bare with spaces, longest first; quoted; escaped; both without a full stop."""
    ends = [match.start() for match in re.finditer(r"\s|$", text[start:])]
    for end in reversed(ends[1:MAX_WORDS]):
        yield text[start : start + end], start + end
    for pattern, plain in ((_QUOTED, _unquoted), (_ESCAPED, _unescaped)):
        word = pattern.match(text, start)
        if word is not None:
            name = plain(word[0])
            shorter = name.rstrip(".,;:!?)")
            yield name, word.end()
            yield shorter, word.end() - (len(name) - len(shorter))


def _unquoted(word: str) -> str:
    """A word as a shell reads it: 'it'\\''s' is it's."""
    pieces = []
    for single, double, escaped, plain in _PIECE.findall(word):
        pieces.append(single or _unescaped(double) or escaped or plain)
    return "".join(pieces)


def _unescaped(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word)


def _from_url(name: str) -> str:
    if not name.lower().startswith("file:"):
        return name
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(name).path)
    except ValueError:  # such as file://[
        return name


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or no name at all
        return False
