"""Continuous batching: requests are prefilled in slices and decode together, one step at a time.

One `step` of the scheduler: take new requests in, one slice of prefill (or of image encoding), one
decode step for all running rows. Only the owning thread calls it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import TextContext, require_known_tokens
from mlx_vlm_pipes.distributed.team import Team
from mlx_vlm_pipes.engine.caches import common_prefix
from mlx_vlm_pipes.engine.decode import Decode
from mlx_vlm_pipes.engine.draft_model import Drafter, DraftModel
from mlx_vlm_pipes.engine.lockstep import (
    FORGET,
    Leader,
    Leaving,
    Step,
    digest,
    followed_context,
    name_pictures,
)
from mlx_vlm_pipes.engine.plan import require_room
from mlx_vlm_pipes.engine.prefill import SHARED_MIN, Prefill
from mlx_vlm_pipes.engine.requests import (
    Handle,
    Job,
    OthersLogits,
    PromptLogits,
    PromptRow,
    new_job,
)
from mlx_vlm_pipes.engine.results import Results
from mlx_vlm_pipes.engine.state import EngineConfig, EngineState, EngineStats
from mlx_vlm_pipes.engine.text import NoText, StreamDecoder
from mlx_vlm_pipes.errors import RankLost, one_line
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import KVCache
from mlx_vlm_pipes.ranks import ALONE


class Scheduler:
    """Owns all jobs. Knows models only through `PipelineModelWithKVCache`.

    drafter: a smaller model that drafts for this one. team: the ranks that run the model, each
    with a scheduler in step with rank 0's (lockstep).
    """

    def __init__(
        self,
        model: PipelineModelWithKVCache,
        config: EngineConfig,
        drafter: Drafter | None = None,
        team: Team | None = None,
    ) -> None:
        ranks = ALONE if team is None else team.ranks
        self.state, self.vocab_size = EngineState(model, config, ranks), model.vocab_size
        self._leader = None if team is None or not ranks.is_first else Leader(team)
        if team is not None:
            self.state.decide = team.decide
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
        keys = self._keys(context)
        new_tokens = context.sampling_params.max_new_tokens
        capacity = self.state.capacity_needed(context, new_tokens)
        require_room(self.state, context, new_tokens, scored=context.log_probabilities_echo)
        job = new_job(context, decoder, self.vocab_size, keys, capacity)
        if self.draft_model is not None and context.speculative == "draft":
            job.drafts = self.draft_model.new_drafts(context.num_draft_tokens)
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
        keys = self._keys(context)
        capacity = self.state.capacity_needed(context, 1)
        require_room(self.state, context, 1, scored=False)
        job = new_job(context, NoText(), self.vocab_size, keys, capacity)
        job.prompt_row = PromptRow()
        return self._queue(job), job.prompt_row

    def _keys(self, context: TextContext) -> np.ndarray:
        """As `EngineState.keys`, of pictures that all ranks can name."""
        if self.state.ranks.are_many:
            name_pictures(context)
        return self.state.keys(context)

    def _queue(self, job: Job) -> Handle:
        self._results.live.add(job)
        self.waiting.append(job)
        if self._leader is not None:
            self._leader.take(job)
        return job.handle

    def step(self) -> bool:
        """Some work for everybody. Returns whether there is more. Raises: RankLost."""
        leaving = self._to_leave()
        if self._leader is not None:
            if not self.is_busy:
                return False  # the others wait for news, not for steps without work
            self._leader.announce(leaving, self._prefill.paces)
        return self.advance(leaving)

    def _to_leave(self) -> Leaving:
        """The jobs that end before the next step, and whether their prefixes are kept."""
        leaving = [(job, kept) for job, kept in self._results.leaving if job in self._results.live]
        self._results.leaving.clear()
        known = {job for job, _ in leaving}
        jobs = [*self.waiting, *self.prefilling, *self.running]
        return leaving + [(j, True) for j in jobs if j.handle.is_closed and j not in known]

    def advance(self, leaving: Leaving = ()) -> bool:
        """One step, once these jobs have gone. Returns whether there is more. Raises: RankLost for
        what only this rank may have met."""
        self.stats.steps += 1
        try:
            self._drop(leaving)
            self._admit()
            if self.prefilling and not self._prefill.gathers(len(self.running)):
                self._advance_prefill()
        except Exception as error:  # ours, not a request's: nobody may wait for ever
            self._require_alone(error)
            self.fail_all(error)
        if self._decode.is_busy:
            self._advance_decode()
        return self.is_busy

    def _require_alone(self, error: Exception) -> None:
        """Raises: RankLost where other ranks go on without this error."""
        if isinstance(error, RankLost):
            raise error
        if self.state.ranks.are_many:
            said = f"{type(error).__name__}: {one_line(error)}"
            raise RankLost(f"rank {self.state.ranks.rank} cannot go on: {said}") from error

    def follow(self, step: Step, classes: Mapping[str, type]) -> None:
        """The step that rank 0 has announced, on another rank. Raises: RankLost."""
        for said in step.jobs:
            self._take_followed(said, classes)
        if step.paces is not None:
            self._prefill.paces = step.paces
        jobs = {job.number: job for job in self._results.live}
        self.advance([(jobs[number], is_kept) for number, is_kept in step.leaving])

    def _take_followed(self, said: Mapping[str, Any], classes: Mapping[str, type]) -> None:
        context, wants = followed_context(said, classes), said["wants"]
        keys = np.zeros(0, np.int64) if wants == "logits" else self._keys(context)
        job = new_job(context, NoText(), self.vocab_size, keys, said["capacity"])
        job.number, job.is_silent = said["number"], True
        job.prompt_logits = OthersLogits() if wants == "logits" else None
        job.prompt_row = PromptRow() if wants == "row" else None
        self._queue(job)

    def lose(self, error: BaseException) -> None:
        """Tell all requesters; from any thread, whatever the owning one waits for."""
        for job in list(self._results.live):
            job.handle.put(error)

    def digest(self) -> str:
        """Names all that decides what the next steps do; the same on all ranks."""
        token, tokens = self.state.model.kv_params.bytes_per_token, []
        for job in (*self.waiting, *self.prefilling, *self.running):
            held, own = job.held, job.context.tokens
            row = None if held is None else (held.length, held.uncounted, held.slot, held.capacity)
            counts = (own.processed_length, own.active_length, job.cached_tokens, len(job.features))
            tokens.append((job.number, own.all, counts, row, job.capacity, job.keys))
        sizes = (len(self.waiting), len(self.prefilling), len(self.running))
        turns = self._prefill.turn, self._prefill.gathered
        config = self.state.config
        limits = (config.kv_bytes // token, config.prefix_bytes // token, config.image_bytes)
        kept = self.state.prefixes.contents(token), self.state.images.contents()
        return digest([sizes, turns, tokens, self.state.cache.shapes, limits, *kept])

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
        if self._leader is not None:
            self._leader.order(FORGET)
        self.state.prefixes.shrink(-1)
        self.state.images.shrink(-1)
        if self.draft_model is not None:
            self.draft_model.state.prefixes.shrink(-1)
        mx.clear_cache()

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

    def _drop(self, leaving: Leaving) -> None:
        for job, is_kept in leaving:
            for jobs in (self.waiting, self.prefilling, self.running):
                if job in jobs:
                    jobs.remove(job)
            self._results.leave(job, is_kept=is_kept)

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
        step_s = self._decode.settle() if self.running else None
        self.running.extend(self._prefill.advance(running=len(self.running)))
        self._prefill.note_step(step_s)  # behind the slice: other ranks have not measured the same

    def _advance_decode(self) -> None:
        try:
            for job in self._decode.step():
                self.state.reset_row(job)
                self.prefilling.insert(0, job)
        except Exception as error:  # the batch arrays are lost with the step
            self._require_alone(error)
            self._fail_decoding(error)
