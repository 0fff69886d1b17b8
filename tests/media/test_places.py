"""Places of a schema: from the model's coordinates to pixels, however the text is cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlx_vlm_pipes import load
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.facts import Coordinates
from mlx_vlm_pipes.generate import main
from mlx_vlm_pipes.media.places import Places, marked_places
from mlx_vlm_pipes.media.records import MediaRecord, Tiles
from tests.fixtures_helper import FIXTURES

PIXELS = MediaRecord(
    "image", (1000, 500), (250, 100), (1, 1), Tiles(1, 1, (250, 100), (5, 5)),
    coordinates=Coordinates.PIXELS,
)  # fmt: skip
OTHER = replace(PIXELS, source_size=(2000, 2000), coordinates=Coordinates.THOUSANDTHS)
BOX = {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}
POINT = {"type": "array", "prefixItems": [{"type": "number"}] * 2, "minItems": 2, "maxItems": 2}
MARKED = {**BOX, "x-coordinates": "source", "x-image": 0}
SCHEMA = {
    "$defs": {
        "box/n": {"anyOf": [MARKED, {"type": "null"}]},
        "tree": {
            "properties": {
                "at": {**POINT, "x-coordinates": "source", "x-image": -1},
                "in": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
            }
        },
    },
    "type": "object",
    "properties": {
        "box": {"$ref": "#/$defs/box~1n"}, "size": BOX, "tree": {"$ref": "#/$defs/tree"},
        "label": {"type": "string"}, 'a"b': {"type": "array", "items": MARKED},
    },
    "additionalProperties": {"type": "array", "items": MARKED},
}  # fmt: skip
WRITTEN = {
    "box": [25, 10, 250, 100], "size": [25, 10, 250, 100], "label": 'a "[25, 10]" \\',
    "tree": {"at": [500, 250.5], "in": [{"at": [1e3, -10]}, {"in": []}]},
    'a"b': [[0, 1, 2, 3], [5, 5, 5, 5]], "more": [[1, 1, 1, 1]],
}  # fmt: skip
TOLD = {
    "box": [100, 50, 1000, 500], "size": [25, 10, 250, 100], "label": 'a "[25, 10]" \\',
    "tree": {"at": [1000, 501], "in": [{"at": [2000, -20]}, {"in": []}]},
    'a"b': [[0, 5, 8, 15], [20, 25, 20, 25]], "more": [[4, 5, 4, 5]],
}  # fmt: skip


def places(schema: dict[str, Any]) -> Places:
    found = marked_places(schema, [PIXELS, OTHER])
    assert found is not None
    return found


@pytest.mark.parametrize("indent", [None, 1])
def test_marked_numbers_are_pixels_however_the_text_is_cut(indent: int | None) -> None:
    text = json.dumps(WRITTEN, indent=indent)
    assert json.loads(places(SCHEMA).in_source(text)) == TOLD
    for size in (1, 2, 7):
        reader = places(SCHEMA).reader()
        parts = [reader.add(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join(parts) + reader.finish() == places(SCHEMA).in_source(text)
    cut = json.dumps(WRITTEN)[:12]
    assert cut == '{"box": [25,'
    assert places(SCHEMA).in_source(cut + " 10") == '{"box": [100, 50'
    assert places(SCHEMA).in_source(cut + " -") == '{"box": [100, -'
    assert places(SCHEMA).in_source(cut + " 1e400]") == '{"box": [100, 1e400]'


def test_a_schema_without_marks_has_no_places() -> None:
    assert marked_places({"properties": {"x-coordinates": BOX}}, []) is None
    assert marked_places({"type": "object"}, [PIXELS]) is None


FRACTIONS = replace(PIXELS, coordinates=Coordinates.FRACTIONS)
BARE = {**BOX, "x-coordinates": "source"}


@pytest.mark.parametrize(
    ("schema", "media", "words"),
    [
        ({**BOX, "x-coordinates": "model"}, [PIXELS], 'expected "source"'),
        (BARE, [], "no picture"),
        ({**BARE, "description": "x" * 70_000}, [PIXELS], "at most 65536"),
        (BARE, [PIXELS, OTHER], "say which"),
        ({**BARE, "x-image": 2}, [PIXELS, OTHER], "0 to 1"),
        ({**BARE, "x-image": -3}, [PIXELS, OTHER], "-1 for the last"),
        ({**BARE, "x-image": True}, [PIXELS, OTHER], "0 to 1"),
        (BARE, [FRACTIONS], "family"),
        ({"type": "integer", "x-coordinates": "source"}, [PIXELS], "minItems"),
        ({**BARE, "maxItems": 5}, [PIXELS], "minItems"),
        ({**BARE, "items": {"type": "string"}}, [PIXELS], "minItems"),
        ({"type": "array", "items": BOX, "x-coordinates": "source"}, [PIXELS], "minItems"),
        ({"patternProperties": {"a": BARE}}, [PIXELS], "patternProperties"),
        ({"$ref": "other.json", "x-coordinates": "source"}, [PIXELS], "other.json"),
    ],
)
def test_a_mark_that_cannot_be_followed_is_refused(
    schema: dict[str, Any], media: list[MediaRecord], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        marked_places(schema, media)


def test_an_answer_of_qwen2_5_vl_is_parsed_in_pixels() -> None:
    schema = {
        "type": "object",
        "properties": {"box": BARE, "raw": BOX},
        "required": ["box", "raw"],
        "additionalProperties": False,
    }
    with load(FIXTURES / "qwen25vl") as pipe:
        picture = Image.new("RGB", (300, 200), "red")
        asked = {"schema": schema, "temperature": 1.0, "seed": 3, "max_tokens": 200}
        answer = pipe.generate("Where?", picture, **asked)
        written, media = json.loads(answer.text), answer.media[0]
        assert media.resized_size != media.source_size
        assert answer.parsed["box"] == [round(v) for v in media.to_source(written["box"])]
        assert answer.parsed["raw"] == written["raw"]
        assert answer.parsed["box"] != written["box"]
        cut = pipe.generate("Where?", picture, **{**asked, "max_tokens": 5})
        with pytest.raises(InputError, match="max_tokens cut it"):
            _ = cut.parsed
        with pytest.raises(InputError, match="say which"):
            pipe.generate("Where?", [picture, picture], **asked)


def test_the_command_prints_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema, picture, model = tmp_path / "box.json", tmp_path / "a.png", FIXTURES / "qwen25vl"
    schema.write_text(json.dumps(BARE))
    Image.new("RGB", (300, 200), "red").save(picture)
    asked = {"schema": BARE, "temperature": 1.0, "seed": 3, "max_tokens": 200}
    with load(model) as pipe:
        own = pipe.generate("Where?", picture, **asked)
    flags = f"--model {model} --image {picture} --schema {schema} --temperature 1 --seed 3"
    for more in ([], ["--json"]):
        words = [*flags.split(), "--max-tokens", "200", "--quiet", "--prompt", "Where?", *more]
        assert main(words) == 0
        printed = json.loads(capsys.readouterr().out)
        assert (json.loads(printed["text"]) if more else printed) == own.parsed
    assert json.loads(own.text) != own.parsed
