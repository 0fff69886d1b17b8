"""Continuous batching: requests are prefilled in slices and decode together, one step at a time.

One `step` of the scheduler: take new requests in, one slice of prefill (or of image encoding), one
decode step for all running rows. Only the owning thread calls it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

import numpy as np

from mlx_vlm_pipes.contexts import TextContext, require_known_tokens
from mlx_vlm_pipes.engine.caches import common_prefix, prefix_keys
from mlx_vlm_pipes.engine.decode import Decode
from mlx_vlm_pipes.engine.draft_model import Drafter, DraftModel
from mlx_vlm_pipes.engine.plan import require_room
from mlx_vlm_pipes.engine.prefill import SHARED_MIN, Prefill
from mlx_vlm_pipes.engine.requests import Handle, Job, PromptLogits, PromptRow, new_job
from mlx_vlm_pipes.engine.results import Results
from mlx_vlm_pipes.engine.state import EngineConfig, EngineState, EngineStats
from mlx_vlm_pipes.engine.text import NoText, StreamDecoder
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import KVCache


class Scheduler:
    """Owns all jobs. Knows models only through `PipelineModelWithKVCache`.

    drafter: a smaller model that drafts for this one.
    """

    def __init__(
        self,
        model: PipelineModelWithKVCache,
        config: EngineConfig,
        drafter: Drafter | None = None,
    ) -> None:
        self.state, self.vocab_size = EngineState(model, config), model.vocab_size
        self.draft_model: DraftModel | None = None
        if drafter is not None:
            self.draft_model = DraftModel(drafter, config, model.vocab_size)
            self.state.beside = drafter.model
            self.limit(config)
        self.waiting: deque[Job] = deque()
        self._results = Results(self.state)
        self._prefill = Prefill(self.state, self._results)
        self._decode = Decode(self.state, self._results, self.draft_model)

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
        require_known_tokens(context.tokens.all, self.vocab_size)
        self.state.require_slice(context)
        keys = prefix_keys(context, self.state.salt(context, self.state.planned_length(context)))
        new_tokens = context.sampling_params.max_new_tokens
        capacity = self.state.capacity_needed(context, new_tokens)
        require_room(self.state, context, new_tokens, scored=context.log_probabilities_echo)
        job = new_job(context, decoder, self.vocab_size, keys, capacity)
        if self.draft_model is not None and context.speculative == "draft":
            job.drafts = self.draft_model.rows(context.num_draft_tokens)
        return self._queue(job)

    def submit_logits(self, context: TextContext) -> tuple[Handle, PromptLogits]:
        """Queue a request for the logits of a prompt: once its handle has ended, they are there.

        It shares no prefix: those tokens' logits are not kept. Raises: as `submit`.
        """
        require_known_tokens(context.tokens.all, self.vocab_size)
        self.state.require_slice(context)
        self.state.model.adapter_slot(context.model_name)  # raises for an unknown one
        capacity = self.state.capacity_needed(context, 1)
        require_room(self.state, context, 1, scored=True)
        job = new_job(context, NoText(), self.vocab_size, np.zeros(0, np.int64), capacity)
        job.prompt_logits = PromptLogits()
        return self._queue(job), job.prompt_logits

    def submit_row(self, context: TextContext) -> tuple[Handle, PromptRow]:
        """Queue a request for the keys and values of a prompt: once its handle has ended, they are
        there, and in the prefix cache. Raises: as `submit`.
        """
        require_known_tokens(context.tokens.all, self.vocab_size)
        self.state.require_slice(context)
        keys = prefix_keys(context, self.state.salt(context, self.state.planned_length(context)))
        capacity = self.state.capacity_needed(context, 1)
        require_room(self.state, context, 1, scored=False)
        job = new_job(context, NoText(), self.vocab_size, keys, capacity)
        job.prompt_row = PromptRow()
        return self._queue(job), job.prompt_row

    def _queue(self, job: Job) -> Handle:
        self._results.live.add(job)
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

    def limit(self, config: EngineConfig) -> None:
        """Take other limits; what is cached beyond them is forgotten.

        Prefixes of both models are kept for as many tokens.
        """
        if self.draft_model is None:
            self.state.limit(config)
            return
        beside = self.draft_model.state
        sizes = [state.model.kv_params.bytes_per_token for state in (self.state, beside)]
        own = config.prefix_bytes * sizes[0] // sum(sizes)
        self.state.limit(replace(config, prefix_bytes=own))
        beside.limit(replace(config, prefix_bytes=config.prefix_bytes - own))

    def forget(self) -> None:
        """Empty the prefix and image caches."""
        self.state.prefixes.shrink(-1)
        self.state.images.shrink(-1)
        if self.draft_model is not None:
            self.draft_model.state.prefixes.shrink(-1)

    def fail_all(self, error: BaseException) -> None:
        """End every request with this exception; the batch's cache is made anew."""
        self.waiting.clear()
        self.prefilling.clear()
        self._fail_decoding(error)

    def _fail_decoding(self, error: BaseException) -> None:
        """End every request that neither waits nor is in prefill, with the cache of the batch."""
        self._decode.drop()
        self.state.cache = KVCache(self.state.model.kv_params)
        if self.draft_model is not None:
            self.draft_model.drop()
        for job in self._results.live.difference(self.waiting, self.prefilling):
            self._results.abandon(job, error)

    def _drop_cancelled(self) -> None:
        for jobs in (self.waiting, self.prefilling, self.running):
            for job in [job for job in jobs if job.handle.is_closed]:
                jobs.remove(job)
                self._results.cancel(job)

    def _admit(self) -> None:
        """Move waiting jobs to prefill while rows and bytes last, in order.

        One whose prefix is being made waits for it and lets the others pass.
        """
        config = self.state.config
        for job in list(self.waiting):
            others = [*self.prefilling, *self.running]
            need = self.state.bytes_needed([*others, job])
            if others and (len(others) >= config.max_batch_size or need > config.kv_bytes):
                return
            if self._prefill.is_making(job):
                continue
            self.waiting.remove(job)
            self.prefilling.append(job)
            job.clock.started = time.perf_counter()
            self._keep_shared(job)
            job.held = self.state.row_from_prefix(job)
            self.state.prefixes.shrink(config.kv_bytes - need)

    def _keep_shared(self, job: Job) -> None:
        """Put the running prompt that begins most like this job's into the prefix cache."""
        shared = [(common_prefix(job.keys, other.keys), other) for other in self.running]
        length, other = max(shared, key=lambda pair: pair[0], default=(0, job))
        if length >= SHARED_MIN and length > self.state.prefixes.match(job.keys)[0]:
            self.state.remember(other)

    def _advance_prefill(self) -> None:
        if self.running:
            self._decode.settle()
        self.running.extend(self._prefill.advance(running=len(self.running)))

    def _advance_decode(self) -> None:
        try:
            for job in self._decode.step():
                self.state.reset_row(job)
                self.prefilling.insert(0, job)
        except Exception as error:  # the batch arrays are lost with the step
            self._fail_decoding(error)
