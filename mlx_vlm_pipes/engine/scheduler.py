"""Continuous batching: requests are prefilled in slices and decode together, one step at a time.

One `step` of the scheduler: take new requests in, one slice of prefill (or of image encoding), one
decode step for all running rows. Only the owning thread calls it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.contexts import GenerationStatus, TextAndVisionContext, TextContext
from mlx_vlm_pipes.engine.caches import ImageCache, PrefixCache, common_prefix, prefix_keys
from mlx_vlm_pipes.engine.requests import Chunk, Handle, Job, new_job
from mlx_vlm_pipes.engine.sampling import sample_rows
from mlx_vlm_pipes.engine.text import StreamDecoder
from mlx_vlm_pipes.errors import InputError, OutOfBudget
from mlx_vlm_pipes.interfaces import (
    ImageMetadata,
    LogProbabilities,
    ModelInputs,
    PipelineModelWithKVCache,
    log_probabilities,
)
from mlx_vlm_pipes.kv_cache import (
    KVCache,
    KVCacheInputs,
    cache_inputs,
    capacity_bucket,
    increment_cache_lengths,
)


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine. Bytes and tokens.

    prefill_chunk bounds a slice of prefill while nothing decodes; running_chunk and
    image_batch bound what a running request may wait for.
    """

    max_batch_size: int = 16
    prefill_chunk: int = 2048
    running_chunk: int = 512
    image_batch: int = 4
    kv_bytes: int = 8 << 30
    prefix_bytes: int = 1 << 30
    image_bytes: int = 256 << 20
    enable_prefix_caching: bool = True


@dataclass
class Flight:
    """A decode step that has been launched and not been read yet."""

    jobs: list[Job]
    inputs: ModelInputs
    tokens: mx.array  # uint32 [B]
    logits: mx.array | None  # float32 [B, V], where some row wants log-probabilities


@dataclass
class EngineStats:
    """Counters since the start."""

    steps: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    images_encoded: int = 0
    longest_slice_s: float = 0.0


