"""Each filter against the same thing written in numpy, and against transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import SamplingParams
from mlx_vlm_pipes.engine.batch_sampler import BatchSampler
from mlx_vlm_pipes.engine.group_sampler import GroupSampler, adjusted, choose, filtered
from mlx_vlm_pipes.engine.row_sampler import NEGATIVE, RowSampler

VOCAB = 97
PROMPT = np.array([3, 5, 5, 8, 13])


def logits_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def kept(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(logits > NEGATIVE / 2).tolist())


def draw(row: RowSampler, logits: np.ndarray) -> int:
    tokens, failures = BatchSampler(is_gpu=False)(mx.array(logits)[None], [row])
    assert not failures
    return int(tokens.item())


def group(*rows: RowSampler, is_gpu: bool = False) -> GroupSampler:
    return GroupSampler(rows, lambda form: partial(choose, form), is_gpu=is_gpu)


def left(x: np.ndarray, *rows: RowSampler, is_gpu: bool = False) -> list[np.ndarray]:
    """Each row's filtered logits by token, all of the same logits x."""
    form, arrays = group(*rows, is_gpu=is_gpu).inputs()
    logits = adjusted(form, mx.array(np.stack([x] * len(rows))), arrays)
    kept_logits, order = filtered(form, logits, arrays)
    out = np.full((len(rows), len(x)), NEGATIVE, np.float32)
    places = np.arange(len(x))[None] if order is None else np.array(order)
    np.put_along_axis(out, places, np.array(kept_logits), axis=-1)
    return list(out)


def adjust(row: RowSampler, x: np.ndarray) -> np.ndarray:
    form, arrays = group(row).inputs()
    return np.array(adjusted(form, mx.array(x)[None], arrays))[0]


def make(prompt: np.ndarray = PROMPT, ends: Sequence[int] = (), **options: Any) -> RowSampler:
    return RowSampler(SamplingParams(**{"temperature": 1.0, **options}), prompt, VOCAB, ends)


@pytest.mark.parametrize("k", [1, 2, 40, VOCAB - 1, VOCAB, 200])
def test_top_k(k: int) -> None:
    x = logits_of(k)
    assert kept(left(x, make(top_k=k))[0]) == set(np.argsort(-x)[:k].tolist())


@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_ties_with_the_last_of_top_k_are_kept(top_p: float) -> None:
    x = np.full(VOCAB, -5.0, np.float32)
    x[:4] = [1.0, 2.0, 2.0, 2.0]
    for is_gpu in (False, True):
        (found,) = left(x, make(top_k=2, top_p=top_p), is_gpu=is_gpu)
        assert kept(found) == {1, 2, 3}  # as transformers


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
    (out,) = left(x, make(top_p=p))
    assert kept(out) == expected
    index = sorted(expected)
    np.testing.assert_array_equal(out[index], x[index])


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p(p: float) -> None:
    x = logits_of(9)
    probabilities = softmax(x)
    expected = set(np.flatnonzero(probabilities >= p * probabilities.max() * (1 - 1e-6)).tolist())
    assert kept(left(x, make(min_p=p))[0]) == expected


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    sampler, x = make(temperature=0.0, repetition_penalty=1.5), logits_of(1)
    first = draw(sampler, x)
    punished = np.where(x < 0, x * 1.5, x / 1.5)
    expected = np.where(np.isin(np.arange(VOCAB), PROMPT), punished, x)
    assert first == expected.argmax()
    expected = np.where(np.isin(np.arange(VOCAB), [*PROMPT, first]), punished, x)
    np.testing.assert_allclose(adjust(sampler, x), expected, rtol=1e-6)


def test_presence_and_frequency_count_the_answer_only() -> None:
    sampler = make(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 100.0})
    x = logits_of(2)
    tokens = [draw(sampler, x) for _ in range(3)]
    assert tokens == [4, 4, 4]
    expected = x.copy()
    expected[4] += 100 - 0.5 - 3 * 0.25
    np.testing.assert_allclose(adjust(sampler, x), expected, rtol=1e-6)


def test_no_end_before_min_tokens() -> None:
    x = logits_of(3)
    best = int(x.argmax())
    sampler = make(temperature=0.0, min_new_tokens=2, ends=[best])
    tokens = [draw(sampler, x) for _ in range(3)]
    assert tokens[0] == tokens[1] != best
    assert tokens[2] == best


