"""Drafts that are known to be right, but for some, so that every way through a step is taken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlx_vlm_pipes import GenerationResult
from mlx_vlm_pipes.engine import lookup
from mlx_vlm_pipes.engine.worth import Size, Worth


def draft_from(
    monkeypatch: pytest.MonkeyPatch, known: Sequence[list[int]], wrong_each: int = 4
) -> None:
    """Rows always draft what follows in the known sequences; each so manieth token is wrong.

    A row that is not known drafts its last token.
    """

    def propose(tokens: np.ndarray, count: int) -> list[int]:
        size, own = len(tokens), tokens.tolist()
        found = next((k for k in known if len(k) > size and k[:size] == own), [])
        drafted = found[size : size + count] or own[-1:]
        return [
            token ^ 1 if (size + i) % wrong_each == 0 else token for i, token in enumerate(drafted)
        ]

    monkeypatch.setattr(lookup, "propose", propose)
    monkeypatch.setattr(lookup.Lookup, "is_on", property(lambda self: True))
    monkeypatch.setattr(lookup.Lookup, "expected", lambda self, count: count)
    always_worth(monkeypatch)


def always_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are run whatever they take."""

    def gain(self: Worth, size: Size, expected: float) -> float:
        del self, size
        return expected

    monkeypatch.setattr(Worth, "gain", gain)


def checked(plain: GenerationResult, drafted: GenerationResult) -> None:
    """The same answer, of which drafts were kept and others were not."""
    same(plain, drafted)
    assert 0 < drafted.usage.accepted_tokens < drafted.usage.drafted_tokens


def together(plain: Sequence[GenerationResult], drafted: Sequence[GenerationResult]) -> None:
    """The same answers of a batch, some of whose drafts were kept."""
    for one, other in zip(plain, drafted, strict=True):
        same(one, other)
    assert sum(answer.usage.accepted_tokens for answer in drafted) > 0


def same(plain: GenerationResult, drafted: GenerationResult) -> None:
    """The same answer. What of it was drafted depends on which rows decode beside it, and when."""
    assert (drafted.tokens, drafted.text) == (plain.tokens, plain.text)
    assert drafted.finish_reason == plain.finish_reason
    assert drafted.usage.completion_tokens == plain.usage.completion_tokens
