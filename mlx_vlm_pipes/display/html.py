"""Results, prompts, plans and pipelines as HTML for notebooks.

No scripts and no style sheets, colours of the surroundings: it looks the same in light and in dark
themes. Whatever came from a user or a model is escaped; pictures are small JPEG or PNG data URLs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from mlx_vlm_pipes.display.boxes import Box
from mlx_vlm_pipes.display.pictures import (
    FRAME_PX,
    MAX_SHOWN,
    SIDE_PX,
    caption,
    colour_of,
    draw_frames,
    draw_overview,
    draw_picture,
    frame_time,
)
from mlx_vlm_pipes.media.records import MediaRecord

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PICTURE_BYTES = 150_000  # of one data URL, before base64
MAX_TEXT = 4000  # characters of a prompt
BESIDE = 25  # times the largest bar: a longer one would leave nothing of the others
WIDTH_PX = 840
LINE = "1px solid rgba(128,128,128,.35)"
ROW = "display:flex;flex-wrap:wrap;gap:10px 14px;align-items:flex-start"
QUIET = "opacity:.7;font-size:90%"
UNITS = ("bytes", "kB", "MB", "GB", "TB")
# tables say all of their style: Jupyter gives them fixed columns, stripes and a small font
TABLE = "border-collapse:collapse;margin:0;table-layout:auto"
PLAIN = "font-size:inherit;background:none;border:0;text-align:left;padding:1px 14px 1px 0"
MONO = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;font-size:90%"


def media_html(media: Sequence[MediaRecord], boxes: Sequence[Sequence[Box]]) -> str:
    """Pictures and clips with their captions. boxes: of each."""
    side = SIDE_PX if len(media) == 1 else SIDE_PX // 2
    pairs = list(zip(media, boxes, strict=True))
    shown = [_record_html(record, own, side) for record, own in pairs[:MAX_SHOWN]]
    if len(pairs) > MAX_SHOWN:
        shown.append(quiet_html(f"and {len(pairs) - MAX_SHOWN} more"))
    return f'<div style="{ROW}">{"".join(shown)}</div>' if shown else ""


def answer_html(text: str, *, is_whole: bool = True) -> str:
    """An answer, or what there is of it."""
    cursor = "" if is_whole else '<span style="opacity:.5">▍</span>'
    style = "white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid rgba(128,128,128,.5)"
    return f'<div style="{style};padding:2px 0 2px 12px;margin:6px 0">{escape(text)}{cursor}</div>'


def quiet_html(text: str) -> str:
    """A line that stays behind the others."""
    return f'<div style="{QUIET}">{escape(text)}</div>'


def card(*parts: str) -> str:
    return f'<div style="max-width:{WIDTH_PX}px;line-height:1.5">{"".join(parts)}</div>'


def prompt_html(text: str, num_tokens: int, media: Sequence[MediaRecord]) -> str:
    """A processed prompt: its pictures, its text as the chat template wrote it, its tokens."""
    of_them = f", {sum(record.num_tokens for record in media)} of them image tokens"
    cut = f" (the first {MAX_TEXT} of {len(text)} characters)" if len(text) > MAX_TEXT else ""
    body = f'<div style="{MONO};border:{LINE};padding:6px 10px">{escape(text[:MAX_TEXT])}</div>'
    figures = f"{num_tokens} tokens{of_them if media else ''}{cut}"
    return card(media_html(media, [()] * len(media)), body, quiet_html(figures))


def table_html(title: str, rows: Mapping[str, str]) -> str:
    """Names and values."""
    cells = "".join(
        f'<tr style="{PLAIN}"><td style="{PLAIN};opacity:.7">{escape(name)}</td>'
        f'<td style="{PLAIN}">{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    head = f'<div style="font-weight:600">{escape(title)}</div>'
    return card(head, f'<table style="{TABLE}">{cells}</table>')


def bars_html(title: str, sizes: Mapping[str, int], whole: int, note: str) -> str:
    """Bytes as bars, beside the whole that there is unless they would vanish there."""
    largest = max(sizes.values())
    near = whole <= BESIDE * largest
    largest = max(largest, whole) if near else largest
    rows = "".join(_bar(name, size, largest) for name, size in sizes.items())
    limit = _bar("the device has", whole, largest, fill="rgba(128,128,128,.35)") if near else ""
    head = f'<div style="font-weight:600">{escape(title)}</div>'
    table = f'<table style="{TABLE};width:100%">{rows}{limit}</table>'
    return card(head, table, quiet_html(note))


def _bar(name: str, size: int, largest: int, fill: str = "#56B4E9") -> str:
    share = max(100 * size / largest, 0.3) if size else 0
    bar = f'<div style="width:{share:.1f}%;height:10px;background:{fill};border-radius:2px"></div>'
    return (
        f'<tr style="{PLAIN}"><td style="{PLAIN};white-space:nowrap;width:1%">{escape(name)}</td>'
        f'<td style="{PLAIN};white-space:nowrap;width:1%;text-align:right">{said_bytes(size)}</td>'
        f'<td style="{PLAIN};padding-right:0">{bar}</td></tr>'
    )


def said_bytes(count: float) -> str:
    """Three digits and a decimal unit."""
    power = 0
    while count >= 999.5 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {UNITS[power]}"


def _record_html(record: MediaRecord, boxes: Sequence[Box], side: int) -> str:
    is_clip = record.kind == "video"
    figures = _frames_html(record) if is_clip else _picture_html(record, boxes, side)
    lost = "" if record.preview.images else "; the picture is not kept any more"
    legend = "".join(_legend(i, box, record) for i, box in enumerate(boxes))
    notes = escape(caption(record)).replace(" x ", " &times; ") + lost
    style = f"margin:4px 0 8px;max-width:{side if side < SIDE_PX else WIDTH_PX}px"
    return (
        f'<figure style="{style}"><div style="{ROW}">{figures}</div>'
        f'{legend}<figcaption style="{QUIET}">{notes}</figcaption></figure>'
    )


def _picture_html(record: MediaRecord, boxes: Sequence[Box], side: int) -> str:
    wide, high = record.resized_size
    tiles = record.tiles
    cut = f" in {tiles.rows} by {tiles.columns} tiles" if tiles.rows * tiles.columns > 1 else ""
    named = ", ".join(box.label or f"box {i + 1}" for i, box in enumerate(boxes))
    marked = f", with {named} marked" if boxes else ""
    alt = f"The picture as the model saw it, {wide} by {high} pixels{cut}{marked}"
    picture = _image_html(draw_picture(record, boxes, side), alt)
    whole = draw_overview(record, side)
    if whole is None:
        return picture
    return picture + _noted(_image_html(whole, "The whole picture as one tile"), "the whole")


def _frames_html(record: MediaRecord) -> str:
    found = []
    for i, frame in enumerate(draw_frames(record, FRAME_PX)):
        time = frame_time(record, i)
        alt = f"The frame at {time}" if time else "A frame that is not kept"
        found.append(_noted(_image_html(frame, alt), time))
    return "".join(found)


def _noted(image: str, note: str) -> str:
    return f'<div style="text-align:center">{image}<br><span style="{QUIET}">{note}</span></div>'


def _legend(index: int, box: Box, record: MediaRecord) -> str:
    """A box in words: its label, as the model wrote it, and in pixels of the source."""
    written = ", ".join(f"{value:.4g}" for value in box.values)
    source = ", ".join(f"{value:.0f}" for value in record.to_source(box.values))
    mark = f"background:{colour_of(index)};color:#000;padding:0 5px;border-radius:2px"
    return (
        f'<div style="font-size:90%"><span style="{mark}">{index + 1}</span> {escape(box.label)} '
        f'<span style="opacity:.7">({written}) is ({source}) in the source</span></div>'
    )


def _image_html(image: Image, alt: str) -> str:
    kind, data = small_file(image)
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    style = "max-width:100%;height:auto;display:inline-block;margin:0"
    return f'<img src="{url}" width="{image.width}" alt="{escape(alt)}" style="{style}">'


def small_file(image: Image) -> tuple[str, bytes]:
    """(kind, bytes) of a PNG where that is small, else of a JPEG of at most MAX_PICTURE_BYTES."""
    png = _encoded(image, "PNG", optimize=True)
    if len(png) <= MAX_PICTURE_BYTES // 4:
        return "png", png
    jpeg = b""
    for quality in (85, 70, 50, 25, 5):
        jpeg = _encoded(image, "JPEG", quality=quality)
        if len(jpeg) <= MAX_PICTURE_BYTES:
            break
    return min(("png", png), ("jpeg", jpeg), key=lambda pair: len(pair[1]))


def _encoded(image: Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
