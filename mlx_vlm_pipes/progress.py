"""Bars for what takes its time, on a terminal or in a notebook: one at a time, gone in the end.

Whoever works tells a `Watch` how far it has come. Only `Bar` knows tqdm, and imports it when the
first bar is drawn.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

DELAY_S = 0.5  # what is done sooner gets no bar
MAX_COLUMNS = 80
WAIT_S = 0.25  # how often whoever waits looks after the bar
NOTE_S, CLOCK_S = 0.1, 1.0  # between two drawings, with news and without

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Work:
    """How far something has come: done of total, both in `unit` ("B" for bytes)."""

    what: str
    done: int
    total: int
    unit: str


class Watch(Protocol):
    """Is told of work; safe from any thread."""

    def note(self, work: Work) -> None:
        """It has come so far. Another `what` ends the one before."""
        ...

    def wait(self) -> None:
        """Time has passed, and nothing is known of the work."""
        ...

    def close(self) -> None:
        """It is over: what is noted later is not shown."""
        ...


def noted(items: Sequence[ItemT], watch: Watch | None, what: str, unit: str) -> Iterator[ItemT]:
    """The items, each noted before it is worked on."""
    for done, item in enumerate(items):
        if watch is not None:
            watch.note(Work(what, done, len(items), unit))
        yield item


class Bar:
    """A `Watch` that draws a line on standard error, or in a notebook's output.

    A line that another bar has is left to it.
    """

    def __init__(self) -> None:
        self._work: Work | None = None
        self._drawn: Any = None
        self._begun = self._drawn_at = 0.0
        self._is_closed = False
        self._lock = threading.Lock()

    def note(self, work: Work) -> None:
        with self._lock:
            if self._is_closed:
                return
            if self._work is None or self._work.what != work.what:
                self._erase()
                self._begun = time.monotonic()
            self._work = work
            self._draw(work, NOTE_S)

    def wait(self) -> None:
        with self._lock:
            if self._work is not None and not self._is_closed:
                self._draw(self._work, CLOCK_S)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._erase()

    def _draw(self, work: Work, interval_s: float) -> None:
        """Draw it, but not again within `interval_s`."""
        now = time.monotonic()
        if self._drawn is None:
            if now - self._begun < DELAY_S or not _LINE.acquire(blocking=False):
                return
            self._drawn = _new_bar(work)
        elif now - self._drawn_at < interval_s:
            return
        self._drawn_at = now
        self._drawn.total = work.total
        self._drawn.n = work.done
        self._drawn.refresh()

    def _erase(self) -> None:
        if self._drawn is not None:
            erase(self._drawn)
            self._drawn = None
            _LINE.release()


class Waiting:
    """The `Watch` of a part: of its work nothing is shown, only that time passes for the whole."""

    def __init__(self, whole: Watch) -> None:
        self._whole = whole

    def note(self, work: Work) -> None:
        del work
        self._whole.wait()

    def wait(self) -> None:
        self._whole.wait()

    def close(self) -> None:
        """The whole goes on."""


@contextmanager
def bar(*, is_on: bool) -> Iterator[Bar | None]:
    """A bar that is gone at the end; None where there shall be none."""
    if not is_on:
        yield None
        return
    drawn = Bar()
    try:
        yield drawn
    finally:
        drawn.close()


_LINE = threading.Lock()  # a screen has one line for bars


_HIDDEN: ContextVar[bool] = ContextVar("_HIDDEN", default=False)


@contextmanager
def hidden(*, is_hidden: bool = True) -> Iterator[None]:
    """Within, nothing is shown that is not asked for: of a command whose output programs read."""
    token = _HIDDEN.set(is_hidden)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def is_wanted(progress: bool | None) -> bool:  # noqa: FBT001  # what `load` was given
    """Whether bars are to be shown; None: where they can be seen and erased again.

    TQDM_DISABLE, tqdm's own variable, wins.
    """
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        return False
    if progress is not None:
        return progress
    if _HIDDEN.get():
        return False
    return _is_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def _is_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _new_bar(work: Work) -> Any:
    arguments = {"total": work.total, "initial": work.done, "desc": work.what, **style(work.unit)}
    if _is_notebook() and importlib.util.find_spec("ipywidgets") is None:
        from tqdm import tqdm  # tqdm.auto would warn that it cannot draw a widget

        return tqdm(**arguments, file=sys.stdout)  # standard error is printed on red there
    from tqdm.auto import tqdm

    return tqdm(**arguments)


def style(unit: str) -> dict[str, Any]:
    """Arguments of tqdm that our bars share. A line is left room for a ^C, which would wrap it."""
    is_bytes = unit == "B"
    counts = "{n_fmt}B/{total_fmt}B, {rate_fmt}" if is_bytes else "{n_fmt}/{total_fmt}"
    line = "{desc}: {percentage:3.0f}%|{bar}| " + counts + " [{elapsed}<{remaining}]"
    return {
        "unit": unit,
        "unit_scale": is_bytes,
        "bar_format": line,
        "leave": False,
        "ncols": min(_columns(), MAX_COLUMNS) - 4,
    }


def erase(drawn: Any) -> None:
    """Close a bar of tqdm, and clear what the terminal has echoed behind it."""
    was_shown = not drawn.disable
    drawn.close()
    if was_shown and not _is_notebook() and sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or MAX_COLUMNS
    except (OSError, ValueError):  # no terminal, or none that knows
        return MAX_COLUMNS
