"""The stored cases: chats about pictures, and what transformers answers in float32.

Source: tools/device_references.py, which has what is stored and how.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_pipes.json_files import require_json
from mlx_vlm_pipes.loading import BUNDLED, load
from mlx_vlm_pipes.pipeline import GenerationResult, Pipeline

FOLDER = BUNDLED.parent / "device_references"
MAX_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """One question. picture uint8 [64, 64, 3]; tokens: transformers' greedy ones, with the end;
    logits float32 [T, V] at the prompt's text positions, of the first eight cases only."""

    messages: list[dict[str, Any]]
    picture: np.ndarray
    ids: list[int]
    tokens: list[int]
    logits: np.ndarray | None

    def request(self) -> dict[str, Any]:
        """As one request of `generate_batch`."""
        return {"messages": self.messages, "images": [self.picture]}


def load_cases(folder: Path = FOLDER) -> list[Case]:
    """All stored cases, in order."""
    about, arrays = require_json(folder / "cases.json"), np.load(folder / "cases.npz")
    return [
        Case(
            fact["messages"],
            arrays["pictures"][i],
            fact["ids"],
            fact["tokens"],
            arrays[f"logits_{i}"] if f"logits_{i}" in arrays.files else None,
        )
        for i, fact in enumerate(about["cases"])
    ]


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Pipeline]:
    """A pipeline that is closed at the end; options as for `load`."""
    with load(folder, **options) as pipe:
        yield pipe


def answer(pipe: Pipeline, case: Case, **options: Any) -> GenerationResult:
    """The answer to a case, alone in the engine."""
    limit = {"max_tokens": MAX_TOKENS, **options}
    return pipe.generate(case.messages, images=[case.picture], **limit)


def answers_together(pipe: Pipeline, cases: Sequence[Case], **options: Any) -> list[Any]:
    """The answers to cases that decode together."""
    limit = {"max_tokens": MAX_TOKENS, **options}
    return pipe.generate_batch([case.request() for case in cases], **limit)  # pyright: ignore[reportArgumentType]  # a TypedDict


def text_logits(pipe: Pipeline, case: Case) -> np.ndarray:
    """float32 [T, V] at the prompt's text positions."""
    prompt = pipe.encode(case.messages, images=[case.picture])
    keep = np.ones(len(prompt.input_ids), bool)
    for image in prompt.images:
        keep[image.start_idx : image.end_idx] = False
    return pipe.logits(case.messages, images=[case.picture])[keep]


def difference(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The largest difference of logits, as a share of the largest wanted one."""
    apart = max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True))
    return float(apart / max(np.abs(b).max() for b in wanted))


def right_tokens(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> int:
    """How many answers are the same, token for token."""
    return sum(list(a) == list(b) for a, b in zip(found, wanted, strict=True))
