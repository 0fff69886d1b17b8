"""Pages of a PDF as pictures, through PDFium (extra `pdf`).

A few hundred bytes of PDF can ask for hours and gigabytes, and PDFium is a large library in C++: it
runs in a process of its own for each page, within limits of time and memory (0.1 s to start one).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.errors import MediaError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PAGES = 32  # of one document at once
MAX_REQUEST_PAGES = 64  # of all documents of a request
DPI = 150  # a page of A4 has 1240 x 1754 pixels
MAX_PAGE_PIXELS = 2**24  # larger pages are drawn at fewer dots an inch
MAX_PDF_BYTES = 2**28
SECONDS, SECONDS_A_PAGE = 10.0, 2.0  # that all pages of a document may take together
MAX_MEMORY_BYTES = 2**31
RUN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from mlx_vlm_pipes.processing.draw_pdf import main; main()"
)


@dataclass(eq=False)
class Document:
    """A PDF; seconds: how long PDFium may still take for it."""

    data: bytes = field(repr=False)
    name: str
    seconds: float = SECONDS

    def pages(self, choice: tuple[int, int] | None) -> list[Page]:
        """The pages from the first to the last of a choice, or all.

        Raises: MediaError for a document that cannot be opened, a page that it does not have, and
        more than MAX_PAGES.
        """
        count = int(self.ask(0, self.name))
        first, last = choice or (1, count)
        if not 1 <= first <= last <= count:
            asked = f"page {first}" if first == last else f"pages {first} to {last}"
            raise MediaError(f"{self.name} is a PDF of {count} pages; it has no {asked}")
        if last - first >= MAX_PAGES:
            raise MediaError(
                f"{self.name} is a PDF of {count} pages, of which at most {MAX_PAGES} are taken at "
                f"once; name them behind it, as #page=1-{MAX_PAGES}"
            )
        numbers = range(first, last + 1)
        self.seconds += SECONDS_A_PAGE * len(numbers)
        return [Page(self, number) for number in numbers]

    def only_page(self) -> Page:
        """For a PDF that nothing announced. Raises: as `pages`, and if it has several."""
        pages = self.pages(None)
        if len(pages) > 1:
            raise MediaError(
                f"{self.name} is a PDF of {len(pages)} pages; name them behind it, as "
                f"#page=1-{len(pages)}"
            )
        return pages[0]

    def ask(self, number: int, title: str) -> bytes:
        """What `draw_pdf` writes of a page, or of the whole, 0.

        Raises: MediaError, also where the extra is missing.
        """
        if find_spec("pypdfium2") is None:
            raise MediaError(
                f'{title} is a PDF, whose pages need PDFium; pip install "mlx-vlm-pipes[pdf]"'
            )
        if len(self.data) > MAX_PDF_BYTES:
            size = len(self.data)
            raise MediaError(f"{title} has {size} bytes; the limit of a PDF is {MAX_PDF_BYTES}")
        begun = time.monotonic()
        try:
            done = _run(self.data, number, max(self.seconds, 0.0))
        except subprocess.TimeoutExpired:
            raise MediaError(
                f"{title} takes PDFium too long to draw; give it as a picture"
            ) from None
        except OSError as error:
            raise MediaError(f"{title}: no process can be started ({error.strerror})") from None
        self.seconds -= time.monotonic() - begun
        if done.returncode == 0:
            return done.stdout
        raise MediaError(f"{title} cannot be read as a PDF: {_reason(done)}")


@dataclass(frozen=True)
class Page:
    """One page of a document, drawn when it is loaded. number: from 1."""

    document: Document
    number: int


def is_pdf(data: bytes) -> bool:
    """Whether bytes begin as a PDF; some have a few others before."""
    return b"%PDF-" in data[:1024]


def draw(page: Page) -> Image:
    """The page as an RGB picture on white, at DPI or what MAX_PAGE_PIXELS leaves of it.

    Raises: MediaError for a page that cannot be drawn, or not within the limits.
    """
    from PIL import Image as pil

    made = page.document.ask(page.number, f"{page.document.name}, page {page.number},")
    head, _, pixels = made.partition(b"\n")
    width, height = map(int, head.split())
    return pil.frombytes("RGB", (width, height), pixels)


def require_few(sources: Sequence[Any]) -> None:
    """Raises: MediaError where documents bring more pages than a request may have."""
    count = sum(isinstance(source, Page) for source in sources)
    if count > MAX_REQUEST_PAGES:
        raise MediaError(
            f"{count} pages of documents; a request may have {MAX_REQUEST_PAGES}, ask for fewer"
        )


def _run(data: bytes, number: int, seconds: float) -> subprocess.CompletedProcess[bytes]:
    limits = map(str, (number, DPI, MAX_PAGE_PIXELS, MAX_MEMORY_BYTES))
    command = [sys.executable, "-I", "-c", RUN, json.dumps(sys.path), *limits]
    return subprocess.run(command, input=data, capture_output=True, timeout=seconds)


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode != 1:
        return "PDFium gave up"
    said = one_line(done.stderr.decode(errors="replace").split("\n")[0], 200)
    return f"{said}; remove its password" if "password" in said.lower() else said
