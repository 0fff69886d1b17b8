"""Prompts on their way into the cache: pictures in micro-batches, tokens in ragged slices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from mlx_vlm_pipes.contexts import ImageMetadata, TextContext
from mlx_vlm_pipes.engine.caches import common_prefix
from mlx_vlm_pipes.engine.memory import trim_pool
from mlx_vlm_pipes.engine.pace import Pace
from mlx_vlm_pipes.engine.plan import picture_bytes, picture_room
from mlx_vlm_pipes.engine.requests import Job
from mlx_vlm_pipes.engine.results import Results
from mlx_vlm_pipes.engine.slices import SliceRow, encode, image_key, run_slice
from mlx_vlm_pipes.engine.state import EngineState
from mlx_vlm_pipes.errors import InputError, PipesError
from mlx_vlm_pipes.log_probabilities import LogProbabilities, log_probabilities

Group = Sequence[tuple[Job, int]]  # the jobs of a slice, with the number of tokens of each
FULL_SLICE = 128  # tokens from which a slice takes its time by arithmetic, not by reading weights
STEPS_A_SLICE = 2  # decode steps that running requests wait for a slice, where these are slow
ROWS_A_STEP = 8  # running requests for each decode step that short prompts wait for others


class Prefill:
    """The jobs whose prompts are not in the cache yet, oldest first."""

    def __init__(self, state: EngineState, results: Results) -> None:
        self._state, self._results = state, results
        self.jobs: list[Job] = []
        self.turn = self.gathered = 0
        self._patches, self._tokens, self._scored, self._steps = self._paces = (
            Pace(), Pace(), Pace(), Pace()
        )  # fmt: skip

    @property
    def paces(self) -> tuple[float | None, ...]:
        """Seconds a patch, a token, a token whose logits are all wanted, and a decode step, as
        measured; of tokens without what a slice takes for any number of them."""
        return tuple(pace.seconds_per_unit for pace in self._paces)

    @paces.setter
    def paces(self, seconds: tuple[float | None, ...]) -> None:
        for pace, own in zip(self._paces, seconds, strict=True):
            pace.seconds_per_unit = own

    def gathers(self, running: int) -> bool:
        """Whether short prompts wait a decode step for more of them, where many requests run.

        A slice of few tokens reads all the weights, as a decode step does. Where requests come and
        go one by one, a slice of each one's own behind every step would take as long as the steps.
        """
        tokens = sum(job.remaining_prompt for job in self.jobs)
        has_pictures = any(job.context.next_images for job in self.jobs)
        self.gathered += 1
        if has_pictures or tokens >= FULL_SLICE or self.gathered > running // ROWS_A_STEP:
            self.gathered = 0
        return self.gathered > 0

    def advance(self, *, running: int) -> list[Job]:
        """One bounded slice of work; returns the jobs that decode from now on.

        running: how many requests wait for it, which makes it smaller.
        """
        begun = self._state.clock()
        wait_s = self._wait_s(running) if running else None
        order, missing = self._order(), self._missing_images()
        for job in self.jobs:
            job.note(len(missing.get(job, ())))
        images, tokens, started = 0, 0, []
        if order[0] in missing:
            images = self._encode_images([missing.get(job, {}) for job in order], wait_s)
        else:
            ready = [job for job in order if job not in missing]
            tokens, started = self._run_slice(ready, wait_s)
        if running:
            seconds = self._state.clock() - begun
            self._state.note_slice(tokens=tokens, images=images, seconds=seconds)
        return started

    def note_step(self, seconds: float | None) -> None:
        """A decode step has taken so long, if it was measured; what comes next is chosen by it."""
        if seconds is not None:
            self._steps.note(1, seconds)

    @property
    def _step_s(self) -> float:
        return self._steps.seconds_per_unit or 0.0

    def _wait_s(self, running: int) -> float:
        """How long running requests may wait for a slice: longer, where more prompts wait than run,
        and where their own steps take long.

        Of a burst the first would else run nearly alone, with a small slice behind each token; and
        a slice that is shorter than a step reads all weights for little.
        """
        least = max(self._state.config.running_wait_ms / 1000, STEPS_A_SLICE * self._step_s)
        return least * max(1.0, len(self.jobs) / running)

    def _order(self) -> list[Job]:
        """Who comes first: the oldest, or each second time a job that is much shorter.

        So a long prompt always goes on, and a short one does not wait for all of it.
        """
        self.turn += 1
        shortest = min(job.remaining_prompt for job in self.jobs)
        if self.turn % 2 or 2 * shortest > self.jobs[0].remaining_prompt:
            return self.jobs
        return sorted(self.jobs, key=lambda job: job.remaining_prompt)

    # ---- pictures

    def _missing_images(self) -> dict[Job, dict[int, ImageMetadata]]:
        """The pictures that have yet to be encoded for each job, by key; fetches known ones."""
        missing: dict[Job, dict[int, ImageMetadata]] = {}
        for job in self.jobs:
            for image in job.context.next_images:
                key = image_key(image)
                if key in job.features:
                    continue
                known = self._state.images.get(image.image_hash)
                if known is not None:
                    job.features[key] = known
                else:
                    missing.setdefault(job, {})[key] = image
        return missing

    def _encode_images(
        self, missing: Sequence[Mapping[int, ImageMetadata]], wait_s: float | None
    ) -> int:
        """Encode one micro-batch of pictures, taken in this order; how many it was."""
        batch: dict[int, ImageMetadata] = {}
        patches, room = 0, math.inf if wait_s is None else self._patches.fitting(wait_s)
        bytes_left = picture_room(self._state)
        for key, image in (item for images in missing for item in images.items()):
            more = self._state.model.vision_work(image).tokens
            size = picture_bytes(self._state.model, image)
            fits = len(batch) < self._state.config.image_batch and patches + more <= room
            if key not in batch and ((fits and size <= bytes_left) or not batch):
                batch[key], patches, bytes_left = image, patches + more, bytes_left - size
        begun = self._state.clock()
        self._share(self._encode(batch), batch)
        self._patches.note(patches, self._state.clock() - begun)
        return len(batch)

    def _encode(self, batch: dict[int, ImageMetadata]) -> dict[int, mx.array | Exception]:
        """Vision rows by key; an exception for each picture that cannot be encoded."""
        try:
            return {**encode(self._state.model, batch)}
        except Exception as error:  # find out whose failure it is
            if len(batch) == 1:
                return dict.fromkeys(batch, error)
        parts = [self._encode({key: image}) for key, image in batch.items()]
        return {key: own for part in parts for key, own in part.items()}

    def _share(
        self, made: Mapping[int, mx.array | Exception], batch: Mapping[int, ImageMetadata]
    ) -> None:
        """Give vision rows to the jobs that wait for them, and to the cache."""
        for key, rows in made.items():
            waiting = [j for j in self.jobs if key in map(image_key, j.context.next_images)]
            if isinstance(rows, Exception):
                for job in waiting:
                    self.jobs.remove(job)
                    self._results.fail(job, rows)
                continue
            for job in waiting:
                job.features[key] = rows
            for job in waiting[:1]:  # none, where another of its pictures has failed it
                job.images_encoded += 1
            self._state.stats.images_encoded += 1
            self._state.images.put([batch[key].image_hash], [rows])

    # ---- tokens

    def _run_slice(self, order: Sequence[Job], wait_s: float | None) -> tuple[int, list[Job]]:
        """One slice of tokens; how many it had, and the jobs that decode from now on."""
        config = self._state.config
        pace = self._scored if order[0].wants_all_logits else self._tokens
        room, fixed_s = config.prefill_chunk, self._step_s / 2  # the other half is its rows'
        if wait_s is not None:
            room = config.slice_beside_others(pace.fitting(wait_s - fixed_s))
        group = next_group(order, room, self._state.slice_size)
        tokens = sum(size for _, size in group)
        begun = self._state.clock()
        started = self._run_or_isolate(group)
        seconds = self._state.clock() - begun
        pace.note(tokens, max(seconds - fixed_s, seconds / 8))
        return tokens, started

    def _run_or_isolate(self, group: Group) -> list[Job]:
        """Run a slice; where it fails, find out whose failure it is."""
        try:
            self._run(group)
        except Exception as error:
            if self._state.ranks.are_many and not isinstance(error, PipesError):
                raise  # the other ranks may not have met it
            if len(group) == 1:
                self._fail(group[0][0], error)
                return []
            started = []
            for job, size in group:
                self._state.reset_row(job)
                started += self._run_or_isolate([(job, self._state.slice_size(job.context, size))])
            return started
        return self._finish(group)

    def _run(self, group: Group) -> None:
        """Run one ragged slice: keys and values into the rows, logits to the jobs that end."""
        jobs = [job for job, _ in group]
        for job, size in group:
            job.context.tokens.chunk(size)
        first = jobs[0]
        rows = [SliceRow(job.context, job.row, job.features) for job in jobs]
        count = group[0][1] if first.wants_all_logits else 1
        outputs = run_slice(self._state.model, self._state.cache, rows, count)
        logits = outputs.last_logits()
        mx.eval(logits, *(a for job in jobs for a in job.row.arrays()))
        if first.wants_echo:
            _note_echo(first, outputs.logits)
        if first.prompt_logits is not None:
            first.prompt_logits.add(outputs.logits)
        self._state.stats.prefill_tokens += sum(size for _, size in group)
        for i, (job, size) in enumerate(group):
            job.first_logits = logits[i : i + 1] if job.remaining_prompt == size else None

    def _finish(self, group: Group) -> list[Job]:
        """Hand out first tokens where prompts are done; the others go on with their next slice."""
        ended = []
        if any(job.first_logits is not None for job, _ in group):
            trim_pool(self._state.cache.nbytes)
        for job, _ in group:
            if job.first_logits is None:
                job.context.tokens.advance_chunk()
            elif job.wants_answer:
                ended.append(job)
            else:
                self.jobs.remove(job)
                self._results.finish_prompt(job)
        if not ended:
            return []
        rows = [job.first_logits for job in ended if job.first_logits is not None]
        sampled = self._results.sample(mx.concatenate(rows), ended)
        mx.eval(sampled.arrays())
        started = []
        for job, (token, score) in zip(ended, sampled.read(), strict=True):
            self.jobs.remove(job)
            job.first_logits = None
            job.features.clear()
            if job.clock.first_token is None:
                job.clock.first_token = time.perf_counter()
            if job.wants_echo:
                length = job.context.tokens.prompt_length
                job.prompt_logprobs = join_logprobs(job.echoed, length)
            if self._results.deliver(job, token, score):
                started.append(job)
        return started

    def _fail(self, job: Job, error: Exception) -> None:
        self.jobs.remove(job)
        self._results.fail(job, error)

    def is_making(self, job: Job) -> bool:
        """Whether a job in prefill makes much of what this one needs: then wait for it."""
        if not self._state.config.enable_prefix_caching or not self.jobs:
            return False
        making = max(common_prefix(job.keys, other.keys) for other in self.jobs)
        return making >= self._state.prefixes.match(job.keys)[0] + SHARED_MIN


def next_group(
    order: Sequence[Job], room: int, slice_size: Callable[[TextContext, int], int]
) -> Group:
    """The jobs of a slice of about `room` tokens, filled in this order; never empty.

    slice_size: how many tokens of a prompt are next, where there is room for so many.
    """
    group: list[tuple[Job, int]] = []
    for job in order:
        if group and job.wants_all_logits:
            continue  # logits of all positions are returned for one row at a time
        size = slice_size(job.context, room)
        if size < 1 or (group and size > room):
            break
        group.append((job, size))
        room -= size
        if job.wants_all_logits:
            break
    return group


SHARED_MIN = 64  # tokens of a common prefix that are worth waiting for


def _note_echo(job: Job, logits: mx.array) -> None:
    """Score the prompt tokens that follow each position of this slice."""
    tokens = job.context.tokens
    begin = tokens.processed_length
    following = tokens.all[begin + 1 : begin + 1 + logits.shape[0]].tolist()
    if following:
        top = max(1, job.top_logprobs)
        job.echoed.append(log_probabilities(logits[: len(following)], following, top))


def join_logprobs(parts: Sequence[LogProbabilities], prompt_length: int) -> LogProbabilities:
    """Scores of prompt tokens 1..n-1, from the slices they were computed in."""
    own = [value for part in parts for value in part.token_log_probabilities]
    tops = [top for part in parts for top in part.top_log_probabilities]
    if len(own) != prompt_length - 1:
        raise InputError(f"{len(own)} prompt scores for {prompt_length} tokens")
    return LogProbabilities(own, tops)
