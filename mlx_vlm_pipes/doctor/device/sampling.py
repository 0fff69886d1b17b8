"""Each sampler against numpy, on stored logits and on as many as a real vocabulary has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import SamplingParams
from mlx_vlm_pipes.doctor.device.references import load_cases
from mlx_vlm_pipes.doctor.device.report import Recorder
from mlx_vlm_pipes.dtypes import default_device
from mlx_vlm_pipes.engine.batch_sampler import BatchSampler
from mlx_vlm_pipes.engine.row_sampler import RowSampler

VOCABULARY = 151_936  # Qwen's: sorting so many takes other kernels than sorting the bundled 438
DRAWS = {True: 64, False: 2048}  # of the long ones: on a CPU (a draw takes 10 ms there), on a GPU
STORED_DRAWS = 2048
ROWS = 8
BINS = 16  # of about equal probability, whose frequencies are compared
STEPS = 12  # of greedy decoding under penalties
SLACK = 1e-4  # of a probability: where a filter's edge may fall otherwise than in numpy


@dataclass(frozen=True)
class Way:
    """A sampler by name, and its settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


DRAWING = (
    Way("temperature", {"temperature": 1.5}),
    Way("top-k", {"temperature": 1.5, "top_k": 5}),
    Way("top-p", {"temperature": 1.5, "top_p": 0.8}),
    Way("min-p", {"temperature": 1.5, "min_p": 0.05}),
    Way("top-k and top-p", {"temperature": 2.0, "top_k": 20, "top_p": 0.9}),
)
CHOOSING = (
    Way("greedy"),
    Way("repetition penalty", {"repetition_penalty": 1.7}),
    Way("presence penalty", {"presence_penalty": 1.5}),
    Way("frequency penalty", {"frequency_penalty": 0.7}),
    Way("all penalties", {"repetition_penalty": 1.2, "presence_penalty": 0.5,
                          "frequency_penalty": 0.4}),
)  # fmt: skip


def check_sampling(record: Recorder) -> None:
    """Drawn tokens: only those that numpy keeps, as often as it says; chosen ones: the same."""
    stored = next(case.logits for case in load_cases() if case.logits is not None)
    sources = {
        "stored": (flattened(stored[0]), STORED_DRAWS),
        f"{VOCABULARY} tokens": (made_logits(VOCABULARY), DRAWS[default_device().is_host]),
    }
    for source, (logits, draws) in sources.items():
        for way in CHOOSING:
            name = f"{way.name}, {source}"
            with record.trying(name, "report it"):
                wanted = chosen_in_numpy(logits, STEPS, **way.settings)
                found = [int(t) for t in _tokens(logits, way, 1, STEPS, temperature=0.0)[:, 0]]
                same = sum(a == b for a, b in zip(found, wanted, strict=True))
                record.all_of(f"{name}: tokens", same, STEPS)
        for way in DRAWING:
            name = f"{way.name}, {source}"
            with record.trying(name, "report it"):
                _check_draws(record, name, logits, way, draws)


def flattened(logits: np.ndarray) -> np.ndarray:
    """Logits [V] of a model that is sure, made unsure: the best twenty within 4 of each other."""
    best = np.sort(logits)[-20:]
    return (logits * (4.0 / (best[-1] - best[0]))).astype(np.float32)


def made_logits(size: int) -> np.ndarray:
    """float32 [size]: most tokens unlikely, a few hundred likely, in no order."""
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 1, size).astype(np.float32)
    logits[rng.choice(size, 300, replace=False)] += np.linspace(6, 14, 300, dtype=np.float32)
    return logits


def _tokens(logits: np.ndarray, way: Way, rows: int, steps: int, **more: Any) -> np.ndarray:
    """uint32 [steps, rows]: the same logits [V] for every row and step."""
    sampler = BatchSampler(is_gpu=not default_device().is_host)
    samplers = [
        RowSampler(SamplingParams(**{**way.settings, **more, "seed": i}), PROMPT, len(logits), ())
        for i in range(rows)
    ]
    tiled, found = mx.array(np.tile(logits, (rows, 1))), []
    for _ in range(steps):
        tokens, failures = sampler(tiled, samplers)
        for error in failures.values():
            raise error
        mx.eval(tokens, sampler.state())
        found.append(np.array(tokens))
    return np.stack(found)


PROMPT = np.arange(0, 400, 7)  # what a repetition penalty finds in the prompt; all are below 438


def _check_draws(record: Recorder, name: str, logits: np.ndarray, way: Way, draws: int) -> None:
    drawn = _tokens(logits, way, ROWS, draws // ROWS).reshape(-1)
    kept = kept_in_numpy(logits, **way.settings)
    record.all_of(f"{name}: tokens that may come", int(kept[drawn].sum()), len(drawn))
    wanted = probabilities(logits / way.settings["temperature"], kept)
    bins = bins_of(wanted)
    seen, expected = np.bincount(bins[drawn], minlength=BINS), np.bincount(bins, wanted, BINS)
    apart = float(np.abs(seen / draws - expected).sum() / 2)
    record.at_most(f"{name}: frequencies", apart, chance(expected, draws), " apart")


def bins_of(wanted: np.ndarray) -> np.ndarray:
    """int [V]: the bin of each token, the likeliest first, by what lies before it."""
    order = np.argsort(-wanted, kind="stable")
    before = np.cumsum(wanted[order]) - wanted[order]
    bins = np.zeros(len(wanted), np.int64)
    bins[order] = np.minimum(before * BINS, BINS - 1).astype(np.int64)
    return bins


def chance(expected: np.ndarray, draws: int) -> float:
    """The distance of frequencies from probabilities [n] that is hardly ever passed by chance.

    Its mean is at most half the sum of the standard deviations; it moves by 1 / sqrt(draws).
    """
    return float(np.sqrt(expected * (1 - expected) / draws).sum() / 2 + 2.5 / np.sqrt(draws))


def probabilities(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """float64 [V]: softmax over the kept tokens."""
    weights = np.where(kept, np.exp(logits.astype(np.float64) - logits.max()), 0.0)
    return weights / weights.sum()


def kept_in_numpy(
    logits: np.ndarray,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """bool [V]: the tokens that may come; those on an edge, within SLACK, may."""
    scaled = logits.astype(np.float64) / temperature
    kept = np.ones(len(scaled), bool)
    if top_k:
        kept &= scaled >= np.sort(scaled)[-top_k]
    if top_p < 1:
        own = probabilities(scaled, kept)
        order = np.argsort(-own, kind="stable")
        before = np.cumsum(own[order]) - own[order]
        kept[order] &= before < top_p + SLACK
    if min_p:
        own = probabilities(scaled, kept)
        kept &= own >= min_p * own.max() * (1 - SLACK)
    return kept


def chosen_in_numpy(
    logits: np.ndarray,
    steps: int,
    *,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> list[int]:
    """The likeliest token of each step, as the penalties on those before leave it."""
    counts, seen = np.zeros(len(logits)), np.zeros(len(logits), bool)
    seen[PROMPT] = True
    tokens: list[int] = []
    for _ in range(steps):
        punished = np.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        left = np.where(seen, punished, logits)
        left = left - frequency_penalty * counts - presence_penalty * (counts > 0)
        tokens.append(int(left.argmax()))
        counts[tokens[-1]] += 1
        seen[tokens[-1]] = True
    return tokens
