"""Something to look at: pictures as the model saw them, and the answer where there is one."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from mlx_vlm_pipes.display.boxes import Box, drawn_boxes
from mlx_vlm_pipes.display.html import answer_html, card, media_html, quiet_html
from mlx_vlm_pipes.display.pictures import draw_all
from mlx_vlm_pipes.errors import InputError, shown
from mlx_vlm_pipes.media.records import MediaRecord
from mlx_vlm_pipes.paths import user_path, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


class View:
    """Pictures and clips of one request. A notebook shows it; `picture` and `save` are without one.

    boxes: drawn on picture number `image`, counted from 0. answer, figures: below the pictures.
    Raises: InputError if there is no such picture.
    """

    def __init__(
        self,
        media: Sequence[MediaRecord],
        boxes: Sequence[Box] = (),
        image: int = 0,
        answer: str | None = None,
        figures: str = "",
    ) -> None:
        self.media = tuple(media)
        places = [i for i, record in enumerate(media) if record.kind == "image"]
        if boxes and image not in places:
            raise InputError(
                f"no picture number {shown(image)} to draw boxes on; there are {len(media)}"
            )
        self._boxes = [tuple(boxes) if i == image else () for i in range(len(media))]
        self._answer, self._figures = answer, figures

    def __repr__(self) -> str:
        return f"View({'; '.join(map(str, self.media)) or 'no pictures'})"

    @cached_property
    def picture(self) -> Image:
        """All of them drawn with their captions, one below the other."""
        if not self.media:
            raise InputError("nothing to draw: the prompt has no picture")
        return draw_all(self.media, self._boxes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture; a file that is there is replaced, at once and as a whole.

        Raises: InputError for a name without a known ending, and where nothing can be written.
        """
        save_picture(self.picture, path)

    def _repr_html_(self) -> str:
        answer = [] if self._answer is None else [answer_html(self._answer)]
        figures = [quiet_html(self._figures)] if self._figures else []
        return card(media_html(self.media, self._boxes), *answer, *figures)


def shown_answer(text: str, media: Sequence[MediaRecord], figures: str = "") -> View:
    """An answer with its own boxes, where there is one picture that they can be of."""
    return View(media, drawn_boxes(text, media), 0, text.lstrip(), figures)


def picture_kind(path: str | os.PathLike[str]) -> str:
    """Pillow's name of a file's format. Raises: InputError unless its ending is one of KINDS."""
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending not in KINDS:
        raise InputError(f"{os.fspath(path)}: a picture's name ends in {', '.join(KINDS)}")
    return KINDS[ending]


def require_folder(path: str | os.PathLike[str]) -> None:
    """Raises: InputError where no picture can be written under this name."""
    picture_kind(path)
    folder = user_path(path).absolute().parent
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; make it first")


def save_picture(picture: Image, path: str | os.PathLike[str]) -> None:
    """As `View.save`."""
    kind, file = picture_kind(path), io.BytesIO()
    picture.save(file, kind)
    write_whole(path, file.getvalue())
