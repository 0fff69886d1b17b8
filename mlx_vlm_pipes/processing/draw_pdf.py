"""What `pdf.py` runs in a process of its own: PDFium on a document from standard input.

Arguments: the page, from 1, or 0 for their number; dots an inch, the most pixels, the most bytes of
memory. Standard output: one line of numbers, the number of pages, or width and height; then the
page's RGB bytes, row by row. On a failure one line on standard error, and status 1.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

POINTS = 72  # an inch
MAX_SIDE = 14_400  # points: what the format allows


def main() -> None:
    number, dots, max_pixels, max_bytes = map(int, sys.argv[1:])
    _limit_memory(max_bytes)
    try:
        import pypdfium2

        document = pypdfium2.PdfDocument(sys.stdin.buffer.read())
        if number == 0:
            sys.stdout.write(f"{len(document)}\n")
        else:
            _write(document[number - 1], dots, max_pixels)
    except Exception as error:  # PDFium's own, and what is made of its numbers
        sys.exit(" ".join(str(error).split())[:200] or type(error).__name__)


def _write(page: Any, dots: int, max_pixels: int) -> None:
    """A page on white, at fewer dots an inch where it would have more than max_pixels."""
    width, height = page.get_size()
    area = width * height / POINTS**2
    if not 0 < area < max_pixels or max(width, height) > MAX_SIDE:
        sys.exit(f"the page is {width / POINTS:g} x {height / POINTS:g} inches large")
    scale = min(dots, (max_pixels / area) ** 0.5) / POINTS * (1 - 1e-6)  # it is rounded up
    bitmap = page.render(scale=scale, rev_byteorder=True)
    rows = memoryview(bitmap.buffer).cast("B")
    sys.stdout.write(f"{bitmap.width} {bitmap.height}\n")
    sys.stdout.flush()
    for y in range(bitmap.height):
        begin = y * bitmap.stride
        sys.stdout.buffer.write(rows[begin : begin + 3 * bitmap.width])


def _limit_memory(max_bytes: int) -> None:
    """Where the system has such limits; elsewhere the time that the caller waits is one."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
