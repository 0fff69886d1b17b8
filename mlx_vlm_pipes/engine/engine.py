"""The engine as front ends see it: submit from any thread, iterate the answer."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import TextAndVisionContext, TextContext
from mlx_vlm_pipes.engine.requests import Handle
from mlx_vlm_pipes.engine.scheduler import EngineConfig, EngineStats, Scheduler
from mlx_vlm_pipes.engine.text import StreamDecoder
from mlx_vlm_pipes.engine.worker import OwnerThread
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs, increment_cache_lengths


class Engine:
    """A model on its owning thread, and the scheduler that feeds it."""

    def __init__(
        self,
        worker: OwnerThread,
        model: PipelineModelWithKVCache,
        config: EngineConfig,
        vocab_size: int,
    ) -> None:
        self.worker, self.model, self.config = worker, model, config
        self.scheduler = Scheduler(model, config, vocab_size)
        worker.idle_work = self.scheduler.step
        self._finalizer = weakref.finalize(self, worker.stop)

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        return replace(self.scheduler.stats)

    def submit(self, context: TextContext, decoder: StreamDecoder) -> Handle:
        """Queue a request; safe from any thread.

        Raises: InputError for bad sampling values, OutOfBudget for what can never fit.
        """
        return self.worker.call(lambda: self.scheduler.submit(context, decoder))

    def prompt_logits(self, context: TextContext) -> np.ndarray:
        """float32 [T, V]: logits at every prompt position, outside the batch and its caches."""
        return self.worker.call(lambda: _prompt_logits(self.model, context, self.config))

    def peak_memory_bytes(self) -> int:
        """The most memory that MLX held at once in this process."""
        return self.worker.call(mx.get_peak_memory)

    def forget(self) -> None:
        """Empty the prefix and image caches."""

        def clear() -> None:
            self.scheduler.prefixes.shrink(-1)
            self.scheduler.images.shrink(-1)
            mx.clear_cache()

        self.worker.call(clear)

    def close(self) -> None:
        """Stop the owning thread; running requests end without a result."""
        self._finalizer()


def _prompt_logits(
    model: PipelineModelWithKVCache, context: TextContext, config: EngineConfig
) -> np.ndarray:
    cache, tokens = KVCache(model.kv_params), context.tokens
    row = cache.new_row()
    row.planned_length = len(tokens)
    kv = cache_inputs(cache, [row])
    pieces = []
    features = None
    if isinstance(context, TextAndVisionContext) and context.images:
        features = model.encode_images(context.images)
    while tokens.active_length:
        size = min(config.prefill_chunk, tokens.active_length)
        tokens.chunk(size)
        extra = {}
        if features is not None and isinstance(context, TextAndVisionContext):
            used = [
                features[i]
                for i, image in enumerate(context.images)
                if i >= context.image_idx and image.start_idx < tokens.current_position
            ]
            if used:
                extra = {"image_embeddings": mx.concatenate(used)}
        inputs = model.prepare_initial_token_inputs([[context]], kv, size, **extra)
        outputs = model.execute(inputs)
        increment_cache_lengths(kv, [size])
        pieces.append(np.array(outputs.logits))
        tokens.advance_chunk()
    return np.concatenate(pieces)


def machine_memory() -> int:
    """Bytes: the device's memory where it has its own figure, else the machine's."""
    info = mx.device_info()
    size = info.get("memory_size")
    if isinstance(size, int) and size > 0:
        return size
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_engine_config(memory_bytes: int, *, prefix_caching: bool = True) -> EngineConfig:
    """Half of the memory for keys and values, an eighth for prefixes, a 32nd for images."""
    return EngineConfig(
        kv_bytes=memory_bytes // 2,
        prefix_bytes=memory_bytes // 8,
        image_bytes=memory_bytes // 32,
        enable_prefix_caching=prefix_caching,
    )
