"""How much work fits into a time, by what work of the kind took before."""

from __future__ import annotations


class Pace:
    """Seconds for each unit of one kind of work (tokens, patches), from the pieces measured.

    A slower piece counts at once. A faster one counts by half: the first run of a kernel is slow,
    and a slice behind a short prompt is faster than one behind a long one.
    """

    def __init__(self) -> None:
        self.seconds_per_unit: float | None = None

    def note(self, units: int, seconds: float) -> None:
        """A piece of so many units (at least one) has taken so long."""
        new, old = seconds / units, self.seconds_per_unit
        self.seconds_per_unit = new if old is None else max(new, (old + new) / 2)

    def fitting(self, seconds: float) -> float:
        """Units that will take so long; none before the first piece is measured."""
        known = self.seconds_per_unit
        if known is None:
            return 0.0
        return seconds / known if known else float("inf")
