"""Pictures as a model was given them, kept for who may want to look: bounded in size and number.

A request costs nothing for it but a reference; only what is larger than MAX_PIXELS is shrunk, by a
whole factor. What is kept of all requests together stays below KeptPreviews' bound: the oldest
are forgotten, and show their tiles without the picture.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 2**20  # of one picture, or of all kept frames of a clip
MAX_FRAMES = 48
KEPT_BYTES = 2**25


class Preview:
    """A resized picture, or frames of a clip; none once they are forgotten.

    places: which of the clip's frames are kept, evenly from the first to the last.
    """

    def __init__(self, images: Sequence[Image] = ()) -> None:
        count = min(len(images), MAX_FRAMES)
        self.places = [round(i * (len(images) - 1) / max(count - 1, 1)) for i in range(count)]
        chosen = [images[place] for place in self.places]
        pixels = sum(image.width * image.height for image in chosen)
        factor = math.ceil(math.sqrt(pixels / MAX_PIXELS))
        self.images = [image.reduce(factor) if factor > 1 else image for image in chosen]

    @property
    def num_bytes(self) -> int:
        return sum(3 * image.width * image.height for image in self.images)

    def forget(self) -> None:
        self.images = []


class KeptPreviews:
    """The previews that somebody still holds, oldest first. Safe from any thread."""

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        self._limit = limit_bytes
        self._held: list[tuple[weakref.ref[Preview], int]] = []
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, preview: Preview) -> None:
        """Keep one more; forget the oldest where all together are beyond the limit."""
        with self._lock:
            self._held.append((weakref.ref(preview), preview.num_bytes))
            self._bytes += preview.num_bytes
            if self._bytes <= self._limit:
                return
            self._held = [held for held in self._held if held[0]() is not None]
            self._bytes = sum(size for _, size in self._held)
            while self._bytes > self._limit:
                reference, size = self._held.pop(0)
                self._bytes -= size
                oldest = reference()
                if oldest is not None:
                    oldest.forget()
