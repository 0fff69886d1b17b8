"""Drafts by a smaller model with the same tokens: it goes ahead, the large one judges.

It has a cache of its own. A row's tokens are read into it slice by slice, once it decodes; then
each draft is a few of its decode steps, for all rows that draft together, and what of it was
wrong is taken back by length. It sees text only: what stands for a picture is left out.
Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; but
what is kept is what the row's own sampler chooses, from the same random numbers that the draft
was drawn with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.engine.batch_sampler import BatchSampler
from mlx_vlm_pipes.engine.drafts import LEAST_KEPT, Drafts
from mlx_vlm_pipes.engine.pace import Pace
from mlx_vlm_pipes.engine.requests import Job, new_job
from mlx_vlm_pipes.engine.slices import SliceRow, run_slice
from mlx_vlm_pipes.engine.state import EngineConfig, EngineState
from mlx_vlm_pipes.engine.text import NoText
from mlx_vlm_pipes.interfaces import Phase, PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs, increment_cache_lengths

BEHIND = (1, 2, 4, 8)  # tokens of each row that the first step of a draft may read: few sizes
PAUSE = 16  # tokens that a row whose drafts fail goes without, at first
HOPE = 0.02  # how much more is expected of the next draft with each token that comes without one


@dataclass(frozen=True)
class Drafter:
    """A loaded model that may draft for another one; `DraftModel` is what runs it.

    new_context: of prompt tokens int64 [n], for this model. name: for people.
    """

    model: PipelineModelWithKVCache
    new_context: Callable[[np.ndarray], TextContext]
    name: str


class ModelDrafts(Drafts):
    """One row that the model drafts for.

    own: the model's own job for the row, once it has one. seen: tokens of prompt and answer that
    this job knows. drafted: the last draft; all of it but its last token is cached for the job.
    After drafts of which too little was right, the row waits, each time twice as long.
    """

    def __init__(self, model: DraftModel, most: int | None) -> None:
        super().__init__(most, share=1.0)
        self.own: Job | None = None
        self.seen, self.drafted = 0, list[int]()
        self._model, self._pause, self._wait = model, PAUSE, 0

    @property
    def is_on(self) -> bool:
        return self._wait == 0

    def note(self, kept: int, count: int) -> None:
        super().note(kept, count)
        if self._share < LEAST_KEPT:
            self.rest()
        elif kept:
            self._pause = PAUSE

    def rest(self) -> None:
        """Go without drafts for a while."""
        self._wait, self._pause, self._share = self._pause, 2 * self._pause, LEAST_KEPT

    def watch(self, tokens: np.ndarray) -> None:
        """As `Drafts.watch`: a pause gets shorter, and more is hoped of the next draft."""
        del tokens
        self._wait = max(0, self._wait - 1)
        self._share += HOPE * (1 - self._share)

    def end(self, *, is_kept: bool) -> None:
        self._model.close(self, is_kept=is_kept)


class DraftModel:
    """The smaller model, its cache, and the rows that it drafts for.

    vocab_size: of the model that judges. It runs on the same thread. slices: of tokens that it has
    read before it drafted.
    """

    def __init__(self, drafter: Drafter, config: EngineConfig, vocab_size: int) -> None:
        self.model = drafter.model
        self.state = EngineState(drafter.model, config)
        self._new_context = drafter.new_context
        self._sampler = BatchSampler(is_gpu=drafter.model.kv_params.devices[0].is_gpu())
        self._vocab_size = vocab_size
        self._open: set[ModelDrafts] = set()
        self.slices, self._pace = 0, Pace()

    def new_drafts(self, most: int | None) -> ModelDrafts:
        """The drafts of a new request. most: tokens of each."""
        return ModelDrafts(self, most)

    def close(self, drafts: ModelDrafts, *, is_kept: bool) -> None:
        """Free a row's cache; with is_kept, it is kept as a prefix."""
        own, drafts.own = drafts.own, None
        self._open.discard(drafts)
        if own is None or own.held is None:
            return
        if is_kept:
            self.state.remember(own)
        self.state.cache.release(own.held)

    def drop(self) -> None:
        """Forget all rows: the arrays they lie in are lost."""
        for drafts in self._open:
            drafts.own = None
        self._open.clear()
        self.state.cache = KVCache(self.model.kv_params)

    def draft(
        self, jobs: Sequence[tuple[Job, ModelDrafts]], count: int, *, others_wait: bool
    ) -> dict[Job, list[int]]:
        """Up to `count` tokens to run behind those of each job. None yet where it has to read on:
        then it reads a slice; and where a row is too long for it.

        others_wait: whether other rows wait for a slice, which makes it smaller.
        """
        rows = [(job, drafts) for job, drafts in jobs if self._catch_up(job, drafts, count)]
        far = [drafts for _, drafts in rows if _gap(drafts) > BEHIND[-1]]
        if far:
            self._read_slice(far, self._slice_room() if others_wait else None)
        ready = [(job, drafts) for job, drafts in rows if _gap(drafts) <= BEHIND[-1]]
        widest = max((_gap(drafts) for _, drafts in ready), default=0)
        width = next(size for size in BEHIND if size >= widest)
        ready = [(j, d) for j, d in ready if len(_job(d).context.tokens) >= width]
        if not ready:
            return {}
        tokens = self._run(ready, width, count)
        for (_, drafts), own in zip(ready, tokens, strict=True):
            drafts.drafted = own
        return {job: own for (job, _), own in zip(ready, tokens, strict=True)}

    def _catch_up(self, job: Job, drafts: ModelDrafts, count: int) -> bool:
        """Take a row as far as its job has come; False where the model cannot go so far."""
        tokens, model = job.context.tokens, self.model
        longest = min(model.max_seq_len, model.cache_break_length or model.max_seq_len)
        new = tokens[drafts.seen :]
        if drafts.own is None:
            new = self._text(job.context)
        if len(tokens) + count > longest or (len(new) and int(new.max()) >= model.vocab_size):
            drafts.rest()
            return False
        if drafts.own is None:
            drafts.own = self._opened(new, job.capacity)
            self._open.add(drafts)
        else:
            own, right = drafts.own, 0
            for drafted, token in zip(drafts.drafted[:-1], new, strict=False):
                if drafted != token:
                    break
                right += 1
            own.row.length -= max(0, len(drafts.drafted) - 1 - right)
            own.context.tokens.draft(new.tolist())
        drafts.seen, drafts.drafted = len(tokens), []
        return True

    def _text(self, context: TextContext) -> np.ndarray:
        """int64: the tokens without those that stand for pictures."""
        is_text = np.ones(len(context.tokens), bool)
        for image in context.images:
            is_text[image.start_idx : image.end_idx] = False
        return context.tokens.all[is_text]

    def _opened(self, tokens: np.ndarray, capacity: int) -> Job:
        """The model's own job for a row, with what is cached of its beginning."""
        context = self._new_context(tokens)
        own = new_job(context, NoText(), self.model.vocab_size, self.state.keys(context), capacity)
        own.held = self.state.row_from_prefix(own)
        return own

    def _slice_room(self) -> int:
        """Tokens of a slice that takes the others no longer than one of prefill."""
        config = self.state.config
        return config.slice_beside_others(self._pace.fitting(config.running_wait_ms / 1000))

    def _read_slice(self, far: Sequence[ModelDrafts], most: int | None) -> None:
        """One slice of what rows have yet to read; at least one token stays for the draft."""
        begun, rows = self.state.clock(), list[Job]()
        room = whole = self.state.config.prefill_chunk if most is None else most
        for drafts in far:
            size = min(room, _gap(drafts) - 1)
            if size < 1:
                break
            own, room = _job(drafts), room - size
            own.context.tokens.processed_length = own.row.length
            own.context.tokens.chunk(size)
            rows.append(own)
        run_slice(self.model, self.state.cache, [SliceRow(j.context, j.row, {}) for j in rows], 1)
        mx.eval([array for own in rows for array in own.row.arrays()])
        for own in rows:
            own.context.tokens.advance_chunk()
        self._pace.note(whole - room, self.state.clock() - begun)
        self.slices += 1

    def _run(
        self, ready: Sequence[tuple[Job, ModelDrafts]], width: int, count: int
    ) -> list[list[int]]:
        """The model's own next tokens, by each row's settings and random numbers."""
        model, cache = self.model, self.state.cache
        own = [_job(drafts) for _, drafts in ready]
        for row in [row for row in cache.placed if all(row is not j.row for j in own)]:
            cache.release(row, keep=True)
        for job in own:
            job.row.length = job.context.tokens.processed_length = len(job.context.tokens) - width
        kv = cache_inputs(cache, [job.row for job in own])
        contexts = model.as_replicas([job.context for job in own])
        inputs = model.prepare_initial_token_inputs(contexts, kv, width)
        inputs.phase = Phase.VERIFY if width > 1 else Phase.DECODE
        samplers = [job.sampler.twin() for job, _ in ready]
        chosen: list[mx.array] = []
        for step in range(count):
            if step:
                inputs = model.prepare_next_token_inputs(chosen[-1], inputs)
            logits = self._fitted(model.execute(inputs).last_logits())
            increment_cache_lengths(kv, [1 if step else width] * len(own))
            tokens, _ = self._sampler(logits, samplers)
            chosen.append(tokens)
        mx.eval(chosen)
        return np.array(mx.stack(chosen, axis=1)).tolist()

    def _fitted(self, logits: mx.array) -> mx.array:
        """Logits [B, V of this model] as those of the model that judges: embeddings are padded."""
        missing = self._vocab_size - logits.shape[-1]
        if missing <= 0:
            return logits[:, : self._vocab_size]
        return mx.pad(logits, [(0, 0), (0, missing)], constant_values=-float("inf"))


def _job(drafts: ModelDrafts) -> Job:
    """Raises: RuntimeError for a row that has not been opened."""
    if drafts.own is None:
        raise RuntimeError("a row drafts that the draft model does not know")
    return drafts.own


def _gap(drafts: ModelDrafts) -> int:
    """Tokens that the model has yet to read."""
    own = _job(drafts)
    return len(own.context.tokens) - own.row.length
