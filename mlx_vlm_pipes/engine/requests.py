"""What goes into the engine and what comes out: requests, chunks, and the handle between them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.engine.drafts import Drafts
from mlx_vlm_pipes.engine.lookup import Lookup
from mlx_vlm_pipes.engine.row_sampler import RowSampler
from mlx_vlm_pipes.engine.text import StreamDecoder, TextStream
from mlx_vlm_pipes.engine.worker import require_same_process
from mlx_vlm_pipes.errors import EngineClosed
from mlx_vlm_pipes.kv_cache import CacheRow
from mlx_vlm_pipes.log_probabilities import LogProbabilities
from mlx_vlm_pipes.media.places import Places
from mlx_vlm_pipes.media.records import MediaRecord
from mlx_vlm_pipes.options import unfit
from mlx_vlm_pipes.progress import WAIT_S, Watch, Work


@dataclass(frozen=True)
class Usage:
    """Counts of one request. cached_tokens came from the prefix cache; of drafted_tokens, which
    were run on speculation, the answer has kept accepted_tokens."""

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    images_encoded: int
    completion_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def of_prompt(self) -> str:
        """How many of the prompt's tokens are pictures' or were cached, in brackets; or empty."""
        kinds = [f"{self.image_tokens} image"] if self.image_tokens else []
        kinds += [f"{self.cached_tokens} cached"] if self.cached_tokens else []
        return f" ({', '.join(kinds)})" if kinds else ""


@dataclass(frozen=True)
class Timings:
    """Seconds. prompt_s runs from the first slice of work to the first token."""

    queued_s: float
    prompt_s: float
    generation_s: float

    @property
    def time_to_first_token_s(self) -> float:
        return self.queued_s + self.prompt_s


@dataclass(frozen=True)
class Chunk:
    """What one token adds. The last chunk carries finish_reason, usage and timings.

    text may be empty while a character is incomplete or a stop string may be coming. stop: the
    stop string, if any, that ended the answer.
    """

    text: str
    token: int | None = None
    logprobs: LogProbabilities | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_logprobs: LogProbabilities | None = None
    stop: str | None = None


def figures_line(reason: str | None, usage: Usage, timings: Timings) -> str:
    """What a request was and took, in one line."""
    seconds, more = timings.generation_s, max(usage.completion_tokens - 1, 0)
    rate = f", {more / seconds:.0f} a second" if more and seconds > 0 else ""
    ended = "cut at its length limit" if reason == "length" else f"ended by {reason}"
    return (
        f"{usage.prompt_tokens} prompt tokens{usage.of_prompt} in {timings.prompt_s:.2f} s · "
        f"{usage.completion_tokens} new tokens{rate} · {ended}"
    )


def show_in_cell(media: Sequence[MediaRecord], take: Callable[[], Chunk | None]) -> None:
    """Show an answer in a notebook's cell while it comes. take: the next chunk, None at the end.

    Raises: what take raises; the cell then keeps what came before.
    """
    from mlx_vlm_pipes.display.live import Cell

    cell, note = Cell(media), "ended early"
    try:
        while (chunk := take()) is not None:
            cell.add(chunk.text)
            if chunk.usage is not None and chunk.timings is not None:
                note = figures_line(chunk.finish_reason, chunk.usage, chunk.timings)
    finally:
        cell.finish(note)


@dataclass
class Clock:
    """When things happened to a request, by time.perf_counter()."""

    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None

    def timings(self) -> Timings:
        now = time.perf_counter()
        started = self.started or now
        first = self.first_token or now
        return Timings(started - self.submitted, first - started, now - first)


class Handle:
    """The caller's end of a request: iterate it for chunks; close it to cancel.

    Safe from any thread. Readers share the chunks: each goes to one of them, the end to all. An
    exception in the request is raised where it is iterated. owner: what must live on until the
    answer is complete. watch: is told of the work on the prompt, by whoever waits for the first
    chunk, and closed before that is handed out. media: what the model saw of each picture and clip.
    places: what the answer's schema says of places in them.
    """

    def __init__(self) -> None:
        self.owner: object = None
        self.watch: Watch | None = None
        self.media: tuple[MediaRecord, ...] = ()
        self.places: Places | None = None
        self._noted: Work | None = None
        self._queue: queue.SimpleQueue[Chunk | Work | BaseException | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._done = False
        self._again: deque[Chunk] = deque()  # shown in a cell, to be read once more
        self._wakes: tuple[Callable[[], object], ...] = ()  # of async readers
        self._lock = threading.Lock()  # for _wakes
        self._process = os.getpid()

    def note(self, work: Work) -> None:
        """Engine's side: the work on the prompt has come so far."""
        if work != self._noted:
            self._noted = work
            self.put(work)

    def put(self, item: Chunk | Work | BaseException | None) -> None:
        """Engine's side: a chunk, a failure, or None at the end."""
        self._queue.put(item)
        for wake in self._wakes:
            with contextlib.suppress(RuntimeError):  # the listener's event loop has ended
                wake()

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Cancel; the engine frees the row before its next step but one."""
        self._closed.set()
        self._end_watch()

    def __iter__(self) -> ChunkIterator:
        return ChunkIterator(self)

    def _ipython_display_(self) -> None:
        """Show the answer in a cell as it comes; its chunks can be read afterwards as before."""
        chunks: list[Chunk] = []

        def take() -> Chunk | None:
            chunk = self.next_chunk()
            chunks.extend([chunk] if chunk else [])
            return chunk

        try:
            show_in_cell(self.media, take)
        except BaseException:
            self.close()
            raise
        finally:
            self._again.extend(chunks)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        require_same_process(self._process)
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        wake = functools.partial(loop.call_soon_threadsafe, ready.set)
        with self._lock:
            self._wakes = (*self._wakes, wake)
        try:
            while True:
                ready.clear()
                try:
                    chunk = self._take(block=False)
                except queue.Empty:
                    await ready.wait()
                    continue
                if chunk is None:
                    return
                yield chunk
        finally:
            with self._lock:
                self._wakes = tuple(other for other in self._wakes if other is not wake)
            self.close()

    def next_chunk(self) -> Chunk | None:
        """Wait for the next chunk; None at the end.

        Raises: what the request failed with; EngineClosed in a forked process.
        """
        require_same_process(self._process)
        return self._take(block=True)

    def _take(self, *, block: bool) -> Chunk | None:
        """The next chunk, None at the end. Raises: queue.Empty where there is none yet."""
        with contextlib.suppress(IndexError):
            return self._again.popleft()
        if self._done:
            return None
        try:
            item = self._next_item(block=block)
        except queue.Empty:
            raise
        except BaseException:  # Ctrl-C: whoever says so wants the line that the bar has
            self._end_watch()
            raise
        self._end_watch()
        if item is None or isinstance(item, BaseException):
            self._done, self.owner = True, None
            self.put(item)  # for the others that wait
        if isinstance(item, BaseException):
            raise item
        return item

    def _next_item(self, *, block: bool) -> Chunk | BaseException | None:
        """What is no work; that is told to the watch. Raises: queue.Empty as `_take`."""
        while True:
            watch = self.watch
            try:
                item = self._queue.get(block, None if watch is None else WAIT_S)
            except queue.Empty:
                if not block or watch is None:
                    raise
                watch.wait()
                continue
            if not isinstance(item, Work):
                return item
            if watch is not None:
                watch.note(item)

    def _end_watch(self) -> None:
        watch, self.watch = self.watch, None
        if watch is not None:
            watch.close()


class ChunkIterator(Iterator[Chunk]):
    """The chunks of one request. Closing or dropping it, even before the first, cancels."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    @property
    def media(self) -> tuple[MediaRecord, ...]:
        return self._handle.media

    @property
    def places(self) -> Places | None:
        return self._handle.places

    def __next__(self) -> Chunk:
        chunk = self._handle.next_chunk()
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        self._handle.close()

    def _ipython_display_(self) -> None:
        self._handle._ipython_display_()

    def __del__(self) -> None:
        self._handle.close()


