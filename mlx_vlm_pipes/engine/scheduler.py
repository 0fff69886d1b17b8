"""Continuous batching: requests are prefilled in slices and decode together, one step at a time.

One `step` of the scheduler: take new requests in, one slice of prefill (or of image encoding), one
decode step for all running rows. Only the owning thread calls it.
"""

from __future__ import annotations

import time
from collections import deque

from mlx_vlm_pipes.contexts import TextContext, require_known_tokens
from mlx_vlm_pipes.engine.caches import common_prefix, prefix_keys
from mlx_vlm_pipes.engine.decode import Decode
from mlx_vlm_pipes.engine.prefill import SHARED_MIN, Prefill
from mlx_vlm_pipes.engine.requests import Handle, Job, new_job
from mlx_vlm_pipes.engine.results import Results
from mlx_vlm_pipes.engine.state import EngineConfig, EngineState, EngineStats
from mlx_vlm_pipes.engine.text import StreamDecoder
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import KVCache


class Scheduler:
    """Owns all jobs. Knows models only through `PipelineModelWithKVCache`."""

    def __init__(self, model: PipelineModelWithKVCache, config: EngineConfig, vocab: int) -> None:
        self.state, self.vocab_size = EngineState(model, config), vocab
        self.waiting: deque[Job] = deque()
        self._results = Results(self.state)
        self._prefill = Prefill(self.state, self._results)
        self._decode = Decode(self.state, self._results)

    @property
    def stats(self) -> EngineStats:
        return self.state.stats

    @property
    def running(self) -> list[Job]:
        """The jobs that decode."""
        return self._decode.jobs

    @property
    def prefilling(self) -> list[Job]:
        """The jobs whose prompts are being computed."""
        return self._prefill.jobs

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self._decode.is_busy)

    def submit(self, context: TextContext, decoder: StreamDecoder) -> Handle:
        """Queue a request.

        Raises: InputError for bad sampling values, an unknown adapter or token ids beyond the
        vocabulary, OutOfBudget for what can never fit.
        """
        require_known_tokens(context.tokens.all, self.state.model.vocab_size)
        keys = prefix_keys(context, self.state.salt(context, self.state.planned_length(context)))
        capacity = self.state.capacity_needed(context)
        job = new_job(context, decoder, self.vocab_size, keys, capacity)
        self.waiting.append(job)
        return job.handle

    def step(self) -> bool:
        """Some work for everybody. Returns whether there is more."""
        self.stats.steps += 1
        try:
            self._drop_cancelled()
            self._admit()
            if self.prefilling:
                self._advance_prefill()
        except Exception as error:  # ours, not a request's: nobody may wait for ever
            self.fail_all(error)
        if self._decode.is_busy:
            self._advance_decode()
        return self.is_busy

    def fail_all(self, error: BaseException) -> None:
        """End every request with this exception."""
        jobs = [*self.waiting, *self.prefilling, *self._decode.drop()]
        self.waiting.clear()
        self.prefilling.clear()
        for job in jobs:
            self._results.fail(job, error)

    def _drop_cancelled(self) -> None:
        for jobs in (self.waiting, self.prefilling, self.running):
            for job in [job for job in jobs if job.handle.is_closed]:
                jobs.remove(job)
                self._results.cancel(job)

    def _admit(self) -> None:
        """Move waiting jobs to prefill while rows and bytes last, in order."""
        config = self.state.config
        while self.waiting:
            job, others = self.waiting[0], [*self.prefilling, *self.running]
            need = self.state.bytes_needed([*others, job])
            if others and (len(others) >= self.state.max_rows or need > config.kv_bytes):
                return
            if self._prefill.is_making(job):
                return
            self.waiting.popleft()
            job.clock.started = time.perf_counter()
            job.held = self.state.row_from_prefix(job)
            self.state.prefixes.shrink(config.kv_bytes - need)
            self.prefilling.append(job)

    def _advance_prefill(self) -> None:
        started = self._prefill.advance(others_wait=bool(self.running))
        for job in started:
            shared = [common_prefix(job.keys, other.keys) for other in self.waiting]
            if max(shared, default=0) >= SHARED_MIN:
                self.state.remember(job)
        self.running.extend(started)

    def _advance_decode(self) -> None:
        try:
            crossing = self._decode.step()
        except Exception as error:  # the batch arrays are lost with the step
            for job in self._decode.drop():
                self._results.fail(job, error)
            self.state.cache = KVCache(self.state.model.kv_params)
            return
        for job in crossing:
            self.state.reset_row(job)
            self.prefilling.insert(0, job)
