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
    """Hands tokens to requests and takes finished ones apart.

    live: the requests that have not ended, wherever they are.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self.live: set[Job] = set()

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
            chunk = self._chunk(job, token, logits, row)
        except Exception as error:
            self.fail(job, error)
            return False
        if chunk.finish_reason is None:
            job.handle.put(chunk)
            return True
        self._end(job, chunk, None, is_kept=True)
        return False

    def _chunk(self, job: Job, token: int, logits: mx.array, row: int) -> Chunk:
        """What the token adds to the answer. The last chunk carries what is told at the end."""
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
            return Chunk(text, token, score)
        text += job.stream.finish()
        reason, timings = context.status.value, job.clock.timings()
        return Chunk(text, token, score, reason, job.usage(), timings, job.prompt_logprobs)

    def finish_prompt(self, job: Job) -> None:
        """End a request for the logits of its prompt, which has them all."""
        self._end(job, None)

    def cancel(self, job: Job) -> None:
        """The requester has gone: keep what was computed, free the row."""
        job.context.status = GenerationStatus.CANCELLED
        self._end(job, None, is_kept=True)

    def fail(self, job: Job, error: BaseException) -> None:
        """End a request with an exception, raised where it is iterated."""
        job.context.status = GenerationStatus.CANCELLED
        self._end(job, error)

    def abandon(self, job: Job, error: BaseException) -> None:
        """As fail, for a row that is lost with the cache it lies in: it is not freed."""
        job.held = None
        self.fail(job, error)

    def _end(self, job: Job, *last: Chunk | BaseException | None, is_kept: bool = False) -> None:
        """Take a request apart and put the last items; is_kept: its prefix is cached.

        The requester hears of it even where the row cannot be freed; that error is raised.
        """
        self.live.discard(job)
        try:
            if is_kept:
                self._state.remember(job)
            job.features.clear()
            if job.held is not None:
                self._state.cache.release(job.held)
                job.held = None
        finally:
            for item in last:
                job.handle.put(item)
