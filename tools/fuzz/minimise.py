"""The smallest setting that still fails in the same way."""

import copy
from collections.abc import Callable, Iterator

from tools.make_fixtures.case import Json

from .requests import plain_clip, plain_picture, plain_request

MAX_TRIES = 60


def minimise(setting: Json, fails: Callable[[Json], bool]) -> Json:
    """Take one thing away at a time while `fails` holds, until nothing can go."""
    tries = 0
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(setting):
            tries += 1
            if tries > MAX_TRIES:
                return setting
            if fails(smaller):
                setting, changed = smaller, True
                break
    return setting


def _smaller(setting: Json) -> Iterator[Json]:
    plain = plain_request(setting["family"])
    if setting["request"] != plain:
        yield {**setting, "request": plain}
    for key in setting["knobs"]:
        yield {**setting, "knobs": {k: v for k, v in setting["knobs"].items() if k != key}}
    for request in _smaller_requests(setting["request"]):
        yield {**setting, "request": request}


def _smaller_requests(request: Json) -> Iterator[Json]:
    if request["raw"]:
        yield {**request, "raw": False}
    if request["fps"] != 2.0:
        yield {**request, "fps": 2.0}
    turns = request["turns"]
    if len(turns) > 1:
        for i in range(len(turns)):
            yield {**request, "turns": turns[:i] + turns[i + 1 :]}
    for i, turn in enumerate(turns):
        for j, part in enumerate(turn["parts"]):
            for parts in _smaller_parts(turn["parts"], j, part):
                shorter = copy.deepcopy(request)
                shorter["turns"][i]["parts"] = parts
                yield shorter


def _smaller_parts(parts: list, index: int, part: Json | str) -> Iterator[list]:
    if len(parts) > 1:
        yield parts[:index] + parts[index + 1 :]
    before, after = parts[:index], parts[index + 1 :]
    if isinstance(part, str):
        half = len(part) // 2
        for piece in (part[:half], part[half:]):
            if 0 < len(piece) < len(part):
                yield [*before, piece, *after]
        return
    ((kind, spec),) = part.items()
    plain = plain_picture() if kind == "picture" else plain_clip()
    for key, value in plain.items():
        if spec[key] != value:
            yield [*before, {kind: {**spec, key: value}}, *after]
