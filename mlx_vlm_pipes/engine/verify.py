"""A step over drafted tokens: each row's last token and its draft run at once, and as much of the
draft is kept as the row would have chosen by itself.

Every token is chosen by the row's own sampler, one after the other, from the logits behind the
tokens before it, until one is not as drafted. So options, seeds and forms of answers work as in a
step over one token, and what the cache holds behind the kept tokens is given up. Tokens that the
form of an answer forces are drafts that cannot fail; they come before any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.engine.draft_model import DraftModel, ModelDrafts
from mlx_vlm_pipes.engine.drafts import WIDEST
from mlx_vlm_pipes.engine.lookup import Lookup
from mlx_vlm_pipes.engine.requests import Job
from mlx_vlm_pipes.engine.results import Results
from mlx_vlm_pipes.engine.state import EngineState
from mlx_vlm_pipes.engine.worth import Size, Worth
from mlx_vlm_pipes.interfaces import Phase
from mlx_vlm_pipes.kv_cache import cache_inputs, capacity_bucket

WIDTHS = WIDEST, WIDEST // 2  # tokens of each row in such a step: few, so that few are compiled
MOST_TOKENS = 64  # of all rows


@dataclass
class _Row:
    """A row of the step. first: its place on the step's token axis. is_forced: its draft comes
    from the form of its answer."""

    job: Job
    first: int
    draft: list[int]
    is_forced: bool
    kept: int = 0

    def takes(self, token: int) -> bool:
        """Count a chosen token; whether it is as drafted, so that the next logits hold too."""
        self.job.row.count(1)
        if self.kept == len(self.draft) or self.draft[self.kept] != token:
            return False
        self.kept += 1
        self.job.kept += 1
        return True

    def judge(self) -> None:
        """Tell where the drafts come from how much was right."""
        drafts = self.job.drafts
        if drafts is None or self.is_forced:
            return
        if self.draft:
            drafts.note(self.kept, len(self.draft))
        else:
            drafts.watch(self.job.context.tokens.all)


class Verify:
    """Steps over drafted tokens of the rows that decode. worth: knows whether they pay."""

    def __init__(self, state: EngineState, results: Results, model: DraftModel | None) -> None:
        self._state, self._results, self._model = state, results, model
        self.worth = Worth()

    def width(self, jobs: Sequence[Job], coming: int = 0) -> int:
        """Tokens of each row in the next step: several where drafts are worth it, else 1.

        coming: tokens of each row that are in flight.
        """
        if not any(_speculates(job) for job in jobs):
            return 1
        return self._state.decide(lambda: self._best_width(jobs, coming))

    def _best_width(self, jobs: Sequence[Job], coming: int) -> int:
        expected = {width: _expected(jobs, width - 1, coming) for width in WIDTHS}
        if not any(expected.values()):
            return 1
        gains = {
            width: self.worth.gain(self._size(jobs, width), expected[width])
            for width in WIDTHS
            if len(jobs) * width <= MOST_TOKENS
            and all(job.row.length + width <= capacity_bucket(job.capacity) for job in jobs)
        }
        best = max(gains, key=lambda width: gains[width], default=1)
        return best if gains.get(best) else 1

    def run(self, jobs: Sequence[Job], width: int) -> list[Job] | None:
        """One step over `width` tokens of each row; the jobs that go on. None: nothing is drafted.

        Rows without a draft get one token, as in any step.
        """
        begun, size, once = self._state.clock(), self._size(jobs, width), self._once()
        drafts = self._state.decide(lambda: self._drafted(jobs, width))
        rows = [
            _Row(job, i * width, *own)
            for i, (job, own) in enumerate(zip(jobs, drafts, strict=True))
        ]
        if not any(row.draft for row in rows):
            return None
        logits = self._logits(rows, width)
        before = sum(job.context.tokens.generated_length for job in jobs)
        for row in rows:
            row.job.drafted += len(row.draft)
        ended = set(self._deliver(logits, rows))
        for row in rows:
            if row.job not in ended:
                row.job.row.uncounted = 0  # the rest of the draft
                row.judge()
        made = sum(job.context.tokens.generated_length for job in jobs) - before
        if once == self._once():
            self.worth.note(size, made, self._state.clock() - begun)
        return [job for job in jobs if job not in ended]

    def _once(self) -> list[int]:
        """Counts what is done once and not in each step: compiling, reading prompts."""
        model = self._model
        more = [] if model is None else [model.slices, model.model.language.traces]
        return [self._state.model.language.traces, *more]

    def _size(self, jobs: Sequence[Job], width: int) -> Size:
        by_model = any(
            isinstance(job.drafts, ModelDrafts) and job.drafts.is_on and not job.forced
            for job in jobs
        )
        return len(jobs), width, by_model

    def _drafted(self, jobs: Sequence[Job], width: int) -> list[tuple[list[int], bool]]:
        """What each row of a step drafts, and whether the form of its answer forces it."""
        rooms = {job: self._room(job, width - 1) for job in jobs}
        found: dict[Job, list[int]] = {job: job.forced[: rooms[job]] for job in jobs if job.forced}
        forced, asking = set(found), list[tuple[Job, ModelDrafts]]()
        for job in jobs:
            if job in forced or job.drafts is None or not job.drafts.is_on:
                continue
            if isinstance(job.drafts, Lookup):
                found[job] = job.drafts.draft(job.context.tokens.all, rooms[job])
            elif isinstance(job.drafts, ModelDrafts) and rooms[job] > 0:
                asking.append((job, job.drafts))
        found |= self._drafted_by_model(asking, rooms, others_wait=len(jobs) > 1)
        return [(found.get(job, []), job in forced) for job in jobs]

    def _drafted_by_model(
        self,
        asking: Sequence[tuple[Job, ModelDrafts]],
        rooms: Mapping[Job, int],
        *,
        others_wait: bool,
    ) -> dict[Job, list[int]]:
        """What goes wrong with it (memory) is a warning: no answer needs it."""
        if self._model is None or not asking:
            return {}
        most = {job: min(rooms[job], drafts.most) for job, drafts in asking}
        try:
            made = self._model.draft(asking, max(most.values()), others_wait=others_wait)
        except Exception as error:
            warnings.warn(f"nothing is drafted: {error}", RuntimeWarning, stacklevel=2)
            self._model.drop()
            for _, drafts in asking:
                drafts.rest()
            return {}
        return {job: own[: most[job]] for job, own in made.items()}

    def _room(self, job: Job, most: int) -> int:
        """How many tokens a row may draft: no more than it may still have behind the next one."""
        tokens, edge = job.context.tokens, self._state.model.cache_break_length
        limit = job.context.sampling_params.max_new_tokens
        room = [most, job.context.max_length - len(tokens) - 1]
        if limit is not None:
            room.append(limit - tokens.generated_length - 1)
        if edge is not None and job.row.length < edge:
            room.append(edge - job.row.length - 1)
        return max(0, min(room))

    def _logits(self, rows: Sequence[_Row], width: int) -> mx.array:
        """float32 [rows * width, V]: behind each row's last token, its draft, and what fills up."""
        model, jobs = self._state.model, [row.job for row in rows]
        kv = cache_inputs(self._state.cache, [job.row for job in jobs])
        for row in rows:
            tokens = row.job.context.tokens
            tokens.draft([*row.draft, *[int(tokens[-1])] * (width - 1 - len(row.draft))])
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
            rows, place = right, place + 1


def _speculates(job: Job) -> bool:
    """Whether it may ever have drafts. Several ranks know that alike; the drafts only rank 0."""
    context = job.context
    has_form = context.constraint is not None and context.speculative != "none"
    return job.drafts is not None or has_form


def _expected(jobs: Sequence[Job], most: int, coming: int) -> float:
    """How many of `most` drafted tokens of each row will be kept; coming: as `Verify.width`."""
    forced = sum(min(most, max(0, len(job.forced) - coming)) for job in jobs)
    drafting = [job.drafts for job in jobs if job.drafts is not None and not job.forced]
    return forced + sum(drafts.expected(most) for drafts in drafting if drafts.is_on)
