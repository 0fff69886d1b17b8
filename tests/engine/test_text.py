"""Text as it streams: whole characters, and nothing of a stop string."""

from __future__ import annotations

import random

import pytest

from mlx_vlm_pipes.engine.text import TextStream


class Pieces:
    """A decoder whose tokens are indices into a list of pieces; the last is held back."""

    def __init__(self, pieces: list[str], held: str = "") -> None:
        self.pieces, self.held = pieces, held

    def add(self, token: int) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return self.held


def run(pieces: list[str], stops: list[str], held: str = "") -> tuple[list[str], bool]:
    stream = TextStream(Pieces(pieces, held), stops)
    shown = []
    for i in range(len(pieces)):
        shown.append(stream.add(i))
        if stream.stopped:
            return shown, True
    return [*shown, stream.finish()], stream.stopped


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "stopped"),
    [
        (["one ", "STOP", " two"], ["STOP"], "one ", True),
        (["one S", "TO", "P two"], ["STOP"], "one ", True),
        (["one S", "TO", "AP"], ["STOP"], "one STOAP", False),
        (["a", "ab", "abac"], ["abac"], "aab", True),
        (["x\n", "\n", "y"], ["\n\n"], "x", True),
        (["one ST"], ["STOP"], "one ST", False),
        (["abcd"], ["d", "bc"], "a", True),
        (["ab"], ["abc", ""], "ab", False),
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], text: str, stopped: bool) -> None:
    shown, ended = run(pieces, stops)
    assert ("".join(shown), ended) == (text, stopped)


def test_a_stop_string_in_what_the_decoder_held_back() -> None:
    assert run(["on", "e S"], ["STOP"], held="TOP!") == (["on", "e ", ""], True)


def test_nothing_of_a_stop_string_is_ever_shown() -> None:
    random.seed(0)
    for _ in range(500):
        text = "".join(random.choices("ab", k=24))
        stops = ["".join(random.choices("ab", k=random.randint(2, 6))) for _ in range(2)]
        pieces, rest = [], text
        while rest:
            size = random.randint(1, 5)
            pieces.append(rest[:size])
            rest = rest[size:]
        shown, stopped = run(pieces, stops)
        cuts = [text.find(stop) for stop in stops if stop in text]
        # what is shown is what precedes the stop string that is complete first
        assert "".join(shown) == (text if not cuts else "".join(shown))
        assert stopped == bool(cuts)
        assert not any(stop in "".join(shown) for stop in stops)
        assert text.startswith("".join(shown))
