"""An answer that grows in a notebook's cell, or on the terminal of IPython."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from mlx_vlm_pipes.display.boxes import drawn_boxes
from mlx_vlm_pipes.display.html import answer_html, card, quiet_html
from mlx_vlm_pipes.display.view import View
from mlx_vlm_pipes.media.records import MediaRecord

PERIOD_S = 0.1  # between two updates of a cell


class Cell:
    """One output that is replaced in place: pictures first, the answer below them.

    Pictures are sent once, and again only where the finished answer puts boxes on them.
    """

    def __init__(self, media: Sequence[MediaRecord]) -> None:
        self._media, self._text, self._shown_s = media, "", 0.0
        pictures = View(media)._repr_html_() if media and has_cells() else ""
        self._names = "\n".join(map(str, media))
        self._top = _Output(pictures, self._names) if pictures else None
        self._output = _Output(card(answer_html("", is_whole=False)), "")

    def add(self, text: str) -> None:
        """More of the answer; shown at once, or with what comes within a tenth of a second."""
        self._text = (self._text + text).lstrip() if not self._text else self._text + text
        now = time.perf_counter()
        if now - self._shown_s >= PERIOD_S:
            self._shown_s = now
            self._output.replace(card(answer_html(self._text, is_whole=False)), self._text)

    def finish(self, note: str) -> None:
        """The whole answer, with a note below it."""
        self._output.replace(card(answer_html(self._text), quiet_html(note)), self._text)
        boxes = drawn_boxes(self._text, self._media)
        if self._top is not None and boxes:
            self._top.replace(View(self._media, boxes)._repr_html_(), self._names)
        self._output.end()


class _Output:
    """A display of the notebook; text alone where there is none, only ever added to."""

    def __init__(self, html: str, text: str) -> None:
        self._handle: Any = None
        self._written = len(text)
        if has_cells():
            from IPython.display import display

            self._handle = display(_bundle(html, text), raw=True, display_id=True)

    def replace(self, html: str, text: str) -> None:
        if self._handle is not None:
            self._handle.update(_bundle(html, text), raw=True)
            return
        sys.stdout.write(text[self._written :])
        sys.stdout.flush()
        self._written = len(text)

    def end(self) -> None:
        if self._handle is None:
            sys.stdout.write("\n")


def _bundle(html: str, text: str) -> dict[str, str]:
    return {"text/html": html, "text/plain": text}


def has_cells() -> bool:
    """Whether a kernel is listening: IPython on a terminal replaces nothing."""
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None
