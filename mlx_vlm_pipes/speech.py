"""What an answer says, as it comes: text for the reader, reasoning, calls of tools.

Models write calls in the form that their chat template taught them; `FORMS` has those of the
families. A marker that is cut between two pieces of text is held back until it is whole, as a stop
string is; what only looked like a call is text after all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

THINK, THOUGHT = "<think>", "</think>"


class Kind(Enum):
    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"
    ARGUMENTS = "arguments"


@dataclass(frozen=True)
class Piece:
    """A part of an answer. CALL: a call begins, its text is the function's name; ARGUMENTS: more
    of the JSON text of that call's arguments. call: its number, from 0."""

    kind: Kind
    text: str
    call: int = -1


@dataclass(frozen=True)
class CallForm:
    """How a family writes calls.

    signs: what stands in a chat template that teaches it. begin, end: around the calls. tokens:
    special tokens that its text must keep. named: the function's name stands before the arguments,
    up to `named`, not in the JSON. is_bare: an answer that begins with a JSON object is a call.
    """

    signs: tuple[str, ...]
    begin: str
    end: str = ""
    tokens: tuple[str, ...] = ()
    named: str = ""
    is_bare: bool = False


FORMS = {
    "hermes": CallForm(("<tool_call>",), "<tool_call>", "</tool_call>"),
    "mistral": CallForm(
        ("[TOOL_CALLS]",), "[TOOL_CALLS]", tokens=("[TOOL_CALLS]", "[ARGS]"), named="[ARGS]"
    ),
    "llama3": CallForm(
        ("<|python_tag|>", '"parameters": dictionary'),
        "<|python_tag|>",
        tokens=("<|python_tag|>",),
        is_bare=True,
    ),
}
_ARGUMENTS = ("arguments", "parameters")
_KEYS = {"name", "type", "id", *_ARGUMENTS}
MAX_NAME = 200
_BETWEEN = " \t\r\n,;[]"  # what stands before, between and after calls


def call_form(template: str) -> CallForm | None:
    """The form that a chat template teaches, None for one that teaches none of ours."""
    for form in FORMS.values():
        if any(sign in template for sign in form.signs):
            return form
    return None


class Speech:
    """One answer. form: how it calls, None where it may not. thinks: whether its family writes
    reasoning between `<think>` and `</think>`; is_thinking: the prompt has opened it already."""

    def __init__(
        self, form: CallForm | None = None, *, thinks: bool = False, is_thinking: bool = False
    ) -> None:
        self._form = form
        self._held = ""
        self._calls = -1
        self._is_over = False
        self._reader: _Call | None = None
        self._state = self._begin
        if is_thinking:
            self._state = self._think
        elif not thinks:
            self._state = self._start if form is not None and form.is_bare else self._tell
        self._is_fresh = is_thinking  # nothing but space has been told since a marker

    def add(self, text: str) -> list[Piece]:
        """The pieces that this text completes."""
        self._held += text
        return _joined(self._run())

    def finish(self) -> list[Piece]:
        """What was held back, at the end."""
        self._is_over = True
        pieces = list(self._run())
        if self._reader is not None and not self._reader.is_told:
            pieces.append(Piece(Kind.TEXT, self._reader.raw))
        return _joined(pieces)

    def _run(self) -> Iterator[Piece]:
        while True:
            before = (self._state, self._held)
            yield from self._state()
            if (self._state, self._held) == before:
                return

    def _begin(self) -> Iterator[Piece]:
        """Before the first word, which may be `<think>`."""
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held, self._state, self._is_fresh = text[len(THINK) :], self._think, True
        elif self._is_over or not THINK.startswith(text):
            bare = self._form is not None and self._form.is_bare
            self._state = self._start if bare else self._tell
        yield from ()

    def _think(self) -> Iterator[Piece]:
        thought, marker, rest = self._held.partition(THOUGHT)
        if marker:
            yield from self._told(Kind.REASONING, thought)
            bare = self._form is not None and self._form.is_bare
            self._held, self._state = rest, self._start if bare else self._tell
            self._is_fresh = True
        else:
            keep = 0 if self._is_over else overlap(thought, THOUGHT)
            yield from self._told(Kind.REASONING, thought[: len(thought) - keep])
            self._held = thought[len(thought) - keep :]

    def _start(self) -> Iterator[Piece]:
        """At the first word of an answer that is a call if it is a JSON object."""
        text = self._held.lstrip()
        if text.startswith("{"):
            self._reader, self._state = _Call(self._held[: -len(text)]), self._call
            self._held = text
        elif text or self._is_over:
            self._state = self._tell
        yield from ()

    def _tell(self) -> Iterator[Piece]:
        """Text, up to the marker of a call."""
        form = self._form
        begin = form.begin if form is not None else ""
        if form is not None and begin in self._held:
            text, _, self._held = self._held.partition(begin)
            yield from self._told(Kind.TEXT, text.rstrip())
            self._reader, self._state = _Call(begin, form.named), self._call
            return
        safe = self._held
        if begin and not self._is_over:  # what may begin the marker, and space before it
            safe = safe[: len(safe) - overlap(safe, begin)].rstrip()
        self._held = self._held[len(safe) :]
        yield from self._told(Kind.TEXT, safe)

    def _call(self) -> Iterator[Piece]:
        """One call: its name and arguments, or text after all."""
        reader = self._reader
        assert reader is not None
        self._held = reader.read(self._held)
        if reader.is_foreign:
            self._held = reader.raw + self._held
            self._reader, self._state = None, self._plain
            return
        if reader.name is not None and not reader.is_told:
            reader.is_told = True
            self._calls += 1
            yield Piece(Kind.CALL, reader.name, self._calls)
        if reader.fresh:
            yield Piece(Kind.ARGUMENTS, reader.take(), self._calls)
        if reader.is_done:
            self._reader, self._state = None, self._after

    def _after(self) -> Iterator[Piece]:
        """Behind a call: another one, the closing marker, or text again."""
        form = self._form
        assert form is not None
        text = self._held.lstrip(_BETWEEN)
        if form.end and text.startswith(form.end):
            self._held, self._state, self._is_fresh = text[len(form.end) :], self._tell, True
        elif text.startswith("{"):
            self._held, self._reader, self._state = text, _Call(""), self._call
        elif self._is_over or (text and not form.end.startswith(text)):
            self._held, self._state, self._is_fresh = text, self._tell, True
        yield from ()

    def _plain(self) -> Iterator[Piece]:
        """What looked like a call: its marker is text too."""
        text, self._held = self._held, ""
        self._state = self._tell
        yield from self._told(Kind.TEXT, text)

    def _told(self, kind: Kind, text: str) -> Iterator[Piece]:
        """Without the space behind a marker."""
        if self._is_fresh:
            text = text.lstrip()
        if text:
            self._is_fresh = False
            yield Piece(kind, text)


