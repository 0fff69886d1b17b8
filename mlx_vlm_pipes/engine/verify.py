"""A step over drafted tokens: each row's last token and its draft run at once, and as much of the
draft is kept as the row would have chosen by itself.

Every token is chosen by the row's own sampler, one after the other, from the logits behind the
tokens before it, until one is not as drafted. So options, seeds and forms of answers work as in a
step over one token, and what the cache holds behind the kept tokens is given up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.engine.requests import Job
from mlx_vlm_pipes.engine.results import Results
from mlx_vlm_pipes.engine.state import EngineState
from mlx_vlm_pipes.interfaces import Phase
from mlx_vlm_pipes.kv_cache import cache_inputs, capacity_bucket

WIDTHS = (8, 4)  # tokens of each row in such a step: few sizes, so that few are compiled
MOST_TOKENS = 16  # of all rows: from there on such a step takes twice the time of one over one


@dataclass
class _Row:
    """A row of the step. first: its place on the step's token axis."""

    job: Job
    first: int
    draft: list[int]
    kept: int = 0

    def takes(self, token: int) -> bool:
        """Count a chosen token; whether it is as drafted, so that the next logits hold too."""
        lookup = self.job.lookup
        self.job.row.count(1)
        if lookup is None or self.kept == len(self.draft) or self.draft[self.kept] != token:
            return False
        self.kept += 1
        lookup.kept += 1
        return True


class Verify:
    """Steps over drafted tokens of the rows that decode."""

    def __init__(self, state: EngineState, results: Results) -> None:
        self._state, self._results = state, results

    def width(self, jobs: Sequence[Job]) -> int:
        """Tokens of each row in the next step: several where drafts are worth it, else 1.

        All rows wait for it, so one token more is expected for each of them.
        """
        drafting = [job.lookup for job in jobs if job.lookup is not None and job.lookup.is_on]
        if not drafting:
            return 1
        for width in WIDTHS:
            expected = sum(lookup.expected(width - 1) for lookup in drafting)
            fits = len(jobs) * width <= MOST_TOKENS and all(
                job.row.length + width <= capacity_bucket(job.capacity) for job in jobs
            )
            if fits and expected >= len(jobs):
                return width
        return 1

    def run(self, jobs: Sequence[Job], width: int) -> list[Job] | None:
        """One step over `width` tokens of each row; the jobs that go on. None: nothing is drafted.

        Rows without a draft get one token, as in any step.
        """
        drafts = [self._draft(job, width - 1) for job in jobs]
        if not any(drafts):
            return None
        logits = self._logits(jobs, drafts, width)
        rows = [_Row(job, i * width, drafts[i]) for i, job in enumerate(jobs)]
        for row in rows:
            if row.job.lookup is not None:
                row.job.lookup.drafted += len(row.draft)
        ended = set(self._deliver(logits, rows))
        for row in rows:
            if row.job in ended:
                continue
            row.job.row.uncounted = 0  # the rest of the draft
            if row.job.lookup is not None and row.draft:
                row.job.lookup.note(row.kept / len(row.draft))
        return [job for job in jobs if job not in ended]

    def _draft(self, job: Job, most: int) -> list[int]:
        """What a row drafts: no more than it may still have behind the next token."""
        lookup, tokens = job.lookup, job.context.tokens
        if lookup is None or not lookup.is_on:
            return []
        limit, edge = (
            job.context.sampling_params.max_new_tokens,
            self._state.model.cache_break_length,
        )
        room = [most, job.context.max_length - len(tokens) - 1]
        if limit is not None:
            room.append(limit - tokens.generated_length - 1)
        if edge is not None and job.row.length < edge:
            room.append(edge - job.row.length - 1)
        return lookup.draft(tokens.all, min(room))

    def _logits(self, jobs: Sequence[Job], drafts: Sequence[Sequence[int]], width: int) -> mx.array:
        """float32 [rows * width, V]: behind each row's last token, its draft, and what fills up."""
        model = self._state.model
        kv = cache_inputs(self._state.cache, [job.row for job in jobs])
        for job, draft in zip(jobs, drafts, strict=True):
            filler = [int(job.context.tokens[-1])] * (width - 1 - len(draft))
            job.context.tokens.draft([*draft, *filler])
        try:
            contexts = model.as_replicas([job.context for job in jobs])
            inputs = model.prepare_initial_token_inputs(contexts, kv, width)
        finally:
            for job in jobs:
                job.context.tokens.drop_draft(width - 1)
        inputs.phase = Phase.VERIFY
        outputs = model.execute(inputs)
        self._state.note_bucket()
        return outputs.logits

    def _deliver(self, logits: mx.array, rows: Sequence[_Row]) -> Iterator[Job]:
        """Choose tokens for as long as drafts were right, and hand them out; the jobs that end."""
        place = 0
        while rows:
            own = logits[mx.array([row.first + place for row in rows], dtype=mx.uint32)]
            sampled = self._results.sample(own, [row.job for row in rows])
            mx.eval(sampled.arrays())
            right = []
            for row, (token, score) in zip(rows, sampled.read(), strict=True):
                is_right = row.takes(token)
                if not self._results.deliver(row.job, token, score):
                    yield row.job
                elif is_right:
                    right.append(row)
                elif row.job.lookup is not None and not row.draft:
                    row.job.lookup.watch(row.job.context.tokens.all)
            rows, place = right, place + 1
