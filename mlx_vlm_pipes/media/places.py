"""Places in an answer of JSON, from the model's coordinates to pixels of the picture.

A schema marks an array of 2 or 4 numbers with `"x-coordinates": "source"`, and with `"x-image": i`
where there are several pictures (-1: the last). The form that the answer must have stays as it is,
bounds of its numbers included: those hold for what the model writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.errors import InputError, clip, shown
from mlx_vlm_pipes.facts import Coordinates
from mlx_vlm_pipes.media.records import FAR, MediaRecord

MARK, IMAGE = "x-coordinates", "x-image"
MAX_CHARACTERS = 64 * 1024  # of a schema, which is looked through for each array of an answer
NUMBER = frozenset("-+.eE0123456789")
Node = Mapping[str, Any]  # a schema within the schema


@dataclass(frozen=True)
class Places:
    """What a schema marks. media: the pictures that its places are in."""

    schema: Node
    media: tuple[MediaRecord, ...]

    def reader(self) -> PlaceReader:
        """For one answer."""
        return PlaceReader(self)

    def in_source(self, text: str) -> str:
        """A whole answer with its marked numbers as pixels of the picture."""
        reader = self.reader()
        return reader.add(text) + reader.finish()

    def picture_of(self, nodes: Iterable[Node]) -> MediaRecord | None:
        """Whose pixels a value of these schemas is to be in; None where it is not marked."""
        marked = next((node for node in nodes if MARK in node), None)
        return None if marked is None else self.media[marked.get(IMAGE, 0)]


def marked_places(schema: Node, media: Sequence[MediaRecord]) -> Places | None:
    """The places that a schema marks; None where it marks none.

    Raises: InputError for a mark that cannot be followed: on another value than an array of 2 or 4
    numbers, without a picture or without saying which, and for a model that writes no places.
    """
    written = json.dumps(schema)
    if MARK not in written:
        return None
    if len(written) > MAX_CHARACTERS:
        raise _refusal(
            f"{MARK} in a schema of {len(written)} characters; expected at most {MAX_CHARACTERS}"
        )
    nodes = _all_nodes(schema)
    marked = [node for node in nodes if MARK in node]
    for node in marked:
        _check_mark(node, media)
        _check_shape(schema, node)
    return Places(schema, tuple(media)) if marked else None


def _check_mark(node: Node, media: Sequence[MediaRecord]) -> None:
    if node[MARK] != "source":
        raise _refusal(f'{MARK} is {shown(node[MARK])}, expected "source"')
    if not media:
        raise _refusal(f"{MARK}: there is no picture whose pixels it could mean")
    index = node.get(IMAGE, 0)
    if IMAGE not in node and len(media) > 1:
        raise _refusal(f'{MARK}: there are {len(media)} pictures; say which: "{IMAGE}": 0')
    if type(index) is not int or not -len(media) <= index < len(media):
        raise _refusal(
            f"{IMAGE} is {shown(index)}, expected the number of a picture, 0 to {len(media) - 1}, "
            "or -1 for the last"
        )
    if media[index].coordinates is Coordinates.FRACTIONS:
        raise _refusal(
            f"{MARK}: no coordinates are known that this model's family writes; leave it out"
        )


def _check_shape(schema: Node, node: Node) -> None:
    arrays = [each for each in _same(schema, [node]) if "array" in _types(each)]
    if not arrays or not all(_is_place(schema, array) for array in arrays):
        raise _refusal(
            f"{MARK} stands on {clip(json.dumps(node))}; expected an array of numbers whose "
            "minItems and maxItems are both 2 or both 4"
        )


def _is_place(schema: Node, array: Node) -> bool:
    size = array.get("minItems")
    items = _listed(array.get("prefixItems")) or [array.get("items")]
    kinds = [kind for each in _same(schema, items) for kind in _types(each)]
    is_numeric = bool(kinds) and all(kind in ("integer", "number") for kind in kinds)
    return size in (2, 4) and array.get("maxItems") == size and is_numeric


def _refusal(message: str) -> InputError:
    return InputError(message, param="schema")


class PlaceReader:
    """Reads an answer as it comes and gives it on, marked numbers once they are whole."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._open: list[_Inside] = []
        self._number = ""  # of a place, not yet whole
        self._text: str | None = None  # the JSON text that is being read, its quotes included
        self._is_escaped = False

    def add(self, text: str) -> str:
        """What can be told behind this text."""
        return "".join([self._read(character) for character in text])

    def finish(self) -> str:
        """What was held back, at the end."""
        return self._taken()

    def _read(self, character: str) -> str:
        if self._text is not None:
            self._spell(character)
            return character
        inside = self._open[-1] if self._open else None
        if inside is not None and inside.picture is not None and character in NUMBER:
            self._number += character
            return ""
        before = self._taken()
        if character == '"':
            self._text = character
        elif character in "[{":
            nodes = [self._places.schema] if inside is None else inside.value_nodes()
            self._enter(_same(self._places.schema, nodes), is_list=character == "[")
        elif inside is not None and character in "]}":
            self._open.pop()
        elif inside is not None and character == ",":
            inside.go_on()
        return before + character

    def _enter(self, nodes: list[Node], *, is_list: bool) -> None:
        picture = self._places.picture_of(nodes) if is_list else None
        self._open.append(_Inside(nodes, is_list, picture))

    def _spell(self, character: str) -> None:
        """More of a text, which may be the key of the next value."""
        self._text = (self._text or "") + character
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            inside = self._open[-1] if self._open else None
            if inside is not None and not inside.is_list and inside.key is None:
                inside.key = json.loads(self._text, strict=False)
            self._text = None

    def _taken(self) -> str:
        """The number that is held, in whole pixels; as it is where no picture has so many."""
        number, self._number = self._number, ""
        try:
            value = float(number)
        except ValueError:  # nothing, or the beginning of a number
            return number
        picture, axis = self._open[-1].picture, self._open[-1].number % 2
        if picture is None or not abs(value) < FAR:
            return number
        return str(round(picture.to_source((value, value))[axis]))