class PromptLogits:
    """Logits at every position of a prompt, as they come, slice by slice."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, logits: mx.array) -> None:
        """float32 [tokens of a slice, V]."""
        self._parts.append(np.array(logits))

    def clear(self) -> None:
        self._parts.clear()

    def whole(self) -> np.ndarray:
        """float32 [T, V], once the request has ended."""
        return np.concatenate(self._parts)


class OthersLogits(PromptLogits):
    """The same on a rank that nobody asks for them: computed with the others, and let go."""

    def add(self, logits: mx.array) -> None:
        mx.eval(logits)


class PromptRow:
    """What is cached of a prompt: a staged row of its own."""

    def __init__(self) -> None:
        self._row: CacheRow | None = None

    def add(self, row: CacheRow) -> None:
        """An evaluated copy, of the prompt's tokens alone."""
        self._row = row

    def whole(self) -> CacheRow:
        """The row, once the request has ended. Raises: EngineClosed where that was before it."""
        if self._row is None:
            raise EngineClosed("the request was cancelled before its prompt was run")
        return self._row


@dataclass(eq=False)
class Job:
    """One request inside the engine. It owns its arrays; nothing else holds per-request state.

    keys: int64 [prompt], what the prefix cache compares. capacity: cache tokens at its longest.
    held: its cache row, from its admission to its end. features: vision rows, by image key, that
    its prompt still needs. first_logits: logits [1, V] behind its prompt, until its first token
    is out. failure: what its sampler raised. prompt_logits, prompt_row: where the logits or the
    keys and values of its prompt go, if it is these that are asked for, and no answer. drafts:
    where its drafts come from, if it speculates. drafted, kept: tokens that were run as drafts, and
    those of them that the answer has. forced: tokens that its form lets follow alone. number: by
    which several ranks know it. is_silent: nobody is told of its tokens; rank 0 does that, or it
    has been answered and ends with the next step.
    """

    context: TextContext
    handle: Handle
    sampler: RowSampler
    stream: TextStream
    keys: np.ndarray
    capacity: int
    clock: Clock = field(default_factory=Clock)
    held: CacheRow | None = None
    cached_tokens: int = 0
    images_encoded: int = 0
    features: dict[int, mx.array] = field(default_factory=dict)
    first_logits: mx.array | None = None
    failure: Exception | None = None
    prompt_logprobs: LogProbabilities | None = None
    echoed: list[LogProbabilities] = field(default_factory=list)
    prompt_logits: PromptLogits | None = None
    prompt_row: PromptRow | None = None
    drafts: Drafts | None = None
    drafted: int = 0
    kept: int = 0
    forced: list[int] = field(default_factory=list)
    number: int = 0
    is_silent: bool = False

    @property
    def row(self) -> CacheRow:
        """The cache row. Raises: RuntimeError for a job that waits or has ended."""
        if self.held is None:
            raise RuntimeError(f"request {self.context.request_id!r} runs without a cache row")
        return self.held

    @property
    def top_logprobs(self) -> int:
        return self.context.log_probabilities

    @property
    def wants_echo(self) -> bool:
        """Whether the prompt's tokens are still to be scored."""
        return self.context.log_probabilities_echo and self.prompt_logprobs is None

    @property
    def wants_answer(self) -> bool:
        """Whether tokens are made behind its prompt."""
        return self.prompt_logits is None and self.prompt_row is None

    @property
    def wants(self) -> str:
        """What is made of its prompt: "answer", "logits" or "row"."""
        if self.wants_answer:
            return "answer"
        return "row" if self.prompt_logits is None else "logits"

    @property
    def wants_all_logits(self) -> bool:
        """Whether its slices give logits at all positions, not at the last only."""
        return self.wants_echo or self.prompt_logits is not None

    @property
    def remaining_prompt(self) -> int:
        return len(self.context.tokens) - self.context.tokens.processed_length

    def note(self, missing_images: int) -> None:
        """Tell its requester how far its prompt has come."""
        if self.handle.watch is None:
            return
        tokens = self.context.tokens
        if missing_images:
            total = len(self.context.next_images)
            self.handle.note(Work("encoding pictures", total - missing_images, total, "picture"))
        else:
            done, total = tokens.processed_length, tokens.prompt_length
            self.handle.note(Work("reading the prompt", done, total, "token"))

    def usage(self) -> Usage:
        context = self.context
        return Usage(
            prompt_tokens=context.tokens.prompt_length,
            image_tokens=len(context.image_token_indices),
            cached_tokens=self.cached_tokens,
            images_encoded=self.images_encoded,
            completion_tokens=context.tokens.generated_length,
            drafted_tokens=self.drafted,
            accepted_tokens=self.kept,
        )


def new_job(
    context: TextContext,
    decoder: StreamDecoder,
    vocab_size: int,
    keys: np.ndarray,
    capacity: int,
) -> Job:
    """A job around a processed context.

    Raises: InputError for sampling values out of range, and more logprobs than there are tokens.
    """
    if context.log_probabilities > vocab_size:
        expected = f"at most {vocab_size}, the size of the vocabulary"
        raise unfit("logprobs", context.log_probabilities, expected)
    params = context.sampling_params
    ends = [] if context.ignore_eos else sorted(context.eos_tracker.eos_token_ids)
    prompt, processors = context.tokens.prompt, context.logits_processors
    sampler = RowSampler(params, prompt, vocab_size, ends, processors)
    stops = (*params.stop, *context.eos_tracker.eos_stop_strings)
    job = Job(context, Handle(), sampler, TextStream(decoder, stops), keys, capacity)
    if context.speculative == "lookup":
        job.drafts = Lookup(context.num_draft_tokens)
    return job
