"""Draws chats with pictures of every mode and size and with clips, and makes the media.

A request is JSON: `raw` (the rendered chat is given as text), `fps` of its clips and `turns`, each
a role and parts: a string, `{"picture": {...}}` or `{"clip": {...}}`.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from tools.make_fixtures.case import IMAGE, VIDEO, Clip, Json, Picture
from tools.make_fixtures.media import draw, draw_clip

from .knobs import TEXT

WITH_CLIPS = ("smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
WORDS = [
    "river", "What is it?", "The", "small letter", "128", "3.14159", "naïve", "Straße", "東京",
    "🙂👩‍👩‍👧", "don't", "  two  spaces", "line\nbreak", "tab\there", "\r\n", "é", "e\u0301",
    "\u00a0", "\u200b", "ﬁ", "İ", "x=[1,2]", "{{ x }}", "{% if %}", "</s>", "<|im_end|>",
    "<row_1_col_1>", "< image >", "<|endoftext", "<0x0A>", "▁", "[INST", "mañana", "مرحبا", "∑",
    "a" * 30, "'s",
]  # fmt: skip
KINDS = ["gradient", "checker", "clouds", "shapes"]
MODES = ["RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "F", "I", "YCbCr", "P-clear"]
IN_PNG = ("RGB", "L", "LA", "P", "RGBA", "I;16", "1", "P-clear")
IN_JPEG = ("RGB", "L", "CMYK")
SIDES = [1, 7, 16, 16, 24, 28, 31, 32, 33, 48, 56, 64, 75, 97, 120, 150]
QUESTION = "What is it?"


@dataclass(frozen=True)
class Media:
    """Of one request, in order: for us (paths, arrays, pictures) and for the reference."""

    given: list[Any]
    pictures: list[Image.Image]
    clips: list[list[Image.Image]]


def plain_request(family: str) -> Json:
    parts = [QUESTION] if family in TEXT else [{"picture": plain_picture()}, QUESTION]
    return {"raw": False, "fps": 2.0, "turns": [{"role": "user", "parts": parts}]}


def plain_picture() -> Json:
    return {"kind": "shapes", "width": 56, "height": 40, "seed": 1, "mode": "RGB", "source": "pil"}


def plain_clip() -> Json:
    return {"frames": 4, "width": 48, "height": 40, "seed": 1}


def draw_request(family: str, rng: random.Random) -> Json:
    turns: list[Json] = []
    for i in range(rng.choice([1, 1, 1, 2, 3])):
        if i:
            turns.append({"role": "assistant", "parts": [_text(rng)]})
        turns.append({"role": "user", "parts": _parts(family, rng)})
    if rng.random() < 0.25:
        turns.insert(0, {"role": "system", "parts": [_text(rng)]})
    return {"raw": rng.random() < 0.2, "fps": rng.choice([0.7, 1.0, 2.0, 4.0]), "turns": turns}


def _text(rng: random.Random) -> str:
    return rng.choice([" ", "", "\n"]).join(rng.choice(WORDS) for _ in range(rng.randint(1, 7)))


def _parts(family: str, rng: random.Random) -> list[Any]:
    parts: list[Any] = [_text(rng)]
    if family in TEXT:
        return parts
    if rng.random() < 0.85:
        parts += [{"picture": _picture(rng)} for _ in range(rng.choice([1, 1, 2]))]
    if family in WITH_CLIPS and rng.random() < 0.3:
        clip = {"frames": rng.randint(1, 9), "width": rng.choice(SIDES[2:12]),
                "height": rng.choice(SIDES[2:12]), "seed": rng.randint(0, 99)}  # fmt: skip
        parts.append({"clip": clip})
    rng.shuffle(parts)
    return parts


def _picture(rng: random.Random) -> Json:
    mode = rng.choice(["RGB", rng.choice(MODES)])
    sources = ["pil", "pil"]
    sources += ["png"] * (mode in IN_PNG) + ["jpeg"] * (mode in IN_JPEG)
    sources += ["numpy"] * (mode == "RGB")
    width, height, kind = rng.choice(SIDES), rng.choice(SIDES), rng.choice(KINDS)
    return {
        "kind": kind, "width": width, "height": height,
        "seed": rng.randint(0, 99), "mode": mode, "source": rng.choice(sources),
    }  # fmt: skip


# To both sides


def messages_of(request: Json, *, as_strings: bool) -> list[Json]:
    """Chat messages as both sides take them; strings for the templates of text models."""
    if as_strings:
        return [{"role": t["role"], "content": "".join(t["parts"])} for t in request["turns"]]
    return [
        {"role": t["role"], "content": [_part(p) for p in t["parts"]]} for t in request["turns"]
    ]


def _part(part: Any) -> Json:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return dict(IMAGE if "picture" in part else VIDEO)


def make_media(request: Json, folder: Path, *, converts: bool = True) -> Media:
    """Draw all pictures and clips; those with a file as source are written to `folder`.

    converts: do_convert_rgb. Without it, files are what `load_image` of transformers makes of them.
    """
    parts = [p for turn in request["turns"] for p in turn["parts"] if not isinstance(p, str)]
    made = [_make(p["picture"], folder, i) for i, p in enumerate(parts) if "picture" in p]
    if not converts:
        made = [(g, load_image(str(g)) if isinstance(g, Path) else seen) for g, seen in made]
    clips = [draw_clip(Clip(**p["clip"])) for p in parts if "clip" in p]
    return Media([given for given, _ in made], [picture for _, picture in made], clips)


def _make(spec: Json, folder: Path, index: int) -> tuple[Any, Image.Image]:
    picture = _in_mode(Picture(spec["kind"], spec["width"], spec["height"], spec["seed"]), spec)
    if spec["source"] == "numpy":
        return np.asarray(picture), picture
    if spec["source"] == "pil":
        return picture, picture
    path = folder / f"picture_{index}.{spec['source']}"
    if spec["source"] == "jpeg":
        exif = Image.Exif()
        exif[0x0112] = 1 + spec["seed"] % 8  # orientation
        picture.save(path, exif=exif)
    else:
        picture.save(path)
    with Image.open(path) as stored:
        stored.load()
        return path, ImageOps.exif_transpose(stored)


def _in_mode(spec: Picture, how: Json) -> Image.Image:
    if spec.kind == "shapes" and min(spec.width, spec.height) < 8:  # too small to draw them
        spec = replace(spec, kind="clouds")
    mode, picture = how["mode"], draw(spec)
    if mode in ("RGBA", "LA"):
        return draw(Picture(spec.kind, spec.width, spec.height, spec.seed, "RGBA")).convert(mode)
    if mode == "P-clear":
        indexed = picture.quantize(16)
        indexed.info["transparency"] = 3
        return indexed
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257 // 3)
    return picture.convert(mode)