@dataclass
class _Inside:
    """An array or object that is open. nodes: its schemas; number: of values before this one; key:
    of this one, None before it has come."""

    nodes: list[Node]
    is_list: bool
    picture: MediaRecord | None
    number: int = 0
    key: str | None = None

    def go_on(self) -> None:
        """To the next value."""
        self.number, self.key = self.number + 1, None

    def value_nodes(self) -> list[Any]:
        """The schemas of the value that comes."""
        if self.key is not None:
            return [_of_key(node, self.key) for node in self.nodes]
        return [_of_item(node, self.number) for node in self.nodes]


def _of_key(node: Node, key: str) -> Any:
    named = _named(node.get("properties"))
    return named[key] if key in named else node.get("additionalProperties")


def _of_item(node: Node, number: int) -> Any:
    first = _listed(node.get("prefixItems"))
    return first[number] if number < len(first) else node.get("items")


def _types(node: Node) -> list[Any]:
    kind = node.get("type")
    return kind if isinstance(kind, list) else [kind]


def _named(value: Any) -> Node:
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _same(schema: Node, nodes: Iterable[Any]) -> list[Node]:
    """The schemas that hold for the same value: these, what they refer to and consist of.

    Raises: InputError for a reference that leads nowhere in this schema.
    """
    found: dict[int, Node] = {}
    left = list(nodes)
    while left:
        node = left.pop()
        if not isinstance(node, Mapping) or id(node) in found:
            continue
        found[id(node)] = node
        left += [each for name in ("anyOf", "oneOf", "allOf") for each in _listed(node.get(name))]
        if "$ref" in node:
            left.append(_referred(schema, node["$ref"]))
    return list(found.values())


def _referred(schema: Node, pointer: Any) -> Any:
    """What a JSON pointer in a `$ref` names (RFC 6901)."""
    head, *steps = str(pointer).split("/")
    value: Any = schema if head == "#" else None
    for step in steps:
        key = step.replace("~1", "/").replace("~0", "~")
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        raise _refusal(f'{MARK}: the schema refers to {shown(pointer)}; expected "#/$defs/NAME"')
    return value


def _all_nodes(schema: Node) -> list[Node]:
    """Every schema that may hold for a value of an answer.

    Raises: InputError for keys by patterns: which value is meant is not worked out.
    """
    found: dict[int, Node] = {}
    left: list[Any] = [schema]
    while left:
        for node in _same(schema, [left.pop()]):
            if id(node) in found:
                continue
            found[id(node)] = node
            if "patternProperties" in node:
                raise _refusal(f"{MARK} and patternProperties: name the properties instead")
            left += [*_named(node.get("properties")).values(), *_listed(node.get("prefixItems"))]
            left += [node.get("items"), node.get("additionalProperties")]
    return list(found.values())
