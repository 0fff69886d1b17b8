"""Log-probabilities of chosen tokens, and of the best ones beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.session import InferenceSession


@dataclass(frozen=True)
class LogProbabilities:
    """Natural-log probabilities of the scored tokens, and of the best tokens at each place."""

    token_log_probabilities: list[float]
    top_log_probabilities: list[dict[int, float]]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities that are being computed: of some rows of a step, each with its own number.

    tops: by row, how many of its best tokens are told. index uint32 and values float32
    [len(tops), most + 1]: the best tokens in no order, then the row's own.
    """

    tops: Mapping[int, int]
    index: mx.array
    values: mx.array

    def arrays(self) -> list[mx.array]:
        return [self.index, self.values]

    def read(self) -> dict[int, LogProbabilities]:
        """Wait for them; by row."""
        found: dict[int, LogProbabilities] = {}
        places, numbers = np.array(self.index).tolist(), np.array(self.values).tolist()
        for (row, top), ids, scores in zip(self.tops.items(), places, numbers, strict=True):
            ranked = sorted(zip(ids[:-1], scores[:-1], strict=True), key=lambda pair: -pair[1])
            told = dict([*ranked[:top], (ids[-1], scores[-1])])
            order = sorted(told.items(), key=lambda pair: -pair[1])
            found[row] = LogProbabilities([scores[-1]], [dict(order)])
        return found


def launch_scores(logits: mx.array, tokens: mx.array, tops: Mapping[int, int]) -> Scores:
    """Score tokens [B] under logits [B, V], for the rows in `tops` in one call; lazily."""
    if len(tops) < logits.shape[0]:
        rows = mx.array(list(tops))
        logits, tokens = logits[rows], tokens[rows]
    return Scores(tops, *_scored(logits, tokens, max(tops.values())))


def _scored(logits: mx.array, tokens: mx.array, top_n: int) -> tuple[mx.array, mx.array]:
    """The top_n best tokens of each row, in no order, then its own: uint32 [B, top_n + 1], and
    their log-probabilities."""
    scores = logits.astype(mx.float32)
    scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    best = mx.argpartition(-scores, min(top_n, scores.shape[-1]) - 1, axis=-1)[:, :top_n]
    index = mx.concatenate([best, tokens[:, None].astype(best.dtype)], axis=-1)
    return index, mx.take_along_axis(scores, index, axis=-1)


def log_probabilities(logits: mx.array, tokens: list[int], top_n: int) -> LogProbabilities:
    """Score `tokens` under logits [len(tokens), V]; each place lists its top_n and its token."""
    scores = launch_scores(logits, mx.array(tokens), dict.fromkeys(range(len(tokens)), top_n))
    parts = scores.read().values()
    return LogProbabilities(
        [value for part in parts for value in part.token_log_probabilities],
        [top for part in parts for top in part.top_log_probabilities],
    )


class StepInputs(Protocol):
    """What scoring reads of a step's inputs (interfaces.ModelInputs)."""

    def active_tokens(self) -> list[list[int]]: ...


class StepOutputs(Protocol):
    """What scoring reads of a step's outputs (interfaces.ModelOutputs)."""

    @property
    def logits(self) -> mx.array: ...

    @property
    def logit_offsets(self) -> mx.array | None: ...

    def last_logits(self) -> mx.array: ...


class LogProbabilitiesMixin:
    """Log-probabilities of sampled (with echo: prompt) tokens (docs/api.md#log-probabilities)."""

    def compute_log_probabilities(
        self,
        session: InferenceSession,
        model_inputs: StepInputs,
        model_outputs: StepOutputs,
        next_tokens: mx.array,
        batch_top_n: list[int],
        batch_echo: list[bool],
    ) -> list[LogProbabilities | None]:
        """One entry per row, None where top_n is 0.

        Raises: InputError for echo without logits of all active tokens (ReturnLogits.ALL, or
        ModelConfig.enable_echo).
        """
        del session
        active = model_inputs.active_tokens()
        sampled: list[int] = np.array(next_tokens).reshape(-1).tolist()
        results: list[LogProbabilities | None] = []
        for i, (top_n, echo) in enumerate(zip(batch_top_n, batch_echo, strict=True)):
            if not top_n:
                results.append(None)
                continue
            if echo:
                logits = _echo_logits(model_outputs, i, active[i])
                scored = [*active[i][1:], sampled[i]]
            else:
                logits, scored = model_outputs.last_logits()[i : i + 1], [sampled[i]]
            results.append(log_probabilities(logits, scored, top_n))
        return results


def _echo_logits(outputs: StepOutputs, row: int, active: Sequence[int]) -> mx.array:
    """The logits [len(active), V] of one row."""
    if outputs.logit_offsets is None:
        begin, have = row, 1
    else:
        bounds: list[int] = np.array(outputs.logit_offsets).tolist()
        begin, have = bounds[row], bounds[row + 1] - bounds[row]
    if have != len(active):
        raise InputError(
            f"echo needs logits of all {len(active)} tokens of row {row}, there are {have}; "
            "build the model with ModelConfig(enable_echo=True) or return_logits=ReturnLogits.ALL"
        )
    return outputs.logits[begin : begin + have]
