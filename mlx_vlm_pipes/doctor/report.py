"""The findings of an examination, as lines and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_vlm_pipes.errors import PipesError

GB = 1e9


@dataclass(frozen=True)
class Finding:
    """level: "error" (does not load, or answers wrongly) or "warning"; where: what is at fault."""

    level: str
    where: str
    text: str


@dataclass(frozen=True)
class Part:
    """Elements (before packing) and bytes in the files of one part of the model."""

    parameters: int
    nbytes: int


@dataclass(frozen=True)
class RankPart:
    """What one of several ranks holds and reads; the tower's bytes are 0 on all but the first."""

    weight_bytes: int
    embedding_bytes: int
    tower_bytes: int
    read_bytes: int
    kv_heads: int
    kv_token_bytes: int


@dataclass(frozen=True)
class RanksPlan:
    """A model on several ranks: loading takes a rank's weights and, for a while, the largest
    tensor; sums, gathers and bytes are those of a token, the bytes what each rank sends."""

    ranks: list[RankPart]
    kv_heads: int
    largest_tensor_bytes: int
    sums: int
    gathers: int
    sent_bytes: int


@dataclass
class Checkup:
    """Facts and findings. None and empty where an error kept us from knowing."""

    folder: str
    architecture: str | None = None
    layout: str | None = None
    dtypes: dict[str, int] = field(default_factory=dict)  # name -> bytes
    quantization: str | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    embeddings: str | None = None
    chat_template: str | None = None
    ignored: list[str] = field(default_factory=list)  # code and pickles
    max_tokens: int | None = None
    load_bytes: int | None = None
    run_bytes: int | None = None
    ranks: RanksPlan | None = None  # where somebody asked for several
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def is_usable(self) -> bool:
        return not self.errors

    def error(self, where: str, text: object) -> None:
        self._add("error", where, text)

    def warn(self, where: str, text: object) -> None:
        self._add("warning", where, text)

    def _add(self, level: str, where: str, text: object) -> None:
        finding = Finding(level, where, " ".join(str(text).split()))
        if finding not in self.findings:
            self.findings.append(finding)

    @contextmanager
    def collecting(self, where: str) -> Iterator[None]:
        """What is raised on purpose inside becomes a finding."""
        try:
            yield
        except PipesError as error:
            self.error(where, error)

    @property
    def verdict(self) -> str:
        warnings = len(self.findings) - len(self.errors)
        if self.errors:
            return f"not usable: {len(self.errors)} errors, {warnings} warnings"
        return f"usable, {warnings} warnings" if warnings else "good"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "usable": self.is_usable, "verdict": self.verdict}

    def lines(self) -> list[str]:
        """The report for a person: facts, then findings, then the verdict."""
        facts = [
            ("folder", self.folder),
            ("architecture", self.architecture),
            ("layout", self.layout),
            ("dtypes", ", ".join(f"{k} {_size(v)}" for k, v in self.dtypes.items())),
            ("quantised", self.quantization),
            *((name, _describe(part)) for name, part in self.parts.items()),
            ("embeddings", self.embeddings),
            ("chat template", self.chat_template),
            ("ignored", ", ".join(self.ignored)),
            ("context", None if self.max_tokens is None else f"{self.max_tokens} tokens"),
            ("memory", self._memory()),
            *self._ranks(),
        ]
        lines = [f"{name + ':':15}{value}" for name, value in facts if value]
        lines += [f"{finding.level}: {finding.where}: {finding.text}" for finding in self.findings]
        return [*lines, f"verdict: {self.verdict}"]

    def _memory(self) -> str | None:
        if self.load_bytes is None or self.run_bytes is None:
            return None
        return f"{_size(self.load_bytes)} to load, {_size(self.run_bytes)} to run 4096 tokens"

    def _ranks(self) -> Iterator[tuple[str, str]]:
        plan = self.ranks
        if plan is None:
            return
        for number, part in enumerate(plan.ranks):
            heads = f"{part.kv_heads} of {plan.kv_heads} heads"
            cache = f"cache {part.kv_token_bytes:,} bytes a token ({heads})"
            yield (
                f"rank {number}",
                f"{_size(part.weight_bytes)}, reads {_size(part.read_bytes)}; {cache}",
            )
        first = plan.ranks[0]
        yield (
            "on each rank",
            f"{_size(first.embedding_bytes)} of embedding; while loading up to"
            f" {_size(plan.largest_tensor_bytes)} more",
        )
        if first.tower_bytes:
            yield "on rank 0", f"{_size(first.tower_bytes)} of vision"
        gathers = f" and {plan.gathers} gather" if plan.gathers else ""
        yield "each token", f"{plan.sums} sums{gathers}, {_size(plan.sent_bytes)} sent by each rank"


def _describe(part: Part) -> str:
    return f"{part.parameters:,} parameters, {_size(part.nbytes)}"


def _size(nbytes: int) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
