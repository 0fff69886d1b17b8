"""Each filter against the same thing written in numpy, and against transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import SamplingParams
from mlx_vlm_pipes.engine.sampling import (
    NEGATIVE,
    RowSampler,
    min_p_filter,
    top_k_filter,
    top_p_filter,
)

VOCAB = 97
PROMPT = np.array([3, 5, 5, 8, 13])


def logits_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def kept(filtered: mx.array) -> set[int]:
    return set(np.flatnonzero(np.array(filtered) > NEGATIVE / 2).tolist())


def draw(sampler: RowSampler, logits: np.ndarray) -> int:
    return int(np.array(sampler.next_token(mx.array(logits))))


def make(prompt: np.ndarray = PROMPT, ends: Sequence[int] = (), **options: Any) -> RowSampler:
    return RowSampler(SamplingParams(**{"temperature": 1.0, **options}), prompt, VOCAB, ends)


@pytest.mark.parametrize("k", [1, 2, 40, VOCAB, 200])
def test_top_k(k: int) -> None:
    x = logits_of(k)
    assert kept(top_k_filter(mx.array(x), k)) == set(np.argsort(-x)[:k].tolist())
    ties = np.array([1.0, 2.0, 2.0, 2.0], np.float32)
    assert kept(top_k_filter(mx.array(ties), 2)) == {1, 2, 3}  # as transformers


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p(p: float) -> None:
    x = logits_of(7)
    order = np.argsort(-x)
    total, expected = 0.0, set()
    for token in order.tolist():
        expected.add(token)
        total += softmax(x)[token]
        if total >= p:
            break
    out = top_p_filter(mx.array(x), p)
    assert kept(out) == expected
    index = sorted(expected)
    np.testing.assert_array_equal(np.array(out)[index], x[index])


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p(p: float) -> None:
    x = logits_of(9)
    probabilities = softmax(x)
    expected = set(np.flatnonzero(probabilities >= p * probabilities.max() * (1 - 1e-6)).tolist())
    assert kept(min_p_filter(mx.array(x), p)) == expected


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    sampler, x = make(temperature=0.0, repetition_penalty=1.5), logits_of(1)
    first = draw(sampler, x)
    punished = np.where(x < 0, x * 1.5, x / 1.5)
    expected = np.where(np.isin(np.arange(VOCAB), PROMPT), punished, x)
    assert first == expected.argmax()
    expected = np.where(np.isin(np.arange(VOCAB), [*PROMPT, first]), punished, x)
    np.testing.assert_allclose(np.array(sampler.adjust(mx.array(x))), expected, rtol=1e-6)


def test_presence_and_frequency_count_the_answer_only() -> None:
    sampler = make(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 100.0})
    x = logits_of(2)
    tokens = [draw(sampler, x) for _ in range(3)]
    assert tokens == [4, 4, 4]
    expected = x.copy()
    expected[4] += 100 - 0.5 - 3 * 0.25
    np.testing.assert_allclose(np.array(sampler.adjust(mx.array(x))), expected, rtol=1e-6)


def test_no_end_before_min_tokens() -> None:
    x = logits_of(3)
    best = int(x.argmax())
    sampler = make(temperature=0.0, min_new_tokens=2, ends=[best])
    tokens = [draw(sampler, x) for _ in range(3)]
    assert tokens[0] == tokens[1] != best
    assert tokens[2] == best


def test_drawn_tokens_follow_the_filtered_distribution() -> None:
    x = logits_of(4)
    sampler = make(temperature=0.7, top_k=5, top_p=0.95, min_p=0.02, seed=1)
    filtered = np.array(sampler.filter(mx.array(x)))
    expected = np.where(filtered > NEGATIVE / 2, softmax(np.maximum(filtered, -1e9)), 0)
    keys = mx.random.split(mx.random.key(0), 20_000)
    drawn = mx.vmap(lambda k: mx.random.categorical(mx.array(filtered), key=k))(keys)
    found = np.bincount(np.array(drawn), minlength=VOCAB) / 20_000
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert (found[expected == 0] == 0).all()
    best = softmax(x / 0.7)
    assert set(np.flatnonzero(expected)) <= set(np.argsort(-best)[:5].tolist())


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    x = logits_of(5) * 0.1

    def run(seed: int | None) -> list[int]:
        sampler = make(seed=seed)
        return [draw(sampler, x) for _ in range(12)]

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)
    assert run(-1) == run(2**64 - 1)


FILTERS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "top_k": ({"top_k": 7}, lambda lp: [lp.TopKLogitsWarper(7)]),
    "top_p": ({"top_p": 0.8}, lambda lp: [lp.TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.05}, lambda lp: [lp.MinPLogitsWarper(0.05)]),
    "all": (
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
        lambda lp: [
            lp.RepetitionPenaltyLogitsProcessor(1.3), lp.TemperatureLogitsWarper(0.6),
            lp.TopKLogitsWarper(20), lp.TopPLogitsWarper(0.9), lp.MinPLogitsWarper(0.01),
        ],
    ),
    "bias": (
        {"logit_bias": {5: 2.0}, "repetition_penalty": 1.3},
        lambda lp: [
            lp.SequenceBiasLogitsProcessor([[[5], 2.0]]), lp.RepetitionPenaltyLogitsProcessor(1.3)
        ],
    ),
}  # fmt: skip


@pytest.mark.reference
@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    options, theirs = FILTERS[name]
    for seed in range(20):
        x = logits_of(seed)
        scores = torch.tensor(x)[None]
        for processor in theirs(processors):
            scores = processor(torch.tensor(PROMPT)[None], scores)
        expected = np.maximum(scores[0].numpy(), NEGATIVE)
        sampler = make(**options)
        ours = np.array(sampler.filter(sampler.adjust(mx.array(x))))
        assert kept(mx.array(ours)) == kept(mx.array(expected))
        index = sorted(kept(mx.array(ours)))
        np.testing.assert_allclose(ours[index], expected[index], rtol=1e-5)
