"""Choosing the next token: penalties, filters, and random numbers that belong to one request.

Every row carries its own key, so a seed gives the same tokens in any batch. Nothing here waits
for the device. The order is that of transformers: bias and penalties on the logits, then
temperature, top-k, top-p, min-p.
Source: transformers generation/logits_process.py; presence and frequency as OpenAI defines them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import SamplingParams
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.options import SAMPLING_OPTIONS, unfit

COLDEST = 1e-30  # below this temperature logits overflow: as good as greedy
SMALLEST = float(np.finfo(np.float32).tiny)
NEGATIVE = -1e30  # stands for minus infinity: survives a later subtraction


def read_sampling(params: SamplingParams) -> SamplingParams:
    """The same in plain Python types. Raises: InputError naming the first wrong value."""
    given = vars(params)
    read = {o.field: o.read(given[o.field]) for o in SAMPLING_OPTIONS.values()}
    most, least = read["max_new_tokens"], read["min_new_tokens"]
    if most is not None and least > most:
        raise unfit("min_tokens", least, f"at most max_tokens, which is {most}")
    return replace(params, **read)


def top_k_filter(logits: mx.array, k: int) -> mx.array:
    """Keep the k largest of logits [V]; ties with the last of them are kept too."""
    if k >= logits.shape[-1]:
        return logits
    threshold = mx.min(mx.topk(logits, k))
    return mx.where(logits < threshold, NEGATIVE, logits)


def top_p_filter(logits: mx.array, p: float) -> mx.array:
    """Keep the smallest set of logits [V] whose probabilities reach p; at least the best one."""
    order = mx.argsort(-logits)
    probabilities = mx.softmax(logits[order], precise=True)
    before = mx.cumsum(probabilities) - probabilities
    kept = mx.where(before < max(p, SMALLEST), logits[order], NEGATIVE)
    return mx.put_along_axis(mx.zeros_like(logits), order, kept, axis=-1)


def min_p_filter(logits: mx.array, p: float) -> mx.array:
    """Drop logits [V] whose probability is below p times the best one's."""
    return mx.where(logits < mx.max(logits) + float(np.log(p)), NEGATIVE, logits)


class RowSampler:
    """One request's sampling state; its token counts and key live on the device.

    Args: prompt int64 [n]; end_ids, tokens that may not come before `min_new_tokens`.
    Raises: InputError for a value out of its bounds, or a token beyond the vocabulary.
    """

    def __init__(
        self, params: SamplingParams, prompt: np.ndarray, vocab_size: int, end_ids: Sequence[int]
    ) -> None:
        self.params = params = read_sampling(params)
        for token in params.stop_token_ids:
            if token >= vocab_size:
                raise unfit("stop_token_ids", token, f"tokens below {vocab_size}, the vocabulary")
        self.steps = 0
        self._end_ids = [t for t in end_ids if t < vocab_size]
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._key = mx.random.key(seed % 2**64)
        self._bias = _dense_bias(params.logit_bias, vocab_size)
        self._counts: mx.array | None = None
        self._seen: mx.array | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = mx.zeros((vocab_size,))
        if params.repetition_penalty != 1.0:
            counts = np.bincount(prompt[prompt < vocab_size], minlength=vocab_size)
            self._seen = mx.array(counts) > 0

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < COLDEST

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the largest logit."""
        return self.is_greedy and not self._adjusts

    @property
    def _adjusts(self) -> bool:
        has_state = self._counts is not None or self._seen is not None
        return has_state or self._bias is not None or self.steps < self.params.min_new_tokens

    def next_token(self, logits: mx.array) -> mx.array:
        """logits float32 [V] -> the token, uint32 scalar, lazily; the state counts it."""
        logits = self.adjust(logits)
        if self.is_greedy:
            token = mx.argmax(logits)
        else:
            self._key, key = mx.random.split(self._key)
            token = mx.random.categorical(self.filter(logits), key=key)
        self.steps += 1
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1.0)
        if self._seen is not None:
            self._seen = self._seen | (mx.arange(self._seen.shape[0]) == token)
        return token.astype(mx.uint32)

    def adjust(self, logits: mx.array) -> mx.array:
        """Bias, penalties, and no end token before `min_new_tokens`."""
        params = self.params
        if self._bias is not None:
            logits = logits + self._bias
        if self._seen is not None:
            factor = params.repetition_penalty
            punished = mx.where(logits < 0, logits * factor, logits / factor)
            logits = mx.where(self._seen, punished, logits)
        if self._counts is not None:
            logits = logits - params.frequency_penalty * self._counts
            logits = logits - params.presence_penalty * (self._counts > 0)
        if self.steps < params.min_new_tokens and self._end_ids:
            logits = mx.array(logits)
            logits[mx.array(self._end_ids)] = NEGATIVE
        return logits

    def filter(self, logits: mx.array) -> mx.array:
        """Temperature, then the filters that are switched on."""
        params = self.params
        logits = logits / params.temperature
        if params.top_k > 0:
            logits = top_k_filter(logits, params.top_k)
        if params.top_p < 1:
            logits = top_p_filter(logits, params.top_p)
        if params.min_p > 0:
            logits = min_p_filter(logits, params.min_p)
        return logits

    def state(self) -> list[mx.array]:
        """Device state, to be evaluated with every step so that no lazy chain builds up."""
        return [a for a in (self._key, self._counts, self._seen) if a is not None]


def _dense_bias(bias: dict[int, float], vocab_size: int) -> mx.array | None:
    if not bias:
        return None
    dense = np.zeros(vocab_size, np.float32)
    for token, value in bias.items():
        if not 0 <= token < vocab_size:
            raise InputError(f"logit_bias for token {token}; the vocabulary has {vocab_size}")
        dense[token] = np.clip(value, NEGATIVE, -NEGATIVE)
    return mx.array(dense)
