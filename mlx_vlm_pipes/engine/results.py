"""From a step's logits to the requester: tokens and scores, chunks out, the end of a request.

A failure here (a sampler or a detokeniser that raises) belongs to one request and ends only that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import GenerationStatus
from mlx_vlm_pipes.engine.batch_sampler import BatchSampler
from mlx_vlm_pipes.engine.requests import Chunk, Job
from mlx_vlm_pipes.engine.state import EngineState
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.log_probabilities import LogProbabilities, Scores, launch_scores


@dataclass(frozen=True)
class Sampled:
    """A step's tokens, uint32 [B], and what is told of them; launched, or about to be."""

    tokens: mx.array
    scores: Scores | None
    state: list[mx.array]

    def arrays(self) -> list[mx.array]:
        """All that is to be computed with the step."""
        scored = [] if self.scores is None else self.scores.arrays()
        return [self.tokens, *scored, *self.state]

    def read(self) -> list[tuple[int, LogProbabilities | None]]:
        """Wait for them: each row's token, and its score where one is wanted."""
        tokens: list[int] = self.tokens.tolist()  # pyright: ignore[reportAssignmentType]  # 1-D
        scores = {} if self.scores is None else self.scores.read()
        return [(token, scores.get(i)) for i, token in enumerate(tokens)]


class Results:
    """Hands tokens to requests and takes finished ones apart.

    live: the requests that have not ended, wherever they are.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._sampler = BatchSampler(is_gpu=state.model.kv_params.devices[0].is_gpu())
        self.live: set[Job] = set()
        self.leaving: list[tuple[Job, bool]] = []  # answered, to be ended with the next step

    def sample(self, logits: mx.array, jobs: Sequence[Job]) -> Sampled:
        """logits float32 [B, V] -> tokens uint32 [B] and what is told of them, lazily.

        Answers that must have a form get no token that does not fit it. Of several ranks the first
        one chooses.
        """
        ranks = self._state.ranks
        if not ranks.is_first:
            return Sampled(ranks.from_first(mx.argmax(logits, axis=-1)), None, [])
        masked = self._masked(logits, jobs)
        tokens, failures = self._sampler(masked, [job.sampler for job in jobs])
        for place, error in failures.items():
            jobs[place].failure = error
        tokens = ranks.from_first(tokens)
        wanting = {i: job.top_logprobs for i, job in enumerate(jobs) if job.top_logprobs}
        scores = launch_scores(logits, tokens, wanting) if wanting else None
        return Sampled(tokens, scores, self._sampler.state())

    def _masked(self, logits: mx.array, jobs: Sequence[Job]) -> mx.array:
        """The logits, those of tokens that do not fit at minus infinity; other rows keep theirs."""
        bound = [i for i, job in enumerate(jobs) if job.context.constraint and self._is_told(job)]
        if not bound:
            return logits
        words = np.full((len(jobs), -(-logits.shape[-1] // 32)), 2**32 - 1, np.uint32)
        for i in bound:
            try:
                words[i] = _allowed(jobs[i])
            except Exception as error:
                jobs[i].failure = error
        return _mask(logits, mx.array(words))

    def _is_told(self, job: Job) -> bool:
        """Whether somebody still waits for its tokens."""
        return job in self.live and not job.is_silent

    def deliver(self, job: Job, token: int, score: LogProbabilities | None) -> bool:
        """Give a token, and its score where one is wanted, to its request; False if it ended."""
        context = job.context
        context.update(token)
        if job.is_silent:
            if context.is_done:
                self._end(job, is_kept=True)
            return not context.is_done
        try:
            if job.failure is not None:
                raise job.failure
            chunk = self._chunk(job, token, score)
        except Exception as error:
            return self._leave(job, error, is_kept=False)
        if chunk.finish_reason is None:
            job.handle.put(chunk)
            return True
        return self._leave(job, chunk, None, is_kept=True)

    def _chunk(self, job: Job, token: int, score: LogProbabilities | None) -> Chunk:
        """What the token adds to the answer. The last chunk carries what is told at the end."""
        context, status = job.context, job.context.status
        if context.constraint is not None:
            context.constraint.accept(token)
            if context.speculative != "none":
                job.forced = context.constraint.forced()
        # An end token is no text; it is still reported as a token.
        text = "" if status is GenerationStatus.END_OF_SEQUENCE else job.stream.add(token)
        if job.stream.stopped:
            status = GenerationStatus.END_OF_SEQUENCE
        if not status.is_done:
            return Chunk(text, token, score)
        text += job.stream.finish()
        timings, scored, stop = job.clock.timings(), job.prompt_logprobs, job.stream.stopped_by
        return Chunk(text, token, score, status.value, job.usage(), timings, scored, stop)

    def _leave(self, job: Job, *last: Chunk | BaseException | None, is_kept: bool) -> bool:
        """Answer a request that is at its end; whether it goes on until the next step, because
        other ranks cannot know of it before."""
        if not self._state.ranks.are_many:
            if not is_kept:
                job.context.status = GenerationStatus.CANCELLED
            elif not job.context.is_done:
                job.context.status = GenerationStatus.END_OF_SEQUENCE  # a stop string
            self._end(job, *last, is_kept=is_kept)
            return False
        if job.context.is_done:  # all ranks see that, and keep its prefix
            self._end(job, *last, is_kept=True)
            return False
        job.is_silent, job.forced = True, []
        self.leaving.append((job, is_kept))
        for item in last:
            job.handle.put(item)
        return True

    def finish_prompt(self, job: Job) -> None:
        """End a request for the logits or the cached row of its prompt, which are all there."""
        if job.prompt_row is not None:
            copied = self._state.cache.copy_row(job.row, job.context.tokens.prompt_length)
            mx.eval(copied.arrays())
            job.prompt_row.add(copied)
        self._end(job, None, is_kept=job.prompt_row is not None)

    def leave(self, job: Job, *, is_kept: bool) -> None:
        """The requester has gone, or has its answer: free the row. is_kept: what was computed is
        kept."""
        job.context.status = GenerationStatus.CANCELLED
        self._end(job, None, is_kept=is_kept)

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
            if job.drafts is not None:
                job.drafts.end(is_kept=is_kept)
            if is_kept:
                self._state.remember(job)
            job.features.clear()
            if job.held is not None:
                self._state.cache.release(job.held)
                job.held = None
        finally:
            for item in last:
                job.handle.put(item)


def _allowed(job: Job) -> np.ndarray:
    """uint32 [ceil(V / 32)]. Raises: InputError where the request's own options ban all of them."""
    constraint, banned = job.context.constraint, job.sampler.banned()
    assert constraint is not None
    words = constraint.allowed()
    if banned is not None:
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(banned)]
        if not (bits.astype(bool) & ~banned).any():
            raise InputError(
                "the answer's form goes on with tokens that min_tokens or logit_bias forbid; "
                "leave these out",
                param="logit_bias" if job.context.sampling_params.logit_bias else "min_tokens",
            )
    return words


@mx.compile
def _mask(logits: mx.array, words: mx.array) -> mx.array:
    """Logits [B, V] where the bit of words uint32 [B, ceil(V / 32)] is set, elsewhere -inf."""
    bits = (words[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    allowed = bits.reshape(words.shape[0], -1)[:, : logits.shape[-1]]
    return mx.where(allowed.astype(mx.bool_), logits, -mx.inf)
