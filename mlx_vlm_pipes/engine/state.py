"""What all parts of the engine share: its limits and counters, the model, the caches."""

from __future__ import annotations

import bisect
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.config import KVCacheConfig, PipelineConfig
from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.engine.caches import ImageCache, PrefixCache, prefix_keys
from mlx_vlm_pipes.engine.identity import model_digest
from mlx_vlm_pipes.engine.memory import machine_memory
from mlx_vlm_pipes.engine.requests import Job
from mlx_vlm_pipes.errors import OutOfBudget
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import CacheRow, KVCache, capacity_bucket, most_held
from mlx_vlm_pipes.options import Option
from mlx_vlm_pipes.ranks import ALONE, Ranks

T = TypeVar("T")
MIN_SLICE = 16  # tokens; a slice of fewer takes hardly less time: the weights are read anyway


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine. Bytes and tokens.

    prefill_chunk bounds a slice of prefill while nothing decodes. While requests run, they wait
    between two of their tokens for a slice of about running_wait_ms milliseconds, or as long as two
    of their own steps take, and longer in proportion where more prompts are read than requests
    run: as many tokens or pictures as the slices before say, at most running_chunk tokens
    or image_batch pictures, at least MIN_SLICE tokens or one picture. Short prompts wait up to a
    step for each eight running requests, to be read together.
    enable_chunked_prefill=False: no prompt is cut, and one longer than prefill_chunk is refused.
    overlap_bytes: the next decode step is handed over while the last one runs where the cache of
    the batch has at most so many bytes, else once that is done (engine.handover).
    Raises: InputError for a limit that would let nothing run, or of a wrong type.
    """

    max_batch_size: int = 32
    prefill_chunk: int = 2048
    running_chunk: int = 512
    running_wait_ms: float = 250.0
    image_batch: int = 4
    kv_bytes: int = 8 << 30
    prefix_bytes: int = 1 << 30
    image_bytes: int = 256 << 20
    overlap_bytes: int = 8 << 20
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True

    @classmethod
    def from_pipeline(
        cls,
        pipeline: PipelineConfig,
        memory_bytes: int,
        weight_bytes: int = 0,
        kv_cache: KVCacheConfig | None = None,
        step_bytes: int = 0,
    ) -> EngineConfig:
        """The limits that a pipeline's settings ask for (docs/api.md#settings-of-the-engine).

        kv_cache: the one that the model was given, else the pipeline's. Its share of the memory,
        less the weights and step_bytes (what the largest slice of prefill computes with), is the
        budget: 3/4 of it for keys and values, 1/8 for prefixes, 1/32 for pictures, the rest for
        what is not foreseen.
        """
        runtime, cache = pipeline.runtime, kv_cache or pipeline.model.kv_cache
        share = int(cache.device_memory_utilization * memory_bytes)
        budget = max(0, share - weight_bytes - step_bytes)
        longest, chunked = runtime.max_batch_input_tokens, runtime.enable_chunked_prefill
        return cls(
            max_batch_size=runtime.max_batch_size or cls.max_batch_size,
            prefill_chunk=min(cls.prefill_chunk, longest) if chunked else longest,
            running_chunk=min(cls.running_chunk, longest) if chunked else longest,
            kv_bytes=budget * 3 // 4,
            prefix_bytes=budget // 8,
            image_bytes=budget // 32,
            enable_prefix_caching=cache.enable_prefix_caching,
            enable_chunked_prefill=chunked,
        )

    def takes(self, prompt_tokens: int) -> bool:
        """Whether a prompt of so many tokens can be prefilled."""
        return self.enable_chunked_prefill or prompt_tokens <= self.prefill_chunk

    def slice_beside_others(self, fitting: float) -> int:
        """Tokens of a slice that running requests wait for. fitting: into their time."""
        return int(min(self.running_chunk, max(MIN_SLICE, fitting)))

    def __post_init__(self) -> None:
        counts = ("max_batch_size", "prefill_chunk", "running_chunk", "image_batch")
        sizes = ("kv_bytes", "prefix_bytes", "image_bytes", "overlap_bytes")
        lows = {**dict.fromkeys(counts, 1), **dict.fromkeys(sizes, 0)}
        for name, low in lows.items():
            Option("", name=name, kind=int, low=low).read(getattr(self, name))
        Option("", name="running_wait_ms", kind=float, above=0).read(self.running_wait_ms)
        for name in ("enable_prefix_caching", "enable_chunked_prefill"):
            Option("", name=name, kind=bool).read(getattr(self, name))


@dataclass
class EngineStats:
    """Counters since the start.

    largest_slice_tokens, largest_slice_images, longest_slice_s: the most that running requests
    waited for between two decode steps. traces: how often the decode step was traced; buckets:
    how many sizes of the batch's groups it has run at.
    """

    steps: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    images_encoded: int = 0
    largest_slice_tokens: int = 0
    largest_slice_images: int = 0
    longest_slice_s: float = 0.0
    traces: int = 0
    buckets: int = 0


def _decide_alone(make: Callable[[], T]) -> T:
    return make()


class Decide(Protocol):
    """Makes, on all ranks alike, what only the first one knows how to."""

    def __call__(self, make: Callable[[], T], /) -> T: ...


class EngineState:
    """The model, the caches and the counters; every part of the scheduler holds this one.

    beside: a smaller model that drafts for this one, whose weights and cache need memory too.
    """

    def __init__(
        self, model: PipelineModelWithKVCache, config: EngineConfig, ranks: Ranks = ALONE
    ) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        self.beside: PipelineModelWithKVCache | None = None
        self.cache = KVCache(model.kv_params)
        self.prefixes = PrefixCache(config.prefix_bytes if config.enable_prefix_caching else 0)
        self.images = ImageCache(config.image_bytes)
        self.stats = EngineStats()
        self.memory_bytes = machine_memory(model.device)
        self.decide: Decide = _decide_alone
        self.picture_bytes: int | None = None  # see `picture_room`; None: from this memory
        self.clock: Callable[[], float] = time.perf_counter  # seconds
        self._buckets: set[tuple[tuple[int, int], ...]] = set()

    @functools.cached_property
    def model_digest(self) -> str:
        """Names the model's weights and configuration; computed once."""
        return model_digest(self.model)

    def limit(self, config: EngineConfig) -> None:
        """Take other limits; what is cached beyond them is forgotten."""
        self.config = config
        kept = config.prefix_bytes if config.enable_prefix_caching else 0
        self.prefixes.budget_bytes, self.images.budget_bytes = kept, config.image_bytes
        self.prefixes.shrink(kept)
        self.images.shrink(config.image_bytes)

    # ---- what a request needs

    def require_slice(self, context: TextContext) -> None:
        """Raises: OutOfBudget for a prompt that may not be cut and is longer than a slice."""
        count, limit = len(context.tokens), self.config.prefill_chunk
        if not self.config.takes(count):
            raise OutOfBudget(
                f"the prompt has {count} tokens, without enable_chunked_prefill at most {limit} "
                "(max_batch_input_tokens) are run; shorten it, raise the limit, or let it be cut"
            )

    def slice_size(self, context: TextContext, room: int) -> int:
        """Tokens of a prompt's next slice: at most `room`, more for what may not be cut."""
        begin = context.tokens.processed_length
        left = len(context.tokens) - begin
        if not self.config.enable_chunked_prefill:
            return left
        size = min(left, room)
        return context.uncut(begin, begin + size) - begin if size > 0 else 0

    def capacity_needed(self, context: TextContext, new_tokens: int | None) -> int:
        """Cache tokens of a request at its longest; None: no limit but max_length.

        Raises: OutOfBudget if a row of that size can never fit.
        """
        asked = context.max_length if new_tokens is None else len(context.tokens) + new_tokens
        longest, each = min(asked, context.max_length), self.token_bytes(context)
        need = capacity_bucket(longest) * each
        if need > self.config.kv_bytes:
            held = self.config.kv_bytes // each
            fitting = bisect.bisect_right(range(1, longest), held, key=capacity_bucket)
            raise OutOfBudget(
                f"the request needs {need / 1e6:.3g} MB of KV cache for {longest} tokens, the "
                f"engine may use {self.config.kv_bytes / 1e6:.3g} MB, enough for {fitting}; ask "
                "for fewer tokens or raise the budget"
            )
        return longest

    def bytes_needed(self, jobs: Sequence[Job]) -> int:
        """The most KV bytes that these jobs may hold when they run to their ends together."""
        need = most_held([job.capacity for job in jobs]) * self.model.kv_params.bytes_per_token
        if self.beside is None:
            return need
        drafting = [job.capacity for job in jobs if job.context.speculative == "draft"]
        return need + most_held(drafting) * self.beside.kv_params.bytes_per_token

    def token_bytes(self, context: TextContext) -> int:
        """Keys and values of one token of a request, the draft model's included."""
        drafts = self.beside is not None and context.speculative == "draft"
        more = self.beside.kv_params.bytes_per_token if self.beside and drafts else 0
        return self.model.kv_params.bytes_per_token + more

    @property
    def weight_bytes(self) -> int:
        """Of the model, and of the one that drafts for it."""
        return self.model.weight_bytes + (self.beside.weight_bytes if self.beside else 0)

    def planned_length(self, context: TextContext) -> int:
        """Tokens whose keys are made as those of one prompt.

        Generated tokens that are processed again keep their own, but in models that recompute.
        """
        tokens = context.tokens
        return tokens.prompt_length if self.model.cache_break_length is None else len(tokens)

    def salt(self, context: TextContext, planned: int) -> int:
        """Separates keys made with other rotary frequencies or another adapter."""
        table = self.model.language.key_table(planned + context.position_delta)
        return self.salt_of(table, context.model_name)

    def keys(self, context: TextContext) -> np.ndarray:
        """What the prefix cache compares of a prompt, int64 [n]."""
        return prefix_keys(context, self.salt(context, self.planned_length(context)))

    def salt_of(self, table: int, adapter: str) -> int:
        """The same by the number of the rotary table and the adapter's name."""
        slots = len(self.model.adapters) + 1
        return table * slots + self.model.adapter_slot(adapter)

    # ---- rows

    def new_row(self, context: TextContext) -> CacheRow:
        """An empty row of the batch's cache for a request's tokens."""
        row = self.cache.new_row()
        row.planned_length = self.planned_length(context)
        row.position_delta = context.position_delta
        return row

    def row_from_prefix(self, job: Job) -> CacheRow:
        """A row that starts with the longest cached prefix of a job's prompt."""
        row, tokens = self.new_row(job.context), job.context.tokens
        if not self.config.enable_prefix_caching or job.wants_all_logits:
            return row
        length, stored = self.prefixes.match(job.keys)
        length = min(length, len(tokens) - 1)  # one token must run to give logits
        length = job.context.uncut(-1, length)
        if stored is None or length < 1:
            return row
        copied = stored.copy(length, capacity_bucket(len(tokens) + 1))
        copied.planned_length, copied.position_delta = row.planned_length, row.position_delta
        tokens.skip_processing(length)
        job.cached_tokens = length
        self.stats.cached_tokens += length
        return copied

    def reset_row(self, job: Job) -> None:
        """Forget what is cached for a job; all its tokens become active again."""
        self.cache.release(job.row)
        tokens = job.context.tokens
        tokens.advance_chunk()  # lifts the limit of an unfinished slice
        tokens.rewind_processing(tokens.processed_length)
        job.cached_tokens = 0
        job.echoed.clear()
        if job.prompt_logits is not None:
            job.prompt_logits.clear()
        job.held = self.new_row(job.context)

    def remember(self, job: Job) -> None:
        """Keep what is cached for a job, if anything is, as a prefix for later ones.

        What goes wrong with it (memory) is a warning: no answer needs it. Raises: that, where
        several ranks must keep the same.
        """
        try:
            self._remember(job)
        except Exception as error:
            if self.ranks.are_many:
                raise
            warnings.warn(f"a prefix is not cached: {error}", RuntimeWarning, stacklevel=2)

    def _remember(self, job: Job) -> None:
        row, tokens = job.held, job.context.tokens
        if row is None or not self.config.enable_prefix_caching:
            return
        length = min(row.length, len(tokens))
        planned, delta = row.planned_length, row.position_delta
        end = self.model.language.key_table_end(planned + delta)
        if end is not None:
            length = min(length, end - delta)  # what lies behind has another table
        size = length * self.model.kv_params.bytes_per_token
        if length < 1 or size > self.prefixes.budget_bytes:
            return
        keys = prefix_keys(job.context, self.salt(job.context, planned))[:length]
        if self.prefixes.covers(keys):
            return
        twin = self.cache.copy_row(row, length)
        mx.eval(twin.arrays())
        self.prefixes.store(keys, twin)

    # ---- counters

    def note_bucket(self) -> None:
        """Count the sizes that the decode step has just run at."""
        self._buckets.add(self.cache.shapes)
        self.stats.decode_steps += 1
        self.stats.buckets = len(self._buckets)
        self.stats.traces = self.model.language.traces

    def note_slice(self, *, tokens: int, images: int, seconds: float) -> None:
        """Count work that running requests waited for."""
        stats = self.stats
        stats.largest_slice_tokens = max(stats.largest_slice_tokens, tokens)
        stats.largest_slice_images = max(stats.largest_slice_images, images)
        stats.longest_slice_s = max(stats.longest_slice_s, seconds)
