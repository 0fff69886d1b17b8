"""Places in a picture: as a user gives them, and as models write them into their answers.

Written forms: Qwen2.5-VL's and Qwen3-VL's JSON (`bbox_2d`, `point_2d`), Qwen2-VL's
`label(x,y),(x,y)` and InternVL's `label[[x, y, x, y], ...]`, the last two with their marking tokens
or, as a decoded answer has them, without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_vlm_pipes.errors import InputError, shown
from mlx_vlm_pipes.facts import Coordinates
from mlx_vlm_pipes.media.records import FAR, MediaRecord

KEYS = ("bbox_2d", "point_2d")
MAX_BOXES = 200  # of one answer
MAX_LABEL = 60  # characters
NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
PAIRS = re.compile(rf"\({NUMBER},{NUMBER}\),\s*\({NUMBER},{NUMBER}\)")
LISTS = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
INNER = r"\[[\d\s.,]{7,80}\]"
NESTED = re.compile(
    rf"\[\s*{INNER}(?:\s*,\s*{INNER})*\s*\]"
)  # one way to match: no text takes long
OBJECT = re.compile(r"\{[^{}]{0,2000}\}")
MARKS = re.compile(r"<\|?/?(?:object_ref|box|ref)(?:_start|_end)?\|?>")


@dataclass(frozen=True)
class Box:
    """A box, x, y, x, y of two corners, or a point, x, y; in the model's coordinates."""

    values: tuple[float, ...]
    label: str = ""


def given_boxes(boxes: Sequence[Any]) -> list[Box]:
    """Boxes as users have them: numbers, `Box`, or the model's own dicts with bbox_2d and label.

    Raises: InputError for anything else.
    """
    boxes = boxes.tolist() if isinstance(boxes, np.ndarray) else boxes
    if not isinstance(boxes, (list, tuple)):
        raise InputError(f"boxes is a {type(boxes).__name__}; expected a list of boxes")
    return [_given(box) for box in boxes]


def _given(box: Any) -> Box:
    if isinstance(box, Box):
        return box
    found = _from_mapping(box) if isinstance(box, Mapping) else _from_numbers(box)
    if found is None:
        raise InputError(
            f"a box is {shown(box)}; expected 4 numbers, 2 of a point, or a dict with bbox_2d"
        )
    return found


def _from_mapping(box: Mapping[str, Any]) -> Box | None:
    values = next((box[key] for key in KEYS if key in box), None)
    found = _from_numbers(values)
    return found and Box(found.values, str(box.get("label", ""))[:MAX_LABEL])


def _from_numbers(values: Any) -> Box | None:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, (list, tuple)) or len(values) not in (2, 4):
        return None
    good = all(
        isinstance(v, (int, float, np.number)) and abs(v) < FAR for v in values
    )  # no NaN passes
    return Box(tuple(values)) if good else None


def written_boxes(text: str, media: Sequence[MediaRecord]) -> list[Box]:
    """The boxes of an answer; none of a family that is not known to write any."""
    if not media or media[0].coordinates is Coordinates.FRACTIONS:
        return []
    return (_in_json(text) or _in_text(text))[:MAX_BOXES]


def drawn_boxes(text: str, media: Sequence[MediaRecord]) -> list[Box]:
    """Those of `written_boxes` that are sure to belong to the first picture: it is the only one."""
    is_alone = len(media) == 1 and media[0].kind == "image"
    return written_boxes(text, media) if is_alone else []


def _in_json(text: str) -> list[Box]:
    found = []
    for match in OBJECT.finditer(text):
        try:
            value = json.loads(match[0])
        except ValueError:
            continue  # braces in plain text
        box = _from_mapping(value)
        found += [box] if box else []
    return found


def _in_text(text: str) -> list[Box]:
    found, end = [], 0
    matches = [*PAIRS.finditer(text), *NESTED.finditer(text)]
    for match in sorted(matches, key=lambda one: one.start()):
        label = _label(text[end : match.start()])
        inner = LISTS.findall(match[0]) or [match.groups()]
        found += [Box(box.values, label) for box in map(_from_written, inner) if box]
        end = match.end()
    return found


def _from_written(numbers: Sequence[str]) -> Box | None:
    """None for numbers beyond any picture, which a model that repeats itself may write."""
    return _from_numbers([float(number) for number in numbers])


def _label(before: str) -> str:
    """The words in front of a box, on its line."""
    line = MARKS.sub("", before).replace("\r", "\n").split("\n")[-1]
    return line.strip(" \t,.;:-`*#")[-MAX_LABEL:]
