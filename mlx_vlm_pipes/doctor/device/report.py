"""What was found on a machine: checks with their bars, figures, one verdict; as lines and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_vlm_pipes.errors import clip

Emit = Callable[[dict[str, Any]], None]
Figures = dict[str, dict[str, Any]]  # by subject, then by name
NAMED = 3  # failed checks that the verdict names


@dataclass(frozen=True)
class Check:
    """One comparison. text: what was seen, in words; remedy: what to do where it is not ok."""

    part: str
    name: str
    ok: bool
    text: str
    value: float | None = None
    bar: float | None = None
    remedy: str = ""

    def __str__(self) -> str:
        advice = f"; {self.remedy}" if self.remedy and not self.ok else ""
        return f"{'ok' if self.ok else 'WRONG':6}{self.name}: {self.text}{advice}"


class Recorder:
    """Sends on what a part finds, as it finds it: {"doing": ..}, {"check": ..}, {"figures": ..}."""

    def __init__(self, part: str, emit: Emit) -> None:
        self._part, self._emit = part, emit
        self._remedy = ""

    @contextmanager
    def trying(self, name: str, remedy: str = "") -> Iterator[None]:
        """What fails inside, and what raises, is reported with this remedy; nothing is raised."""
        self._emit({"doing": name})
        before, self._remedy = self._remedy, remedy
        try:
            yield
        except Exception as error:  # a kernel that is missing must not hide what else is wrong
            text = f"raised {type(error).__name__}: {clip(' '.join(str(error).split()), 200)}"
            self._add(name, text, ok=False)
        finally:
            self._remedy = before

    def at_most(self, name: str, value: float, bar: float, unit: str = "") -> None:
        """A difference that must not be above its bar; one that is no number is."""
        text = f"{value:.2g}{unit} (at most {bar:.2g})"
        self._add(name, text, value=value, bar=bar, ok=value <= bar)

    def all_of(self, name: str, right: int, total: int) -> None:
        """So many of so many were as they should be."""
        self._add(name, f"{right} of {total}", value=right, bar=total, ok=right == total > 0)

    def figures(self, subject: str, values: Mapping[str, Any]) -> None:
        """What is neither right nor wrong; numbers are rounded to four digits."""
        self._emit({"figures": {subject: {name: _rounded(v) for name, v in values.items()}}})

    def _add(
        self,
        name: str,
        text: str,
        *,
        ok: bool,
        value: float | None = None,
        bar: float | None = None,
    ) -> None:
        found = Check(self._part, name, ok, text, _rounded(value), bar, self._remedy)
        self._emit({"check": asdict(found)})


@dataclass
class DeviceReport:
    """The whole of it. machine: chip, system and versions by name."""

    machine: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    figures: Figures = field(default_factory=dict)

    def take(self, message: Mapping[str, Any]) -> None:
        """What a part has sent on."""
        if "check" in message:
            self.checks.append(Check(**message["check"]))
        self.machine.update(message.get("machine", {}))
        for subject, values in message.get("figures", {}).items():
            self.figures.setdefault(subject, {}).update(values)

    def fail(self, part: str, text: str, remedy: str) -> None:
        """A part that did not come to its end."""
        self.checks.append(Check(part, part, ok=False, text=text, remedy=remedy))

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]

    @property
    def is_trusted(self) -> bool:
        return bool(self.checks) and not self.failed

    @property
    def verdict(self) -> str:
        failed, total = self.failed, len(self.checks)
        if self.is_trusted:
            return f"trusted: all {total} comparisons hold on this machine"
        if not failed:
            return "not trusted: nothing was compared"
        named = "; ".join(f"{check.name}: {check.text}" for check in failed[:NAMED])
        more = f"; {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        remedies = list(dict.fromkeys(check.remedy for check in failed if check.remedy))
        advice = f". What to do: {'; '.join(remedies[:NAMED])}" if remedies else ""
        return f"not trusted: {len(failed)} of {total} comparisons fail: {named}{more}{advice}"

    def as_dict(self) -> dict[str, Any]:
        """What can be pasted into a report: checks as [name, ok, value, bar, text] by part."""
        checks: dict[str, list[Any]] = {}
        for one in self.checks:
            row = [one.name, one.ok, one.value, one.bar, one.text]
            checks.setdefault(one.part, []).append(row)
        return {
            "machine": self.machine,
            "trusted": self.is_trusted,
            "verdict": self.verdict,
            "checks": checks,
            "figures": self.figures,
        }

    def lines(self) -> list[str]:
        """The report for a person: machine, checks by part, figures, then the verdict."""
        lines = [f"{name + ':':22}{value}" for name, value in self.machine.items()]
        for part in dict.fromkeys(check.part for check in self.checks):
            lines += ["", f"{part}:"]
            lines += [f"  {check}" for check in self.checks if check.part == part]
        for subject, values in self.figures.items():
            lines += ["", f"{subject}:"]
            lines += [f"  {name + ':':40}{_shown(value)}" for name, value in values.items()]
        return [*lines, "", f"verdict: {self.verdict}"]


def _rounded(value: Any) -> Any:
    """A number to four digits, None for one that JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
