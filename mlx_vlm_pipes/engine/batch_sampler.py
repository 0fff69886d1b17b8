"""The rows of a step to their next tokens: in groups, as the device wants them.

A GPU takes all rows in one group, in few compiled kernels: their number is what sampling costs
there. A CPU takes rows of a kind together, uncompiled: a row that wants no order is not sorted,
and MLX's own loops are faster than one that g++ makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.engine.group_sampler import Arrays, Form, GroupSampler, choose
from mlx_vlm_pipes.engine.row_sampler import RowSampler

Part = tuple[list[int], GroupSampler]  # places in the step, and their rows


class BatchSampler:
    """Samples the rows of one engine, and keeps their groups for as long as rows stay the same."""

    def __init__(self, *, is_gpu: bool) -> None:
        self._is_gpu = is_gpu
        self._steps: dict[Form, Callable[..., tuple[mx.array, Arrays]]] = {}
        self._rows: list[RowSampler] = []
        self._parts: list[Part] = []

    def __call__(
        self, logits: mx.array, rows: Sequence[RowSampler]
    ) -> tuple[mx.array, dict[int, Exception]]:
        """Logits float32 [B, V] -> tokens uint32 [B], lazily, and what failed of which rows.

        One argmax where all are greedy.
        """
        if all(row.is_plain for row in rows):
            for row in rows:
                row.steps += 1
            return mx.argmax(logits, axis=-1), {}
        if list(rows) != self._rows:
            self._rows, self._parts = list(rows), self._grouped(rows)
        failures: dict[int, Exception] = {}
        order = [place for places, _ in self._parts for place in places]
        tokens = [self._sample(part, logits, failures) for part in self._parts]
        if len(tokens) == 1:
            return tokens[0], failures
        return mx.concatenate(tokens)[mx.array(np.argsort(order))], failures

    def state(self) -> list[mx.array]:
        """What the last call changed, to be evaluated with its tokens."""
        groups = [group for _, group in self._parts]
        shown = [row.tokens for group in groups for row in group.rows if row.processors]
        return [*shown, *(array for group in groups for array in group.state())]

    def _grouped(self, rows: Sequence[RowSampler]) -> list[Part]:
        kinds: dict[object, list[int]] = {}
        for i, row in enumerate(rows):
            kind = i if row.processors else "all" if self._is_gpu else _kind(row)
            kinds.setdefault(kind, []).append(i)
        return [(places, self._group([rows[i] for i in places])) for places in kinds.values()]

    def _group(self, rows: Sequence[RowSampler]) -> GroupSampler:
        return GroupSampler(rows, self._step, is_gpu=self._is_gpu)

    def _step(self, form: Form) -> Callable[..., tuple[mx.array, Arrays]]:
        if form not in self._steps:
            step = functools.partial(choose, form)
            self._steps[form] = mx.compile(step) if self._is_gpu else step
        return self._steps[form]

    def _sample(self, part: Part, logits: mx.array, failures: dict[int, Exception]) -> mx.array:
        """A group's tokens. Where it fails, find out whose failure it is: that row's only."""
        places, group = part
        whole = places == list(range(logits.shape[0]))
        try:
            own = logits if whole else logits[mx.array(places)]
            row = group.rows[0]
            if not row.processors:
                return group.sample(own)
            token = group.sample(row.processed(own))
            row.note(token)
            return token
        except Exception as error:
            if len(places) == 1:
                failures[places[0]] = error
                return mx.argmax(logits[places[0]], keepdims=True)
        alone = [
            ([place], self._group([row])) for place, row in zip(places, group.rows, strict=True)
        ]
        self._rows = []  # groups are made anew at the next step
        return mx.concatenate([self._sample(one, logits, failures) for one in alone])


def _kind(row: RowSampler) -> tuple[bool, ...]:
    """Rows with the same answer take the same work."""
    params = row.params
    state = (row.has("counts"), row.has("seen"), row.bias is not None)
    if row.is_greedy:
        return (True, *state)
    return (False, *state, row.top_k > 0, params.top_p < 1, params.min_p > 0)