class _Call:
    """Reads one call, character by character: {"name": ..., "arguments": {...}}, or the name and
    then the arguments alone.

    raw: all that it has read, its marker first. name: None until it is known, with the arguments
    begun. fresh: of the arguments, what was not taken yet.
    """

    def __init__(self, marker: str, named: str = "") -> None:
        self.raw = marker
        self.name: str | None = None
        self.fresh = ""
        self.is_told = self.is_done = self.is_foreign = False
        self._must_call = bool(marker)
        self._named = named
        self._before = ""  # what stands before the JSON
        self._object = _Object()

    def take(self) -> str:
        fresh, self.fresh = self.fresh, ""
        return fresh

    def read(self, text: str) -> str:
        """Take what belongs to the call. Returns: the rest."""
        for i, character in enumerate(text):
            if self.is_done or self.is_foreign:
                return text[i:]
            self.raw += character
            if self._object.depth == 0 and character != "{":
                self._read_before(character)
            elif self._named and self._before.strip(_BETWEEN):
                self._read_arguments(character)
            else:
                self._read_object(character)
        return ""

    def _read_before(self, character: str) -> None:
        if self._named and len(self._before) < MAX_NAME:
            self._before += character
        elif character not in _BETWEEN:
            self.is_foreign = True

    def _read_arguments(self, character: str) -> None:
        if self.name is None:
            self.name = self._before.replace(self._named, "").strip()
        self._object.read(character)
        self.fresh += character
        self.is_done = self._object.depth == 0

    def _read_object(self, character: str) -> None:
        self._object.read(character)
        values = self._object.values
        if not values.keys() <= _KEYS and self.name is None:
            self.is_foreign = True
        elif self._object.depth == 0:
            self._finish()
        elif self._object.key in _ARGUMENTS:
            self._stream(values[self._object.key])

    def _stream(self, arguments: str) -> None:
        """More of the arguments, once the name is known; a JSON text in a string waits."""
        begun = arguments.lstrip()
        if not begun or begun.startswith('"'):
            return
        if self.name is not None:
            self.fresh += arguments[-1]
        elif "name" in self._object.values:
            self.name, self.fresh = _unquoted(self._object.values["name"]), begun

    def _finish(self) -> None:
        self.is_done = True
        if self.name is not None:
            return
        values = self._object.values
        given = next((values[key] for key in _ARGUMENTS if key in values), None)
        name = _unquoted(values.get("name", ""))
        if not name or (given is None and not self._must_call):
            self.is_foreign = True
        else:
            self.name, self.fresh = name, _argument_text(given)


class _Object:
    """A JSON object that comes character by character: the texts of its values.

    depth: of brackets that are open. key: whose value is being read.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.values: dict[str, str] = {}
        self.key: str | None = None
        self._word = ""  # the last text at depth 1: a key, where a colon follows
        self._in_text = self._is_escaped = False

    def read(self, character: str) -> None:
        if self._in_text:
            self._spell(character)
        elif self.depth == 1 and self.key is None and character == ":":
            self.key = _unquoted(self._word)
            self.values[self.key] = ""
            return
        elif self.depth == 1 and character in ",}":
            self.key, self._word = None, ""
        elif character == '"':
            self._in_text = True
            self._word = character
        if character in "{[" and not self._in_text:
            self.depth += 1
        elif character in "}]" and not self._in_text:
            self.depth -= 1
        if self.key is not None:
            self.values[self.key] += character

    def _spell(self, character: str) -> None:
        self._word += character
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_text = False


def _argument_text(value: str | None) -> str:
    """The arguments as a JSON text; some models write that text as a JSON string again."""
    text = (value or "").strip()
    return (_unquoted(text) if text.startswith('"') else text) or "{}"


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text.strip(), strict=False)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def overlap(text: str, marker: str) -> int:
    """Length of the longest tail of `text` that begins `marker`."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0


def _joined(pieces: Iterator[Piece] | list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one."""
    out: list[Piece] = []
    for piece in pieces:
        if (
            out
            and (out[-1].kind, out[-1].call) == (piece.kind, piece.call)
            and piece.kind is not Kind.CALL
        ):
            out[-1] = Piece(piece.kind, out[-1].text + piece.text, piece.call)
        else:
            out.append(piece)
    return out
