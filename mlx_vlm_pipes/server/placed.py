"""Marked numbers of an answer, or of its calls' arguments, as pixels while they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.media.places import PlaceReader, Places, marked_places
from mlx_vlm_pipes.media.records import MediaRecord
from mlx_vlm_pipes.speech import Kind, Piece


def marked_tools(
    tools: Sequence[Mapping[str, Any]], media: Sequence[MediaRecord]
) -> dict[str, Places]:
    """By the name of a function: the places that its parameters mark.

    Raises: InputError, as `marked_places`.
    """
    found: dict[str, Places] = {}
    for tool in tools:
        function = tool["function"]
        try:
            places = marked_places(function.get("parameters") or {}, media)
        except InputError as error:
            raise InputError(str(error), param="tools") from None
        if places is not None:
            found[function["name"]] = places
    return found


class Placed:
    """One answer's pieces on their way. text: the places of its form; calls: as `marked_tools`."""

    def __init__(self, text: Places | None, calls: Mapping[str, Places]) -> None:
        self._text = None if text is None else text.reader()
        self._calls = calls
        self._arguments: PlaceReader | None = None  # of the call that is being told
        self._call = -1

    def add(self, pieces: Sequence[Piece], *, is_last: bool) -> list[Piece]:
        """The pieces, without a number that may go on."""
        told = [replace(piece, text=self._told(piece)) for piece in pieces]
        if is_last and self._text is not None:
            told.append(Piece(Kind.TEXT, self._text.finish()))
        if is_last and self._arguments is not None:
            told.append(Piece(Kind.ARGUMENTS, self._arguments.finish(), self._call))
        return [piece for piece in told if piece.text]

    def _told(self, piece: Piece) -> str:
        if piece.kind is Kind.CALL:
            places = self._calls.get(piece.text)
            self._arguments, self._call = places and places.reader(), piece.call
        elif piece.kind is Kind.TEXT and self._text is not None:
            return self._text.add(piece.text)
        elif piece.kind is Kind.ARGUMENTS and self._arguments is not None:
            return self._arguments.add(piece.text)
        return piece.text
