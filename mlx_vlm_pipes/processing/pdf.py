"""Pages of a PDF as pictures, through PDFium (extra `pdf`).

A few hundred bytes of PDF can ask for hours and gigabytes, and PDFium is a large library in C++: it
runs in a process of its own for each page, within limits of time and memory (0.1 s to start one).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mlx_vlm_pipes.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PAGES = 32  # that are taken of one document at once
DPI = 150  # a page of A4 has 1240 x 1754 pixels
MAX_PAGE_PIXELS = 2**24  # larger pages are drawn at fewer dots an inch
MAX_PDF_BYTES = 2**28
MAX_SECONDS = 30.0  # for a page
MAX_MEMORY_BYTES = 2**31
RUN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from mlx_vlm_pipes.processing.draw_pdf import main; main()"
)


@dataclass(frozen=True)
class Page:
    """One page of a document, drawn when it is loaded. number: from 1."""

    data: bytes = field(repr=False)
    number: int
    name: str


def is_pdf(data: bytes) -> bool:
    """Whether bytes begin as a PDF; some have a few others before."""
    return b"%PDF-" in data[:1024]


def chosen_pages(data: bytes, name: str, choice: tuple[int, int] | None) -> range:
    """The numbers of the pages from the first to the last of a choice, or of all.

    Raises: MediaError for a document that cannot be opened, a page that it does not have, and more
    than MAX_PAGES.
    """
    count = int(_run(data, 0, name))
    first, last = choice or (1, count)
    if not 1 <= first <= last <= count:
        asked = f"page {first}" if first == last else f"pages {first} to {last}"
        raise MediaError(f"{name} is a PDF of {count} pages; it has no {asked}")
    if last - first >= MAX_PAGES:
        raise MediaError(
            f"{name} is a PDF of {count} pages, of which at most {MAX_PAGES} are taken at once; "
            f"name them behind it, as #page=1-{MAX_PAGES}"
        )
    return range(first, last + 1)


def only_page(data: bytes, name: str) -> Page:
    """For a PDF that nothing announced. Raises: MediaError if it has several, or none."""
    pages = chosen_pages(data, name, None)
    if len(pages) > 1:
        raise MediaError(
            f"{name} is a PDF of {len(pages)} pages; name them behind it, as #page=1-{len(pages)}"
        )
    return Page(data, 1, name)


def draw(page: Page) -> Image:
    """The page as an RGB picture on white, at DPI or what MAX_PAGE_PIXELS leaves of it.

    Raises: MediaError for a page that cannot be drawn, or not within the limits.
    """
    from PIL import Image as pil

    made = _run(page.data, page.number, f"{page.name}, page {page.number},")
    head, _, pixels = made.partition(b"\n")
    width, height = map(int, head.split())
    return pil.frombytes("RGB", (width, height), pixels)


def _run(data: bytes, number: int, name: str) -> bytes:
    """What `draw_pdf` writes. Raises: MediaError, also where the extra is missing."""
    if find_spec("pypdfium2") is None:
        raise MediaError(
            f'{name} is a PDF, whose pages need PDFium; pip install "mlx-vlm-pipes[pdf]"'
        )
    if len(data) > MAX_PDF_BYTES:
        raise MediaError(f"{name} has {len(data)} bytes; the limit of a PDF is {MAX_PDF_BYTES}")
    limits = map(str, (number, DPI, MAX_PAGE_PIXELS, MAX_MEMORY_BYTES))
    command = [sys.executable, "-I", "-c", RUN, json.dumps(sys.path), *limits]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        raise MediaError(
            f"{name} takes PDFium longer than {MAX_SECONDS:.0f} s; give it as a picture"
        ) from None
    except OSError as error:
        raise MediaError(f"{name}: no process can be started for it ({error.strerror})") from None
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.decode(errors="replace").split("\n")
    reason = " ".join(said[0].split())[:200] if done.returncode == 1 else "PDFium gave up"
    hint = "; remove its password" if "password" in reason.lower() else ""
    raise MediaError(f"{name} cannot be read as a PDF: {reason}{hint}")
