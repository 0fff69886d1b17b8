"""From a step's logits to the requester: sampling row by row, chunks out, the end of a request.

A failure here (a sampler or a detokeniser that raises) belongs to one request and ends only that.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_vlm_pipes.contexts import GenerationStatus
from mlx_vlm_pipes.engine.requests import Chunk, Job
from mlx_vlm_pipes.engine.state import EngineState
from mlx_vlm_pipes.log_probabilities import log_probabilities


class Results:
    """Hands tokens to requests and takes finished ones apart."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    def sample(self, logits: mx.array, jobs: Sequence[Job]) -> mx.array:
        """logits float32 [B, V] -> tokens uint32 [B], lazily; one argmax where all are greedy."""
        if all(job.sampler.is_plain for job in jobs):
            for job in jobs:
                job.sampler.steps += 1
            return mx.argmax(logits, axis=-1)
        return mx.stack([self._sample_one(logits[i], job) for i, job in enumerate(jobs)])

    def _sample_one(self, logits: mx.array, job: Job) -> mx.array:
        try:
            return job.sampler.next_token(logits).astype(mx.uint32)
        except Exception as error:  # this request's failure is nobody else's
            job.failure = error
            return mx.argmax(logits)

    def deliver(self, job: Job, token: int, logits: mx.array, row: int = 0) -> bool:
        """Give a token, chosen from logits [B, V] at `row`, to its request; False if it ended."""
        try:
            if job.failure is not None:
                raise job.failure
            return self._deliver(job, token, logits, row)
        except Exception as error:
            self.fail(job, error)
            return False

    def _deliver(self, job: Job, token: int, logits: mx.array, row: int) -> bool:
        context, score = job.context, None
        if job.top_logprobs:
            score = log_probabilities(logits[row : row + 1], [token], job.top_logprobs)
        context.update(token)
        ended = context.status is GenerationStatus.END_OF_SEQUENCE
        # An end token is no text; it is still reported as a token.
        text = "" if ended else job.stream.add(token)
        if job.stream.stopped:
            context.status = GenerationStatus.END_OF_SEQUENCE
        if not context.is_done:
            job.handle.put(Chunk(text, token, score))
            return True
        text += job.stream.finish()
        self._state.remember(job)
        self._free(job)
        reason = context.status.value
        timings = job.clock.timings()
        job.handle.put(Chunk(text, token, score, reason, job.usage(), timings, job.prompt_logprobs))
        job.handle.put(None)
        return False

    def cancel(self, job: Job) -> None:
        """The requester has gone: keep what was computed, free the row."""
        job.context.status = GenerationStatus.CANCELLED
        self._state.remember(job)
        self._free(job)
        job.handle.put(None)

    def fail(self, job: Job, error: BaseException) -> None:
        """End a request with an exception, raised where it is iterated."""
        job.context.status = GenerationStatus.CANCELLED
        self._free(job)
        job.handle.put(error)

    def _free(self, job: Job) -> None:
        job.features.clear()
        if job.held is not None:
            self._state.cache.release(job.held)
            job.held = None
