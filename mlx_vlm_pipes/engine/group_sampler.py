"""Choosing the next tokens of several rows in one call: penalties, filters, random numbers.

Every row has settings and a key of its own, and gets the tokens that it would get alone. Nothing
here waits for the device. The order is that of transformers: bias and penalties on the logits,
then temperature, top-k, top-p, min-p.
Source: transformers generation/logits_process.py; presence and frequency as OpenAI defines them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.engine.row_sampler import NEGATIVE, RowSampler

SMALLEST = float(np.finfo(np.float32).tiny)
SPARE = 256  # candidates beyond top-k, for tokens that tie with the last of them
Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Form:
    """What sampling a group takes, of any of its rows: what is off costs nothing.

    ends: whether a row withholds end tokens. top_k: at least the largest, 0 for none. sorts_few:
    top-p looks at top_k and some more of the logits only, not at all of them in order.
    """

    state: tuple[str, ...]  # of "counts", "seen"
    has_bias: bool
    ends: bool
    draws: bool
    top_k: int
    top_p: bool
    min_p: bool
    sorts_few: bool


Steps = Callable[[Form], Callable[[mx.array, Arrays], tuple[mx.array, Arrays]]]


def adjusted(form: Form, logits: mx.array, arrays: Arrays) -> mx.array:
    """Logits [B, V] with bias and penalties, and without the end tokens that may not come yet."""
    if form.has_bias:
        logits = logits + arrays["bias"]
    if "seen" in form.state:
        factor = arrays["repetition_penalty"]
        punished = mx.where(logits < 0, logits * factor, logits / factor)
        logits = mx.where(arrays["seen"] > 0, punished, logits)
    if "counts" in form.state:
        counts = arrays["counts"]
        logits = logits - arrays["frequency_penalty"] * counts
        logits = logits - arrays["presence_penalty"] * (counts > 0)
    if form.ends:
        logits = mx.where(arrays["ends"], NEGATIVE, logits)
    return logits


def filtered(form: Form, logits: mx.array, arrays: Arrays) -> tuple[mx.array, mx.array | None]:
    """Adjusted logits [B, V] over temperature, dropped ones NEGATIVE, and the tokens they are of.

    Returns: [B, N] float32; uint32 [B, N], or None where the n-th logit is token n's.
    """
    logits, order = logits / arrays["temperature"], None
    if form.top_p:
        if form.sorts_few:
            order = _candidates(logits, form.top_k)
            logits = mx.take_along_axis(logits, order, axis=-1)
        own = mx.argsort(-logits, axis=-1)
        logits = mx.take_along_axis(logits, own, axis=-1)
        order = own if order is None else mx.take_along_axis(order, own, axis=-1)
        if form.top_k:
            last = mx.take_along_axis(logits, arrays["last_in_order"], axis=-1)
            logits = mx.where(logits < last, NEGATIVE, logits)
        logits = _within_top_p(logits, arrays["top_p"])
    elif form.top_k:
        best = mx.sort(mx.topk(logits, form.top_k, axis=-1), axis=-1)
        last = mx.take_along_axis(best, arrays["last_of_best"], axis=-1)
        logits = mx.where((logits < last) & arrays["has_top_k"], NEGATIVE, logits)
    if form.min_p:
        best = mx.max(logits, axis=-1, keepdims=True) if order is None else logits[:, :1]
        logits = mx.where(logits < best + arrays["log_min_p"], NEGATIVE, logits)
    return logits, order


def _candidates(logits: mx.array, top_k: int) -> mx.array:
    """Tokens uint32 [B, N] of the largest logits [B, V], in the order of the vocabulary."""
    count = min(top_k + SPARE, logits.shape[-1])
    return mx.sort(mx.argpartition(-logits, count - 1, axis=-1)[:, :count], axis=-1)


def _within_top_p(logits: mx.array, p: mx.array) -> mx.array:
    """Keep the smallest set of logits [B, N], the largest first, whose probabilities reach p
    [B, 1]; at least the best one."""
    probabilities = mx.softmax(logits, axis=-1, precise=True)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    return mx.where(before < p, logits, NEGATIVE)


def choose(form: Form, logits: mx.array, arrays: Arrays) -> tuple[mx.array, Arrays]:
    """Logits float32 [B, V] -> tokens uint32 [B], and the state behind them."""
    adjusted_logits, state = adjusted(form, logits, arrays), Arrays()
    if not form.draws:
        tokens = mx.argmax(adjusted_logits, axis=-1)
    else:
        scores, order = filtered(form, adjusted_logits, arrays)
        pairs = mx.vmap(mx.random.split)(arrays["keys"])  # [B, 2, 2]
        state["keys"] = pairs[:, 0]
        noise = _gumbel(pairs[:, 1], logits.shape[-1])
        if order is not None:
            noise = mx.take_along_axis(noise, order, axis=-1)
        tokens = mx.argmax(scores + mx.where(arrays["draws"], noise, 0.0), axis=-1)
        if order is not None:
            tokens = mx.take_along_axis(order, tokens[:, None], axis=-1)[:, 0]
    tokens = tokens.astype(mx.uint32)
    for name in form.state:
        state[name] = arrays[name].at[arrays["rows"], tokens].add(1.0)
    return tokens, state


def _gumbel(keys: mx.array, size: int) -> mx.array:
    """Noise float32 [B, size] of keys [B, 2]: what `mx.random.categorical` adds to logits."""
    return mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(keys)


class GroupSampler:
    """Rows that are sampled in one call, and their state, stacked.

    Args: rows, which have their state here from now on; steps, `choose` for each form; is_gpu: one
    sort of all logits serves every row, where a CPU is faster with few candidates.
    """

    def __init__(self, rows: Sequence[RowSampler], steps: Steps, *, is_gpu: bool) -> None:
        self.rows, self._steps = list(rows), steps
        self._form = _form(rows, is_gpu=is_gpu)
        self._settings = _settings(self._form, rows)
        self._state = {
            name: mx.stack([_state(row, name) for row in rows])
            for name in ("keys", *self._form.state)
        }
        for i, row in enumerate(rows):
            row.move(self, i)

    def sample(self, logits: mx.array) -> mx.array:
        """Logits float32 [B, V] -> tokens uint32 [B], lazily; the state counts them."""
        form, arrays = self.inputs()
        tokens, state = self._steps(form)(logits, arrays)
        self._state |= state
        for row in self.rows:
            row.steps += 1
        return tokens

    def inputs(self) -> tuple[Form, Arrays]:
        """What the next step takes beside the logits."""
        arrays = self._settings | self._state
        withholds = np.array([[row.withholds_end] for row in self.rows])
        if not withholds.any():
            return self._form, arrays
        ends = np.zeros((len(self.rows), self.rows[0].vocab_size), bool)
        for row, own in zip(self.rows, ends, strict=True):
            own[row.end_ids] = row.withholds_end
        return replace(self._form, ends=True), arrays | {"ends": mx.array(ends)}

    def row(self, name: str, index: int) -> mx.array:
        return self._state[name][index]

    def state(self) -> list[mx.array]:
        """To be evaluated with every step, so that no lazy chain builds up."""
        return list(self._state.values())


def _form(rows: Sequence[RowSampler], *, is_gpu: bool) -> Form:
    drawing = [row.params for row in rows if not row.is_greedy]
    limits = [row.top_k for row in rows]
    top_p = any(p.top_p < 1 for p in drawing)
    return Form(
        state=tuple(name for name in ("counts", "seen") if any(row.has(name) for row in rows)),
        has_bias=any(row.bias is not None for row in rows),
        ends=False,
        draws=bool(drawing),
        top_k=_rounded(max(limits), rows[0].vocab_size),
        top_p=top_p,
        min_p=any(p.min_p > 0 for p in drawing),
        sorts_few=top_p and not is_gpu and min(limits) > 0,
    )


def _rounded(limit: int, vocab_size: int) -> int:
    """A power of two from there on, so that few forms are compiled; 0 stays 0."""
    return min(1 << (limit - 1).bit_length(), vocab_size) if limit else 0


def _state(row: RowSampler, name: str) -> mx.array:
    return row.state(name) if row.has(name) else mx.zeros((row.vocab_size,))


def _settings(form: Form, rows: Sequence[RowSampler]) -> Arrays:
    """The rows' settings as arrays, with values that change nothing where a row has one off."""
    params, size = [row.params for row in rows], rows[0].vocab_size
    limits = np.array([[row.top_k] for row in rows])
    columns: dict[str, list[float]] = {
        "temperature": [1.0 if row.is_greedy else row.params.temperature for row in rows],
        "top_p": [2.0 if row.is_greedy or row.params.top_p >= 1 else
                  max(row.params.top_p, SMALLEST) for row in rows],
        "log_min_p": [-np.inf if row.is_greedy or row.params.min_p <= 0 else
                      np.log(row.params.min_p) for row in rows],
        "repetition_penalty": [p.repetition_penalty for p in params],
        "frequency_penalty": [p.frequency_penalty for p in params],
        "presence_penalty": [p.presence_penalty for p in params],
    }  # fmt: skip
    arrays = {
        name: mx.array(np.array(values, np.float32)[:, None]) for name, values in columns.items()
    }
    arrays["draws"] = mx.array(np.array([[not row.is_greedy] for row in rows]))
    arrays["has_top_k"] = mx.array((limits > 0).tolist())
    arrays["last_in_order"] = mx.array(np.where(limits > 0, limits, size).astype(np.uint32) - 1)
    arrays["last_of_best"] = mx.array((form.top_k - np.maximum(limits, 1)).astype(np.uint32))
    arrays["rows"] = mx.arange(len(rows), dtype=mx.uint32)
    if form.has_bias:
        none = np.zeros(size, np.float32)
        bias = [none if row.bias is None else row.bias for row in rows]
        arrays["bias"] = mx.array(np.stack(bias))
    mx.eval(arrays)
    return arrays