class Scheduler:
    """Owns the KV cache and all jobs. Knows models only through `PipelineModelWithKVCache`."""

    def __init__(self, model: PipelineModelWithKVCache, config: EngineConfig, vocab: int) -> None:
        self.model, self.config, self.vocab_size = model, config, vocab
        self.cache = KVCache(model.kv_params)
        self.prefixes = PrefixCache(config.prefix_bytes if config.enable_prefix_caching else 0)
        self.images = ImageCache(config.image_bytes)
        self.stats = EngineStats()
        self.waiting: deque[Job] = deque()
        self.prefilling: list[Job] = []
        self.running: list[Job] = []
        self._flight: Flight | None = None

    # ---- requests in

    def submit(self, context: TextContext, decoder: StreamDecoder) -> Handle:
        """Queue a request.

        Raises: InputError for bad sampling values, OutOfBudget for what can never fit.
        """
        self.adapter_slot(context.model_name)  # refuse unknown ones at once
        keys = prefix_keys(context, self._salt(context, len(context.tokens)))
        need = self.bytes_needed(context)
        if need > self.config.kv_bytes:
            raise OutOfBudget(
                f"the request needs {need / 1e6:.1f} MB of KV cache for "
                f"{self._longest(context)} tokens, the engine may use "
                f"{self.config.kv_bytes / 1e6:.1f} MB; ask for fewer tokens or raise the budget"
            )
        job = new_job(context, decoder, self.vocab_size, keys, need)
        self.waiting.append(job)
        return job.handle

    def bytes_needed(self, context: TextContext) -> int:
        """KV bytes of a request at its longest."""
        tokens = capacity_bucket(self._longest(context))
        return tokens * self.model.kv_params.bytes_per_token

    def _longest(self, context: TextContext) -> int:
        limit = context.sampling_params.max_new_tokens
        asked = context.max_length if limit is None else len(context.tokens) + limit
        return min(asked, context.max_length)

    def _salt(self, context: TextContext, length: int) -> int:
        """Separates keys made with another LongRoPE table or another adapter."""
        edge = self.model.cache_break_length
        is_long = edge is not None and length > edge
        return int(is_long) + 2 * self.adapter_slot(context.model_name)

    def adapter_slot(self, name: str) -> int:
        """The slot of a LoRA adapter; 0 for the base model (no name).

        Raises: InputError naming the adapters there are.
        """
        if not name:
            return 0
        if name not in self.model.adapters:
            raise InputError(
                f"no adapter {name!r}; loaded: {', '.join(self.model.adapters) or 'none'}"
            )
        return self.model.adapters.index(name) + 1

    # ---- one step

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running or self._flight)

    def step(self) -> bool:
        """Some work for everybody. Returns whether there is more."""
        self.stats.steps += 1
        self._drop_cancelled()
        self._admit()
        if self.prefilling:
            begun = time.perf_counter()
            self._advance_prefill()
            if self.running:
                spent = time.perf_counter() - begun
                self.stats.longest_slice_s = max(self.stats.longest_slice_s, spent)
        if self.running or self._flight is not None:
            self._decode()
        return self.is_busy

    def _drop_cancelled(self) -> None:
        for jobs in (self.waiting, self.prefilling, self.running):
            for job in [j for j in jobs if j.handle.is_closed]:
                job.context.status = GenerationStatus.CANCELLED
                jobs.remove(job)
                self._end(job)

    def _admit(self) -> None:
        """Move waiting jobs to prefill while rows and bytes last."""
        while self.waiting and len(self.prefilling) + len(self.running) < self._max_rows:
            job = self.waiting[0]
            used = sum(j.need_bytes for j in (*self.prefilling, *self.running))
            if used and used + job.need_bytes > self.config.kv_bytes:
                return
            if self._shares_unfinished_prefix(job):
                return
            self.prefixes.shrink(self.config.kv_bytes - used - job.need_bytes)
            self.waiting.popleft()
            job.clock.started = time.perf_counter()
            try:
                self._start(job)
            except Exception as error:  # this request's failure is nobody else's
                self._fail(job, error)

    @property
    def _max_rows(self) -> int:
        limit = self.model.pipeline_config.runtime.max_batch_size
        return min(limit or self.config.max_batch_size, self.config.max_batch_size)

    def _shares_unfinished_prefix(self, job: Job) -> bool:
        """Whether a job in prefill is making much of what this one needs: then wait for it."""
        if not self.config.enable_prefix_caching:
            return False
        have = self.prefixes.match(job.keys)[0]
        making = max((common_prefix(job.keys, j.keys) for j in self.prefilling), default=0)
        return making >= have + 64

    def _start(self, job: Job) -> None:
        """Give a job its cache row, filled from the longest cached prefix."""
        tokens = job.context.tokens
        job.row = self.cache.new_row()
        wants_all = job.context.log_probabilities_echo
        if self.config.enable_prefix_caching and not wants_all:
            length, row = self.prefixes.match(job.keys)
            length = min(length, len(tokens) - 1)  # one token must run to give logits
            if row is not None and length > 0:
                job.row = row.copy(length, capacity_bucket(len(tokens) + 1))
                tokens.skip_processing(length)
                job.cached_tokens = length
                self.stats.cached_tokens += length
        job.row.planned_length = len(tokens)
        job.row.adapter = self.adapter_slot(job.context.model_name)
        self.prefilling.append(job)

    # ---- prefill

    def _advance_prefill(self) -> None:
        if self._encode_images() and self.running:
            return  # a bounded slice is done; running rows come first
        while self._encode_images():
            pass
        group = self._next_group()
        try:
            self._prefill(group)
        except Exception as error:  # find out whose failure it is
            for job, _ in group:
                self._fail_or_retry(job, error, alone=len(group) == 1)

    def _fail_or_retry(self, job: Job, error: Exception, *, alone: bool) -> None:
        if alone:
            self.prefilling.remove(job)
            self._fail(job, error)
            return
        try:
            self._reset_row(job)
            self._prefill([(job, job.remaining_prompt)])
        except Exception as own:
            self.prefilling.remove(job)
            self._fail(job, own)

    def _reset_row(self, job: Job) -> None:
        """Forget what is cached for a job; all its tokens become active again."""
        assert job.row is not None
        self.cache.release(job.row)
        job.row = self.cache.new_row()
        tokens = job.context.tokens
        tokens.rewind_processing(tokens.processed_length)
        job.row.planned_length = len(tokens)
        job.row.adapter = self.adapter_slot(job.context.model_name)

    def _encode_images(self) -> bool:
        """Encode one micro-batch of images that prefill will need; False if none is missing."""
        missing: dict[int, ImageMetadata] = {}
        for job in self.prefilling:
            for image in pending_images(job.context):
                if self._features(image) is None and len(missing) < self.config.image_batch:
                    missing.setdefault(image_key(image), image)
                    job.images_encoded += 1
        if not missing:
            return False
        rows = self.model.encode_images(list(missing.values()))
        mx.eval(rows)
        self.images.put(list(missing), rows)
        self.stats.images_encoded += len(missing)
        return True

    def _features(self, image: ImageMetadata) -> mx.array | None:
        return self.images.get(image_key(image))

    def _next_group(self) -> list[tuple[Job, int]]:
        """Jobs of the next slice, with the number of tokens of each."""
        room = self.config.running_chunk if self.running else self.config.prefill_chunk
        group: list[tuple[Job, int]] = []
        for job in self.prefilling:
            if job.context.log_probabilities_echo and group:
                break  # logits of all positions are returned for one row at a time
            size = min(job.remaining_prompt, room)
            if size < 1:
                break
            group.append((job, size))
            room -= size
            if job.context.log_probabilities_echo:
                break
        return group

    def _prefill(self, group: Sequence[tuple[Job, int]]) -> None:
        """Run one ragged slice; jobs whose prompt ends in it get their first token."""
        jobs = [job for job, _ in group]
        for job, size in group:
            job.context.tokens.chunk(size)
        echo = jobs[0].context.log_probabilities_echo
        kv = cache_inputs(self.cache, [job.row for job in jobs if job.row is not None])
        contexts = [job.context for job in jobs]
        features = self._step_features(contexts)
        wanted = group[0][1] if echo else 1
        extra = {} if features is None else {"image_embeddings": features}
        inputs = self.model.prepare_initial_token_inputs([contexts], kv, wanted, **extra)
        outputs = self.model.execute(inputs)
        assert outputs.next_token_logits is not None
        sizes = [size for _, size in group]
        increment_cache_lengths(kv, sizes)
        if echo:
            self._note_echo(jobs[0], outputs.logits)
        ended = []
        for i, (job, size) in enumerate(group):
            if job.remaining_prompt == size:
                ended.append((i, job))
        logits = outputs.next_token_logits
        if ended:
            logits = logits[mx.array([i for i, _ in ended])] if len(ended) < len(jobs) else logits
            tokens = self._sample(logits, [job for _, job in ended])
            mx.async_eval(tokens, *self._row_arrays(jobs))
        mx.eval(self._row_arrays(jobs))
        self.stats.prefill_tokens += sum(sizes)
        for job in jobs:
            if all(job is not other for _, other in ended):
                job.context.tokens.advance_chunk()
        if ended:
            self._first_tokens([job for _, job in ended], tokens, logits)

    def _row_arrays(self, jobs: Sequence[Job]) -> list[mx.array]:
        return [a for job in jobs if job.row is not None for a in job.row.arrays()]

    def _step_features(self, contexts: Sequence[TextContext]) -> mx.array | None:
        """Vision rows of the images in this slice, in order, from the image cache."""
        images = [image for context in contexts for image in step_images(context)]
        if not images:
            return None
        rows = [self._features(image) for image in images]
        missing = [image for image, own in zip(images, rows, strict=True) if own is None]
        if missing:  # the cache's budget is smaller than this slice needs
            fresh = iter(self.model.encode_images(missing))
            rows = [own if own is not None else next(fresh) for own in rows]
        return mx.concatenate([own for own in rows if own is not None])

    def _first_tokens(self, jobs: Sequence[Job], tokens: mx.array, logits: mx.array) -> None:
        """Prompts are done: hand out first tokens, and let the rows decode."""
        values: list[int] = tokens.tolist()  # pyright: ignore[reportAssignmentType]  # 1-D
        for i, (job, token) in enumerate(zip(jobs, values, strict=True)):
            self.prefilling.remove(job)
            if job.clock.first_token is None:
                job.clock.first_token = time.perf_counter()
            if job.echoed:
                job.prompt_logprobs = join_logprobs(job.echoed, job.context.tokens.prompt_length)
            if any(common_prefix(job.keys, other.keys) >= 64 for other in self.waiting):
                self._remember(job)
            if self._take_token(job, token, self._score(job, logits[i : i + 1], token)):
                self.running.append(job)

    def _note_echo(self, job: Job, logits: mx.array) -> None:
        """Score the prompt tokens that follow each position of this slice."""
        tokens = job.context.tokens
        begin = tokens.processed_length
        following = tokens.all[begin + 1 : begin + 1 + logits.shape[0]].tolist()
        count = len(following)
        if count:
            top = max(1, job.top_logprobs)
            job.echoed.append(log_probabilities(logits[:count], following, top))

    # ---- decode

    def _decode(self) -> None:
        """Launch the next step if rows are unchanged, then read the one before it."""
        self._recompute_crossing()
        flight = self._flight
        if flight is None:
            if self.running:
                self._flight = self._launch_fresh()
            return
        same = flight.jobs == self.running and not any(self._ends_by_length(j) for j in flight.jobs)
        same = same and not any(self._will_cross(job, 1) for job in flight.jobs)
        following = None
        if same:
            inputs = self.model.prepare_next_token_inputs(flight.tokens, flight.inputs)
            following = self._launch(inputs, flight.jobs)
        self._flight = following
        self._read(flight)
        if self._flight is None and self.running:
            self._recompute_crossing()
            if self.running:
                self._flight = self._launch_fresh()

    def _ends_by_length(self, job: Job) -> bool:
        """Whether the token in flight is the last that this job may have."""
        tokens, limit = job.context.tokens, job.context.sampling_params.max_new_tokens
        if limit is not None and tokens.generated_length + 1 >= limit:
            return True
        return len(tokens) + 1 >= job.context.max_length

    def _will_cross(self, job: Job, ahead: int) -> bool:
        """Whether the step `ahead` tokens on needs another rotary table than the cache has."""
        edge = self.model.cache_break_length
        assert job.row is not None
        return edge is not None and job.row.length <= edge < job.row.length + ahead

    def _recompute_crossing(self) -> None:
        """Rows that outgrow LongRoPE's short table are prefilled again with the long one."""
        if self._flight is not None:
            return
        for job in [job for job in self.running if self._will_cross(job, 1)]:
            self.running.remove(job)
            self._reset_row(job)
            self.prefilling.insert(0, job)
        if self.prefilling and not self.running:
            self._advance_prefill()

    def _launch_fresh(self) -> Flight:
        """A decode step from the contexts' own tokens, after the rows have changed."""
        jobs = list(self.running)
        kv = cache_inputs(self.cache, [job.row for job in jobs if job.row is not None])
        inputs = self.model.prepare_initial_token_inputs([[job.context for job in jobs]], kv)
        return self._launch(inputs, jobs)

    def _launch(self, inputs: ModelInputs, jobs: list[Job]) -> Flight:
        kv = inputs.kv_cache_inputs
        assert isinstance(kv, KVCacheInputs)
        outputs = self.model.execute(inputs)
        increment_cache_lengths(kv, [1] * len(jobs))
        assert outputs.next_token_logits is not None
        tokens = self._sample(outputs.next_token_logits, jobs)
        scored = any(job.top_logprobs for job in jobs)
        states = [a for job in jobs for a in job.sampler.state()]
        mx.async_eval(tokens, *states)
        return Flight(jobs, inputs, tokens, outputs.next_token_logits if scored else None)

    def _sample(self, logits: mx.array, jobs: Sequence[Job]) -> mx.array:
        """Next tokens uint32 [B]; a sampler that raises fails its own request only."""
        try:
            return sample_rows(logits, [job.sampler for job in jobs])
        except Exception:
            return mx.stack([self._sample_one(logits[i], job) for i, job in enumerate(jobs)])

    def _sample_one(self, logits: mx.array, job: Job) -> mx.array:
        try:
            return job.sampler.next_token(logits)
        except Exception as error:
            job.handle.put(error)
            job.handle.close()
            return mx.argmax(logits).astype(mx.uint32)

    def _read(self, flight: Flight) -> None:
        """Wait for a step's tokens and hand them out; jobs that end leave the batch."""
        values: list[int] = flight.tokens.tolist()  # pyright: ignore[reportAssignmentType]  # 1-D
        for i, (job, token) in enumerate(zip(flight.jobs, values, strict=True)):
            if job.context.is_done or job not in self.running:
                continue
            score = None
            if flight.logits is not None:
                score = self._score(job, flight.logits[i : i + 1], token)
            if not self._take_token(job, token, score):
                self.running.remove(job)

    def _score(self, job: Job, logits: mx.array, token: int) -> LogProbabilities | None:
        return log_probabilities(logits, [token], job.top_logprobs) if job.top_logprobs else None

    # ---- results out

    def _take_token(self, job: Job, token: int, score: LogProbabilities | None) -> bool:
        """Give a token to its request; False when that was the last one."""
        context = job.context
        context.update(token)
        ended = context.status is GenerationStatus.END_OF_SEQUENCE
        # An end token is no text; it is still reported as a token.
        text = "" if ended else job.stream.add(token)
        if job.stream.stopped:
            context.status = GenerationStatus.END_OF_SEQUENCE
        if not context.is_done:
            job.handle.put(Chunk(text, token, score))
            return True
        self._end(job, Chunk(text + job.stream.finish(), token, score))
        return False

    def _end(self, job: Job, last: Chunk | None = None) -> None:
        """Free a job's row, remember its prefix, and close its stream of chunks."""
        self._remember(job)
        if job.row is not None:
            self.cache.release(job.row)
            job.row = None
        if last is not None:
            job.handle.put(
                Chunk(
                    text=last.text,
                    token=last.token,
                    logprobs=last.logprobs,
                    finish_reason=job.context.status.value,
                    usage=job.usage(),
                    timings=job.clock.timings(),
                    prompt_logprobs=job.prompt_logprobs,
                )
            )
        job.handle.put(None)

    def _remember(self, job: Job) -> None:
        """Keep what is cached for a job as a prefix for later ones."""
        row, tokens = job.row, job.context.tokens
        if row is None or not self.config.enable_prefix_caching:
            return
        length = min(row.length, len(tokens))
        if length < 1 or row.length * self.model.kv_params.bytes_per_token > self.prefixes.budget_bytes:
            return
        keys = prefix_keys(job.context, self._salt(job.context, row.length))
        twin = self.cache.copy_row(row, length)
        mx.eval(twin.arrays())
        self.prefixes.store(keys, twin)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.row is not None:
            self.cache.release(job.row)
            job.row = None
        job.context.status = GenerationStatus.CANCELLED
        job.handle.put(error)


def pending_images(context: TextContext) -> list[ImageMetadata]:
    """Images whose placeholders are not all processed yet."""
    return context.next_images if isinstance(context, TextAndVisionContext) else []


def step_images(context: TextContext) -> list[ImageMetadata]:
    """Images with placeholders among the active tokens or before them, not fully processed."""
    end = context.tokens.current_position
    return [image for image in pending_images(context) if image.start_idx < end]


def image_key(image: ImageMetadata) -> int:
    """The image's content hash; its identity where it has none."""
    return image.image_hash if image.image_hash is not None else id(image)


def join_logprobs(parts: Sequence[LogProbabilities], prompt_length: int) -> LogProbabilities:
    """Scores of prompt tokens 1..n-1, from the slices they were computed in."""
    own = [value for part in parts for value in part.token_log_probabilities]
    tops = [top for part in parts for top in part.top_log_probabilities]
    if len(own) != prompt_length - 1:
        raise InputError(f"{len(own)} prompt scores for {prompt_length} tokens")
    return LogProbabilities(own, tops)
