"""Rows that decode together, one token a step; while text goes out, the next step is in flight."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.engine.draft_model import DraftModel
from mlx_vlm_pipes.engine.handover import overlaps
from mlx_vlm_pipes.engine.memory import trim_pool
from mlx_vlm_pipes.engine.requests import Job
from mlx_vlm_pipes.engine.results import Results, Sampled
from mlx_vlm_pipes.engine.state import EngineState
from mlx_vlm_pipes.engine.verify import Verify
from mlx_vlm_pipes.interfaces import ModelInputs
from mlx_vlm_pipes.kv_cache import KVCacheInputs, cache_inputs, increment_cache_lengths


@dataclass
class Flight:
    """A decode step that has been launched and not been read yet.

    sampled: None while the form of an answer waits for the tokens of the step before.
    """

    jobs: list[Job]
    inputs: ModelInputs
    kv: KVCacheInputs
    logits: mx.array
    sampled: Sampled | None
    is_resized: bool  # the cache's arrays are new: the old ones are free once the step is done
    begun: float | None  # by the engine's clock; None where other work comes between
    is_settled: bool = False  # has been waited for


class Decode:
    """The running jobs, in the order of their slots."""

    def __init__(
        self, state: EngineState, results: Results, draft_model: DraftModel | None
    ) -> None:
        self._state, self._results = state, results
        self._verify = Verify(state, results, draft_model)
        self.jobs: list[Job] = []
        self._flight: Flight | None = None
        self._cache_bytes = 0  # of the batch in the last step
        self._was_read = 0.0  # when, by the engine's clock

    @property
    def is_busy(self) -> bool:
        return bool(self.jobs) or self._flight is not None

    def step(self) -> list[Job]:
        """Launch the next step where rows are unchanged, then read the one before it.

        Returns the jobs that left because they must be prefilled again (see `_take_crossing`).
        """
        flight = self._flight
        if flight is not None:
            self._flight = self._launch_behind(flight)
            self._read(flight)
            if self._flight is not None and self._flight.sampled is None:
                self._sample(self._flight)
            if flight.is_resized:
                trim_pool(self._state.cache.nbytes)
        if self._flight is not None:
            return []
        crossing = self._take_crossing()
        self.jobs.sort(key=_slot)  # rows that stay keep their slots, so nothing is moved
        if self.jobs and not self._step_over_drafts():
            self._flight = self._launch_fresh()
        return crossing

    def _step_over_drafts(self) -> bool:
        """Run and read a step over drafted tokens, where there are any worth it."""
        width, before = self._verify.width(self.jobs), self._state.cache.nbytes
        running = self._verify.run(self.jobs, width) if width > 1 else None
        if running is None:
            return False
        self.jobs[:] = running
        if self._state.cache.nbytes != before:
            trim_pool(self._state.cache.nbytes)
        return True

    def settle(self) -> float | None:
        """Wait for the step in flight, so that what comes next is not measured with it; the seconds
        that it has taken, if they are known."""
        flight = self._flight
        if flight is None:
            return None
        begun, flight.begun = flight.begun, None
        if flight.sampled is None:
            return None
        mx.eval(flight.sampled.tokens)
        flight.is_settled, before, self._was_read = True, self._was_read, self._state.clock()
        return None if begun is None else self._was_read - max(begun, before)

    def drop(self) -> None:
        """Forget all jobs and the step in flight."""
        self.jobs, self._flight = [], None

    def _launch_behind(self, flight: Flight) -> Flight | None:
        """The step after `flight`, from its unread tokens; None where rows are to change."""
        if flight.jobs != self.jobs:
            return None
        if any(self._ends_by_length(job) or self._crosses(job) for job in flight.jobs):
            return None
        if self._verify.width(flight.jobs, coming=1) > 1:
            return None  # drafts go on from tokens that are to be read first
        assert flight.sampled is not None
        inputs = self._state.model.prepare_next_token_inputs(flight.sampled.tokens, flight.inputs)
        return self._launch(inputs, flight.kv, flight.jobs)

    def _ends_by_length(self, job: Job) -> bool:
        """Whether the token in flight is the last that this job may have."""
        tokens, limit = job.context.tokens, job.context.sampling_params.max_new_tokens
        if limit is not None and tokens.generated_length + 1 >= limit:
            return True
        return len(tokens) + 1 >= job.context.max_length

    def _crosses(self, job: Job) -> bool:
        """Whether the row's next token needs another rotary table than its cache has."""
        edge = self._state.model.cache_break_length
        return edge is not None and job.row.length == edge

    def _take_crossing(self) -> list[Job]:
        """Rows that outgrow LongRoPE's short table leave, to be prefilled with the long one."""
        crossing = [job for job in self.jobs if self._crosses(job)]
        self.jobs = [job for job in self.jobs if job not in crossing]
        return crossing

    def _launch_fresh(self) -> Flight:
        """A decode step from the contexts' own tokens, after the rows have changed."""
        jobs = list(self.jobs)
        kv = cache_inputs(self._state.cache, [job.row for job in jobs])
        model = self._state.model
        contexts = model.as_replicas([job.context for job in jobs])
        inputs = model.prepare_initial_token_inputs(contexts, kv)
        return self._launch(inputs, kv, jobs)

    def _launch(self, inputs: ModelInputs, kv: KVCacheInputs, jobs: list[Job]) -> Flight:
        begun, traces = self._state.clock(), self._state.stats.traces
        outputs = self._state.model.execute(inputs)
        increment_cache_lengths(kv, [1] * len(jobs))
        self._state.note_bucket()
        logits, sampled = outputs.last_logits(), None
        is_behind = self._flight is not None
        if not is_behind or not any(job.context.constraint for job in jobs):
            sampled = self._results.sample(logits, jobs)
        if is_behind and not overlaps(self._state):
            self._state.model.device.synchronize()  # reading its tokens would not free the cache
        mx.async_eval([logits] if sampled is None else sampled.arrays())
        before, self._cache_bytes = self._cache_bytes, self._state.cache.nbytes
        is_resized = before != self._cache_bytes
        is_usual = traces == self._state.stats.traces
        return Flight(jobs, inputs, kv, logits, sampled, is_resized, begun if is_usual else None)

    def _sample(self, flight: Flight) -> None:
        """Choose a step's tokens, once those of the step before are known."""
        flight.sampled = self._results.sample(flight.logits, flight.jobs)
        mx.async_eval(flight.sampled.arrays())

    def _read(self, flight: Flight) -> None:
        """Wait for a step's tokens and hand them out; jobs that end leave."""
        assert flight.sampled is not None
        read = flight.sampled.read()
        self._note(flight)
        for job, (token, score) in zip(flight.jobs, read, strict=True):
            if job not in self.jobs:
                continue
            if not self._results.deliver(job, token, score):
                self.jobs.remove(job)
            elif job.drafts is not None:
                job.drafts.watch(job.context.tokens.all)

    def _note(self, flight: Flight) -> None:
        """Tell how long the step has taken: since the one before it was read, if it waited."""
        if flight.is_settled:
            return
        now, before = self._state.clock(), self._was_read
        self._was_read = now
        if flight.begun is not None:
            self._verify.worth.note_plain(len(flight.jobs), now - max(flight.begun, before))


def _slot(job: Job) -> float:
    """Place in the batch arrays; rows that are new come last."""
    return float("inf") if job.row.slot is None else job.row.slot