@pytest.mark.parametrize("temperature", [1e-31, 1e-29, 1e-20, 1e-6])
def test_a_tiny_temperature_takes_the_largest(temperature: float) -> None:
    x = logits_of(3) - 40  # all negative, so that they come near to what stands for dropped ones
    for options in ({"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1e6}):
        row = make(PROMPT[:0], temperature=temperature, **options)
        assert draw(row, x) == int(x.argmax()), options


def test_drawn_tokens_follow_the_filtered_distribution() -> None:
    x = logits_of(4)
    sampler = make(temperature=0.7, top_k=5, top_p=0.95, min_p=0.02, seed=1)
    (probable,) = left(x, sampler)
    expected = np.where(probable > NEGATIVE / 2, softmax(np.maximum(probable, -1e9)), 0)
    keys = mx.random.split(mx.random.key(0), 20_000)
    drawn = mx.vmap(lambda k: mx.random.categorical(mx.array(probable), key=k))(keys)
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
        rows = [make(**options) for options, _ in FILTERS.values()]
        for ours in (
            left(x, make(**options))[0],
            left(x, *rows, is_gpu=True)[list(FILTERS).index(name)],
        ):
            assert kept(ours) == kept(expected)
            index = sorted(kept(ours))
            np.testing.assert_allclose(ours[index], expected[index], rtol=1e-5)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 1},
    {"temperature": 0.0},
    {"temperature": 1.3, "seed": 2},
    {"temperature": 0.9, "top_k": 12, "seed": 3},
    {"temperature": 0.9, "top_p": 0.8, "min_p": 0.02, "seed": 4},
    {"temperature": 0.0, "repetition_penalty": 1.5, "min_new_tokens": 3},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "seed": 5},
    {"temperature": 0.8, "logit_bias": {7: 3.0}, "min_new_tokens": 2, "min_p": 0.1, "seed": 6},
]
# What every row got when rows were sampled one by one, a categorical of its own key each.
TOKENS_BEFORE = [
    [79, 43, 26, 64, 96, 4], [30, 41, 93, 93, 67, 92], [41, 1, 38, 87, 31, 58],
    [9, 71, 91, 14, 54, 91], [83, 69, 89, 44, 42, 48], [58, 54, 17, 94, 52, 62],
    [51, 32, 15, 4, 82, 11], [49, 58, 9, 55, 38, 50],
]  # fmt: skip


@pytest.mark.parametrize("is_gpu", [False, True])
def test_rows_get_the_same_tokens_together_as_alone(*, is_gpu: bool) -> None:
    steps = [np.stack([logits_of(100 * step + i) for i in range(8)]) for step in range(6)]
    rows, sampler = [make(ends=[3, 4], **s) for s in SETTINGS], BatchSampler(is_gpu=is_gpu)
    together = np.array([np.array(sampler(mx.array(x), rows)[0]) for x in steps]).T.tolist()
    alone = []
    for i, settings in enumerate(SETTINGS):
        row, sampler = make(ends=[3, 4], **settings), BatchSampler(is_gpu=is_gpu)
        alone.append([int(sampler(mx.array(x[i : i + 1]), [row])[0].item()) for x in steps])
    assert together == alone == TOKENS_BEFORE


def test_rows_keep_their_state_when_others_come_and_go() -> None:
    x = mx.array(np.stack([logits_of(1)] * 3))
    settings = {"top_k": 20, "top_p": 0.95, "presence_penalty": 2.0}
    alone, sampler = make(seed=9, **settings), BatchSampler(is_gpu=True)
    expected = [int(sampler(x[:1], [alone])[0].item()) for _ in range(4)]
    row, first, second = make(seed=9, **settings), make(seed=1), make(temperature=0.0)
    found = []
    for rows in ([row], [first, row], [first, second, row], [row]):
        tokens, _ = sampler(x[: len(rows)], rows)
        found.append(int(tokens[rows.index(row)].item()))
    assert found == expected


def test_a_row_with_processors_leaves_the_others_alone() -> None:
    def only_eight(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(VOCAB) == 8, logits, -mx.inf)

    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        raise ValueError(f"no way for {logits.shape}")

    x = mx.array(np.stack([logits_of(i) for i in range(4)]))
    expected = [draw(make(seed=i), np.array(x[i])) for i in range(4)]
    rows = [make(seed=i) for i in range(4)]
    rows[1].processors, rows[2].processors = (only_eight,), (broken,)
    tokens, failures = BatchSampler(is_gpu=True)(x, rows)
    found = np.array(tokens).tolist()
    assert [found[0], found[1], found[3]] == [expected[0], 8, expected[3]]
    assert [str(failures[2])] == [f"no way for (1, {VOCAB})"]
    assert len(failures) == 1
