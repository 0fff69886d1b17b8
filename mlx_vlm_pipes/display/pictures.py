"""What the model saw, drawn with Pillow: tiles, tokens, boxes, frames of clips with their times.

Letters are Pillow's own font. All sizes in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.display.boxes import Box
from mlx_vlm_pipes.media.records import MediaRecord

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SHOWN = 12  # pictures and clips of one request
SIDE_PX = 680  # of a drawn picture with its overview, at most; three quarters of it high
ENLARGED_PX = 320  # of one that is smaller than this
FRAME_PX = 150  # of a frame on a contact sheet
CELL_PX = 9  # tokens that are drawn smaller than this get no lines
GAP_PX = 12
VISIBLE = 1.1  # a change of shape that is told of
TEXT_PX = 13
PAPER, INK, MISSING = (255, 255, 255), (40, 40, 40), (128, 128, 128)
# Okabe and Ito's colours, which most colour-blind people tell apart
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")


def colour_of(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def draw_picture(record: MediaRecord, boxes: Sequence[Box] = (), side: int = SIDE_PX) -> Image:
    """The resized picture, with lines between its tiles, and boxes.

    With its overview it is at most `side` wide, and three quarters of that high. One that is not
    kept any more is grey.
    """
    image = _scaled(_kept(record, 0), record.resized_size, drawn_scale(record, side))
    _draw_grid(image, record)
    for index, box in enumerate(boxes):
        _draw_box(image, record, box, index)
    return image


def draw_overview(record: MediaRecord, side: int = SIDE_PX) -> Image | None:
    """The whole picture as one tile, beside the others and to their scale; None without one."""
    if not record.tiles.overview:
        return None
    from PIL.Image import Resampling

    size = _times(record.tiles.size, drawn_scale(record, side))
    return _kept(record, 0).resize(size, Resampling.BICUBIC)


def draw_frames(record: MediaRecord, side: int = FRAME_PX) -> list[Image]:
    """The kept frames of a clip, each at most `side` wide and high."""
    count = max(len(record.preview.images), 1)
    scale = side / max(record.resized_size)
    return [_scaled(_kept(record, i), record.resized_size, scale) for i in range(count)]


def draw_record(record: MediaRecord, boxes: Sequence[Box] = ()) -> Image:
    """A picture or contact sheet on paper, its caption below."""
    if record.kind == "video":
        parts = [_sheet(record)]
    else:
        whole = draw_overview(record)
        parts = [draw_picture(record, boxes), *([whole] if whole else [])]
    lines = wrapped(caption(record), max(sum(p.width for p in parts) + GAP_PX, 320))
    height = max(part.height for part in parts)
    width = sum(part.width + GAP_PX for part in parts)
    text_width = max(int(font().getlength(line)) for line in lines) + GAP_PX
    paper = _paper(max(width, text_width) + GAP_PX, height + 2 * GAP_PX + 18 * len(lines) + 6)
    left = GAP_PX
    for part in parts:
        paper.paste(part, (left, GAP_PX))
        left += part.width + GAP_PX
    pen = _pen(paper)
    for i, line in enumerate(lines):
        pen.text((GAP_PX, GAP_PX + height + 8 + 18 * i), line, INK, font())
    return paper


def draw_all(media: Sequence[MediaRecord], boxes: Sequence[Sequence[Box]]) -> Image:
    """Pictures and clips of a request, one below the other, the first MAX_SHOWN. boxes: of each."""
    pairs = list(zip(media, boxes, strict=True))
    sheets = [draw_record(record, own) for record, own in pairs[:MAX_SHOWN]]
    if len(pairs) > MAX_SHOWN:
        more = _paper(ENLARGED_PX, 2 * GAP_PX + TEXT_PX)
        _pen(more).text((GAP_PX, GAP_PX), f"and {len(pairs) - MAX_SHOWN} more", INK, font())
        sheets.append(more)
    paper = _paper(max(s.width for s in sheets), sum(s.height for s in sheets))
    top = 0
    for sheet in sheets:
        paper.paste(sheet, (0, top))
        top += sheet.height
    return paper


def caption(record: MediaRecord) -> str:
    """Sizes, tiles and tokens in words."""
    wide, high = record.source_size
    turn = f", {record.turn}" if record.turn else ""
    frames = f"{record.num_frames} of {record.total_frames} frames of " * (record.kind == "video")
    parts = [f"{frames}{wide} x {high} pixels{turn}, resized to {_by(record.resized_size)}"]
    parts[0] += f" (limit: {record.cap})" if record.cap else ""
    parts[0] += distortion(record)
    tiles = record.tiles
    if tiles.rows * tiles.columns > 1:
        whole = " and the whole" if tiles.overview else ""
        parts.append(f"{_rows(tiles.rows, tiles.columns)} tiles of {_by(tiles.size)}{whole}")
    each = _each(record) if record.num_parts > 1 else ""
    parts.append(f"{_rows(*tiles.tokens)} tokens{each}")
    where = f"{record.num_tokens} in all, " if each else ""
    parts.append(f"{where}at {record.start_idx} to {record.end_idx} of the prompt")
    return "; ".join(parts)


def _each(record: MediaRecord) -> str:
    frames = math.ceil(record.num_frames / record.num_parts)
    return f" for {frames} frames each" if frames > 1 else " each"


def distortion(record: MediaRecord) -> str:
    """Whether resizing changed the shape by more than a tenth."""
    (wide, high), (new_wide, new_high) = record.upright_size, record.resized_size
    ratio = (new_wide / wide) / (new_high / high)
    if 1 / VISIBLE < ratio < VISIBLE:
        return ""
    return f", {max(ratio, 1 / ratio):.2g} times too {'wide' if ratio > 1 else 'high'}"


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels; a longer word has its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = font().getlength(longer) <= width
        lines = [*lines[:-1], longer] if fits or not lines[-1] else [*lines, word]
    return lines


@lru_cache(maxsize=4)
def font(size: int = TEXT_PX) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _kept(record: MediaRecord, index: int) -> Image:
    from PIL import Image as pil

    images = record.preview.images  # another thread may forget them meanwhile
    return images[index] if index < len(images) else pil.new("RGB", (64, 64), MISSING)


def drawn_scale(record: MediaRecord, side: int) -> float:
    """Small pictures are enlarged, by whole factors, so that their pixels stay squares."""
    width, height = record.resized_size
    extra = record.tiles.size[0] + GAP_PX if record.tiles.overview else 0
    longest = max(width + extra, height * 4 // 3)
    if longest > side:
        return side / longest
    return max(min(side // longest, ENLARGED_PX // max(width, height)), 1)


def _times(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _scaled(image: Image, size: tuple[int, int], scale: float) -> Image:
    """A copy, drawn to the scale of a picture of this size."""
    from PIL.Image import Resampling

    smooth = Resampling.NEAREST if scale >= 1 else Resampling.LANCZOS
    return image.convert("RGB").resize(_times(size, scale), smooth)


def _draw_grid(image: Image, record: MediaRecord) -> None:
    """Lines between tiles, and faint ones between tokens where there is room for them."""
    tiles = record.tiles
    rows, columns = (tiles.rows or 1), (tiles.columns or 1)
    fine = rows * tiles.tokens[0], columns * tiles.tokens[1]
    if min(image.width / fine[1], image.height / fine[0]) >= CELL_PX:
        _draw_lines(image, fine, 70, 1)
    _draw_lines(image, (rows, columns), 255, 3)


def _draw_lines(image: Image, grid: tuple[int, int], alpha: int, width: int) -> None:
    """Inner lines of a grid of (rows, columns): light on a dark border, to be seen on anything."""
    from PIL import Image as pil

    layer = pil.new("RGBA", image.size)
    pen = _pen(layer)
    for axis, count in enumerate(grid):
        length = image.size[1 - axis]
        for i in range(1, count):
            at = round(i * length / count)
            ends = (0, at, image.width, at) if axis == 0 else (at, 0, at, image.height)
            pen.line(ends, (0, 0, 0, alpha * 3 // 5), width + 2)
            pen.line(ends, (255, 255, 255, alpha), width)
    image.paste(layer, (0, 0), layer)


def _draw_box(image: Image, record: MediaRecord, box: Box, index: int) -> None:
    places, size = record.to_source(box.values), record.upright_size
    spots = [
        min(max(value / size[i % 2] * image.size[i % 2], 0), image.size[i % 2] - 1)
        for i, value in enumerate(places)
    ]
    pen, colour = _pen(image), colour_of(index)
    if len(spots) == 2:
        x, y = spots
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), colour, "black", 2)
        left, top = x + 8, y - 8
    else:
        (left, right), (top, bottom) = sorted(spots[::2]), sorted(spots[1::2])
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), None, "black", 5)
        pen.rectangle((left, top, right, bottom), None, colour, 3)
    text = f"{index + 1} {box.label}".strip()
    _draw_tag(image, text, (left, top), colour)


def _draw_tag(image: Image, text: str, at: tuple[float, float], colour: str) -> None:
    """A label on its colour, inside the picture."""
    text = text.encode("latin-1", "replace").decode("latin-1")[:40]  # what the font has
    width, height = font().getlength(text) + 6, TEXT_PX + 4
    left = max(min(at[0], image.width - width), 0)
    top = max(min(at[1] - height, image.height - height), 0)
    pen = _pen(image)
    pen.rectangle((left, top, left + width, top + height), colour)
    pen.text((left + 3, top + 1), text, "black", font())


def _sheet(record: MediaRecord) -> Image:
    """Frames in rows, each with its time in its lower left corner."""
    frames = draw_frames(record)
    columns = min(len(frames), 6)
    wide, high = frames[0].width + 4, frames[0].height + 4
    paper = _paper(columns * wide - 4, -(-len(frames) // columns) * high - 4)
    for i, frame in enumerate(frames):
        _draw_tag(frame, frame_time(record, i), (0, frame.height), "white")
        paper.paste(frame, (i % columns * wide, i // columns * high))
    return paper


def frame_time(record: MediaRecord, index: int) -> str:
    """When the kept frame was, of the clip."""
    places = record.preview.places
    return f"{record.times_s[places[index]]:.1f} s" if index < len(places) else ""


def _rows(rows: int, columns: int) -> str:
    return f"{rows} row{'s' if rows > 1 else ''} of {columns}"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _paper(width: int, height: int) -> Image:
    from PIL import Image as pil

    return pil.new("RGB", (width, height), PAPER)


def _pen(image: Image) -> Any:
    from PIL import ImageDraw

    return ImageDraw.Draw(image)
