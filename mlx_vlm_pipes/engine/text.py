"""From tokens to the text a user sees: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlx_vlm_pipes.speech import overlap


class StreamDecoder(Protocol):
    """Turns tokens into text as they come; holds incomplete characters back."""

    def add(self, token: int) -> str: ...

    def flush(self) -> str: ...


class NoText:
    """The decoder of a request that makes no tokens."""

    def add(self, token: int) -> str:
        raise RuntimeError(f"token {token} for a request that makes none")

    def flush(self) -> str:
        return ""


class TextStream:
    """One request's text. A stop string ends it and never appears, also across token borders.

    stopped_by: the stop string that has ended it.
    """

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stops = [stop for stop in stops if stop]
        self._held = ""  # the longest tail that may still become a stop string
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def add(self, token: int) -> str:
        """The text that is safe to show after this token."""
        return self._release(self._decoder.add(token))

    def finish(self) -> str:
        """What was held back, at the end of the tokens."""
        if self.stopped:
            return ""
        shown = self._release(self._decoder.flush())
        if self.stopped:
            return shown
        shown, self._held = shown + self._held, ""
        return shown

    def _release(self, piece: str) -> str:
        if not self._stops or self.stopped:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            at, self.stopped_by = min(found)
            self._held = ""
            return text[:at]
        keep = max(overlap(text, stop) for stop in self._stops)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]
