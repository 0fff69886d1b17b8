"""Documents among the pictures of a request: each stands for its pages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlx_vlm_pipes.errors import MediaError
from mlx_vlm_pipes.processing.fetch import Access, is_url
from mlx_vlm_pipes.processing.images import describe, read_bytes
from mlx_vlm_pipes.processing.pdf import Document, is_pdf

CHOICE = re.compile(r"#page=(\d{1,7})(?:-(\d{1,7}))?$")  # as PDF viewers take it
DATA_URL = re.compile(r"data:application/pdf|data:[^,]{0,80};base64,JVBERi0", re.IGNORECASE)


Choice = tuple[int, int]  # the first and the last page


def spread(source: Any, access: Access, choice: Choice | None = None) -> list[Any]:
    """A picture as it is; a PDF as its pages, in order.

    A PDF is known by its name, its data URL or its first bytes. `#page=3` or `#page=2-5` behind a
    name chooses, as choice does.
    Raises: MediaError for a page that is not there, too many of them, and as `read_bytes`.
    """
    base = source
    if choice is None:
        base, choice = _chosen(source, access)
    if choice is None and not _is_document(source):
        return [source]
    data = read_bytes(base, access)
    if is_pdf(data):
        return [*Document(data, describe(base)).pages(choice)]
    if choice is None:
        return [source]
    raise MediaError(f"{describe(source)}: only a PDF has pages to choose from")


def split_choice(name: str) -> tuple[str, Choice | None]:
    """A name, and the pages that are chosen behind it."""
    found = CHOICE.search(name)
    if found is None:
        return name, None
    return name[: found.start()], (int(found[1]), int(found[2] or found[1]))


def _chosen(source: Any, access: Access) -> tuple[Any, Choice | None]:
    """What a source names, and the pages that it chooses of that."""
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    base, choice = split_choice(text) if isinstance(text, str) else (source, None)
    if choice is None or (access.local_files and os.path.exists(str(text))):
        return source, None
    return base if isinstance(source, str) else Path(base), choice


def _is_document(source: Any) -> bool:
    """Whether a source is a PDF by what can be seen of it beforehand."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return is_pdf(bytes(source[:1024]))
    if isinstance(source, str) and DATA_URL.match(source):
        return True
    named = isinstance(source, (str, os.PathLike))
    name = os.fspath(source) if named else getattr(source, "name", None)
    if not isinstance(name, str):
        return False
    path = urlsplit(name).path if is_url(name) else name
    return path.lower().endswith(".pdf")
