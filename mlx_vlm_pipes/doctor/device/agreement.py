"""The same requests in every way that the engine may take: the numbers must not depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_pipes.doctor.device.references import (
    Case,
    answer,
    answers_together,
    difference,
    load_cases,
    opened,
    right_tokens,
    text_logits,
)
from mlx_vlm_pipes.doctor.device.report import Recorder
from mlx_vlm_pipes.engine.handover import ALWAYS, NEVER
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.pipeline import GenerationResult, Pipeline

ROWS = 8
HALVES = ("float16", "bfloat16")
SAME = 2e-4  # of a log-probability, in float32; the order of a sum depends on the way
LOGITS_SAME = 1e-4  # of the largest logit
BEST = 5  # tokens at each place whose log-probabilities are compared
SLICE = 16  # tokens; a picture of the bundled model has as many
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 5}


def check_agreement(record: Recorder, folder: Path) -> None:
    """One row against eight, slices, prefixes, steps in order, and steps uncompiled."""
    cases = [case for case in load_cases() if case.logits is not None][:ROWS]
    with record.trying("one row"), opened(folder, dtype="float32") as pipe:
        alone = [answer(pipe, case, logprobs=BEST) for case in cases]
        whole = [text_logits(pipe, case) for case in cases]
        _check_rows(record, pipe, cases, alone)
        with record.trying("cached prefix", "use EngineConfig(enable_prefix_caching=False)"):
            again = [answer(pipe, case, logprobs=BEST) for case in cases]
            reused = sum(one.usage.cached_tokens > 0 for one in again)
            record.all_of("cached prefix: prompts that reuse it", reused, len(cases))
            _same(record, "cached prefix", again, alone)
        _check_slices(record, folder, cases, whole)
        _check_other_ways(record, folder, cases, alone)
    for dtype in HALVES:
        remedy = "use EngineConfig(max_batch_size=1), or another dtype"
        with record.trying(f"eight rows, {dtype}", remedy), opened(folder, dtype=dtype) as pipe:
            found = [one.tokens for one in answers_together(pipe, cases)]
            right = right_tokens(found, [case.tokens for case in cases])
            record.all_of(f"eight rows, {dtype}: answers", right, len(cases))


def _check_rows(
    record: Recorder, pipe: Pipeline, cases: Sequence[Case], alone: Sequence[GenerationResult]
) -> None:
    with record.trying("eight rows", "use EngineConfig(max_batch_size=1)"):
        pipe.engine.forget()
        _same(record, "eight rows", answers_together(pipe, cases, logprobs=BEST), alone)
        drawn = [answer(pipe, case, **SAMPLED).tokens for case in cases]
        together = [one.tokens for one in answers_together(pipe, cases, **SAMPLED)]
        record.all_of("eight rows, sampled: answers", right_tokens(together, drawn), len(cases))


def _check_slices(
    record: Recorder, folder: Path, cases: Sequence[Case], whole: Sequence[np.ndarray]
) -> None:
    remedy = "use EngineConfig(prefill_chunk=...) above the longest prompt"
    config = EngineConfig(prefill_chunk=SLICE)
    with record.trying("prompt in slices", remedy):
        with opened(folder, dtype="float32", engine=config) as pipe:
            cut = [text_logits(pipe, case) for case in cases]
        apart = difference(cut, whole)
        record.at_most("prompt in slices: logits", apart, LOGITS_SAME, " of the largest")


def _check_other_ways(
    record: Recorder, folder: Path, cases: Sequence[Case], alone: Sequence[GenerationResult]
) -> None:
    """Steps one after the other, always overlapping, uncompiled; eight rows each."""
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "overlapping steps": (
            f"use EngineConfig(overlap_bytes={NEVER})",
            {"engine": EngineConfig(overlap_bytes=ALWAYS)},
        ),
        "steps in turn": ("report it", {"engine": EngineConfig(overlap_bytes=NEVER)}),
        "uncompiled steps": ("use load(compile=False)", {"compile": False}),
    }
    for name, (remedy, options) in ways.items():
        with record.trying(name, remedy):
            with opened(folder, dtype="float32", **options) as pipe:
                found = answers_together(pipe, cases, logprobs=BEST)
            _same(record, name, found, alone)


def _same(
    record: Recorder,
    name: str,
    found: Sequence[GenerationResult],
    wanted: Sequence[GenerationResult],
) -> None:
    """Tokens, and their log-probabilities where the tokens are the same."""
    same = right_tokens([a.tokens for a in found], [b.tokens for b in wanted])
    record.all_of(f"{name}: answers", same, len(wanted))
    apart = [
        float(np.abs(_scores(a) - _scores(b)).max())
        for a, b in zip(found, wanted, strict=True)
        if a.tokens == b.tokens
    ]
    record.at_most(f"{name}: log-probabilities", max(apart, default=np.inf), SAME)


def _scores(answer: GenerationResult) -> np.ndarray:
    """float [n, BEST], of each place's best tokens: the unlikely ones show a difference first."""
    places = [place.top_log_probabilities[0] for place in answer.logprobs or []]
    return np.array([sorted(place.values())[::-1][:BEST] for place in places])
