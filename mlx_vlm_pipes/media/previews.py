"""Pictures as a model was given them, kept for who may want to look: bounded, and free till then.

A request keeps a reference to what it resized anyway. Where those that somebody still holds come to
more than a bound, the oldest are shrunk, then forgotten: they show their tiles without the picture.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FRAMES = 48  # of a clip
MAX_PIXELS = 2**20  # of a picture that was shrunk, or of all kept frames of a clip
KEPT_PIXELS = 12 * 2**20  # of all requests that somebody holds: 36 MB


class Preview:
    """A resized picture, or frames of a clip; none once they are forgotten.

    places: which of the clip's frames are kept, evenly from the first to the last.
    """

    def __init__(self, images: Sequence[Image] = ()) -> None:
        count = min(len(images), MAX_FRAMES)
        self.places = [round(i * (len(images) - 1) / max(count - 1, 1)) for i in range(count)]
        self.images = [images[place] for place in self.places]

    @property
    def num_pixels(self) -> int:
        return sum(image.width * image.height for image in self.images)

    def shrink(self) -> None:
        """Make it MAX_PIXELS at most, by a whole factor."""
        factor = math.ceil(math.sqrt(self.num_pixels / MAX_PIXELS))
        if factor > 1:
            self.images = [image.reduce(factor) for image in self.images]

    def forget(self) -> None:
        self.images = []


class KeptPreviews:
    """The previews that somebody still holds, oldest first. Safe from any thread."""

    def __init__(self, limit_pixels: int = KEPT_PIXELS) -> None:
        self._limit = limit_pixels
        self._held: list[weakref.ref[Preview]] = []
        self._pixels = 0  # never less than what is held
        self._lock = threading.Lock()

    def add(self, preview: Preview) -> None:
        """Keep one more; shrink, then forget the oldest where all together are beyond the limit."""
        with self._lock:
            self._held.append(weakref.ref(preview))
            self._pixels += preview.num_pixels
            if self._pixels > self._limit:
                self._make_room()

    def _make_room(self) -> None:
        """Down to three quarters of the limit: the next call is then not the next picture's."""
        alive = [found for found in (reference() for reference in self._held) if found is not None]
        self._pixels = sum(preview.num_pixels for preview in alive)
        for lessen in (Preview.shrink, Preview.forget):
            for preview in alive:
                if self._pixels <= 3 * self._limit // 4:
                    break
                before = preview.num_pixels
                lessen(preview)
                self._pixels -= before - preview.num_pixels
        self._held = [weakref.ref(preview) for preview in alive if preview.images]
