"""Whether steps over drafts pay here: by the time that such steps and plain ones have taken.

What a step over eight tokens costs beside one over one differs from device to device: 1.3 times
with OpenBLAS, seven times with the reference BLAS of MLX's Linux wheel. So both are timed, by the
number of rows and tokens, and drafts are run where they are expected to win. Where they lost, they
are tried again for a hundredth of the time that plain steps have taken since.
"""

from __future__ import annotations

from collections import deque

from mlx_vlm_pipes.engine.drafts import WIDEST

SAMPLES = 5  # of a kind of step, the latest: their median counts
ENOUGH = 2  # before plain steps are believed: the first may have compiled something
UNTIMED = 0.5  # plain steps for each token of a row in a step over drafts, before it is timed,
WIDER = 1.5  # or steps over half the tokens, where these are
SPENT = 0.01  # share of plain steps' time that trials may cost
MOST_LOST = 20.0  # plain steps: what is held against drafts

Size = tuple[int, int, bool]  # rows, tokens of each; whether a smaller model drafts for some


class Worth:
    """The seconds of steps, and what drafts have lost so far."""

    def __init__(self) -> None:
        self._samples: dict[Size, deque[float]] = {}
        self._usual: dict[Size, float] = {}  # seconds: medians, of two in the middle the larger
        self._lost = 0.0  # seconds; below 0: what a trial may cost

    def note_plain(self, rows: int, seconds: float) -> None:
        """A step over one token of each row has taken so long."""
        self._note((rows, 1, False), seconds)
        dearest = max(seconds * UNTIMED * WIDEST, max(self._usual.values()))
        self._lost = max(self._lost - SPENT * seconds, -dearest)

    def note(self, size: Size, tokens: int, seconds: float) -> None:
        """A step over drafts has given so many tokens in all."""
        self._note(size, seconds)
        plain = self._usual.get((size[0], 1, False))
        if plain is not None:
            own = self._seconds(size, plain)
            lost = max(self._lost, 0.0) + own - plain * tokens / size[0]
            self._lost = min(max(lost, 0.0), MOST_LOST * plain)

    def gain(self, size: Size, expected: float) -> float:
        """How many times faster than plain steps such a step is expected to be; 0: not worth it.

        expected: drafted tokens that will be kept, of all rows.
        """
        rows = size[0]
        plain = self._usual.get((rows, 1, False))
        if plain is None or len(self._samples[(rows, 1, False)]) < ENOUGH:
            return 0.0
        own, instead = self._seconds(size, plain), plain * (1 + expected / rows)
        return instead / own if instead - own >= self._lost else 0.0

    def _seconds(self, size: Size, plain: float) -> float:
        """Of a step over drafts; a guess, where it has not been timed. The narrow one is guessed to
        be cheap, so that it comes first: its trial costs less."""
        rows, width, by_model = size
        narrower = self._usual.get((rows, width // 2, by_model))
        guessed = plain * UNTIMED * width if narrower is None else WIDER * narrower
        return self._usual.get(size, guessed)

    def _note(self, size: Size, seconds: float) -> None:
        samples = self._samples.setdefault(size, deque(maxlen=SAMPLES))
        samples.append(seconds)
        self._usual[size] = sorted(samples)[len(samples) // 2]
