"""Drawn requests alone, and in every other way: batches, slices, warm prefixes, restarts.

In float32 the answers are equal but for noise. Where numbers are rounded on the way (kv_bits,
bfloat16) the ways differ by less than the rounding's own error, and the same way gives the same
bits: the README's promise.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from mlx_vlm_pipes import GenerationResult, Pipeline
from mlx_vlm_pipes.engine.requests import Handle
from mlx_vlm_pipes.pipeline import collect
from tests.torture.drawing import (
    FAMILIES,
    TRAINED,
    PipelineSection,
    Request,
    configure,
    difference,
    draw_limits,
    draw_request,
)
from tests.torture.section import Case, require

COLD: dict[str, Any] = {"enable_prefix_caching": False}
ROUNDED: list[dict[str, Any]] = [{"kv_bits": 8}, {"kv_bits": 4}, {"dtype": "bfloat16"}]
READING = ("prompt", "images", "videos")


class Section(PipelineSection):
    @property
    def whole(self) -> int:
        return 200

    def draw(self, index: int) -> Case:
        rng = self.rng(index)
        is_rounded = index % 5 == 4
        family = rng.choice(sorted(TRAINED)) if is_rounded else FAMILIES[index % len(FAMILIES)]
        requests = [draw_request(rng, family) for _ in range(rng.choice([1, 2, 4, 7]))]
        if is_rounded:
            options = rng.choice(ROUNDED)
            about = f"{family} {options}: {len(requests)} requests"
            return Case(about, lambda: self._rounded(family, options, requests, rng))
        limits = draw_limits(rng)
        about = f"{family}: {len(requests)} requests, {limits}"
        return Case(about, lambda: self._exact(family, requests, limits, rng))

    def _exact(
        self, family: str, requests: list[Request], limits: dict[str, Any], rng: random.Random
    ) -> None:
        pipe = self._pipes.get(family)
        configure(pipe, **COLD)
        alone = [pipe.generate(**request) for request in requests]
        configure(pipe, **limits)
        for _ in range(rng.choice([1, 2, 3])):  # the later ones find warm caches
            order = rng.sample(range(len(requests)), len(requests))
            for i, answer in _together(pipe, requests, order, rng):
                apart = difference(answer, alone[i])
                require(not apart, f"request {i} {requests[i]['prompt'][:40]!r}: {apart}")
            if rng.random() < 0.2:
                pipe.engine.forget()

    def _rounded(
        self, family: str, options: dict[str, Any], requests: list[Request], rng: random.Random
    ) -> None:
        """Logits of the prompts, which do not depend on the tokens before that rounding parted."""
        prompts = [{k: r[k] for k in READING if k in r} for r in requests]
        plain, pipe = self._pipes.get(family), self._pipes.get(family, **options)
        exact = [plain.logits(**prompt) for prompt in prompts]
        configure(pipe, **COLD)
        found = [pipe.logits(**prompt) for prompt in prompts]
        errors = [np.abs(a - b) for a, b in zip(found, exact, strict=True)]
        bar = max(float(error.max()) for error in errors)
        alone = [pipe.generate(**request) for request in requests]
        again = [pipe.generate(**request) for request in requests]
        same = all(_bits(a) == _bits(b) for a, b in zip(alone, again, strict=True))
        require(same, "the same requests in the same way, and other bits")
        configure(pipe, **draw_limits(rng))
        for prompt, expected in zip(prompts, found, strict=True):
            gap = float(np.abs(pipe.logits(**prompt) - expected).max())
            require(
                gap < max(bar, 1e-4), f"logits {gap:.3g} apart, the rounding's own is {bar:.3g}"
            )
        order = rng.sample(range(len(requests)), len(requests))
        for i, answer in _together(pipe, requests, order, rng):
            first = _first_gap(answer, alone[i])
            require(
                first < 2 * max(bar, 1e-4), f"{i}: first tokens {first:.3g} apart, bar {bar:.3g}"
            )


def _together(
    pipe: Pipeline, requests: list[Request], order: list[int], rng: random.Random
) -> list[tuple[int, GenerationResult]]:
    """Answers of requests that run at once, in this order, with some that go before their end."""
    handles: list[tuple[int, Handle]] = []
    passing: list[Handle] = []
    for i in order:
        if rng.random() < 0.3:
            passing.append(pipe.submit(**{**requests[i], "max_tokens": 40}))
            if rng.random() < 0.5:
                passing[-1].next_chunk()
        handles.append((i, pipe.submit(**requests[i])))
        if passing and rng.random() < 0.5:
            passing.pop().close()
    for handle in passing:
        handle.close()
    return [(i, collect(handle)) for i, handle in handles]


def _bits(answer: GenerationResult) -> object:
    return answer.tokens, answer.logprobs


def _first_gap(found: GenerationResult, expected: GenerationResult) -> float:
    """Between the log-probabilities of the first token, where it is the same one."""
    a, b = (answer.logprobs[0] for answer in (found, expected) if answer.logprobs)
    if found.tokens[0] != expected.tokens[0]:
        return 0.0
    return abs(a.token_log_probabilities[0] - b.token_log_probabilities[0])
