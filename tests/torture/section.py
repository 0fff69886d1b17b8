"""A section: cases drawn one by one, each from a number of its own, and what holding means."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from mlx_vlm_pipes.errors import PipesError

T = TypeVar("T")
MAX_LINE = 4000  # characters of an error: weights that do not fit are listed, in ten groups


class Broken(AssertionError):
    """A case that does not hold; its text says how."""


@dataclass(frozen=True)
class Case:
    """about: what is tried, in one line. run: returns where it holds, raises where it does not."""

    about: str
    run: Callable[[], object]


class Section(ABC):
    """One part of the torture.

    small, whole: how many cases the test suite and a whole run try. limit_s: of one case, before it
    counts as hanging.
    Args: seed, of all its cases; folder, an empty one for its files.
    """

    small: ClassVar[int]
    limit_s: ClassVar[float] = 30.0

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder

    @property
    @abstractmethod
    def whole(self) -> int: ...

    @abstractmethod
    def draw(self, index: int) -> Case:
        """The case of this number; nothing runs yet."""

    def close(self) -> None:  # noqa: B027  # most have nothing
        """Let go of what the cases share."""

    def rng(self, index: int) -> random.Random:
        return random.Random(f"{type(self).__module__} {self.seed} {index}")


def require(held: object, line: str) -> None:
    """Raises: Broken with this line, unless it held."""
    if not held:
        raise Broken(line)


def one_line(error: PipesError) -> str:
    """The text of an error. Raises: Broken if it is not one short line."""
    text = str(error)
    require(text and "\n" not in text and len(text) <= MAX_LINE, f"no short line: {text!r}")
    return text


def refused(ask: Callable[[], object], kind: type[PipesError] = PipesError) -> str:
    """The line of the error. Raises: Broken if there was none, and whatever else was raised."""
    try:
        given = ask()
    except kind as error:
        return one_line(error)
    raise Broken(f"taken: {' '.join(repr(given).split())[:100]}")


def taken_or_refused(ask: Callable[[], T]) -> T | None:
    """What was given, None where it was refused in one line."""
    try:
        return ask()
    except PipesError as error:
        one_line(error)
        return None
