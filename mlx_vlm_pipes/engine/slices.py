"""One slice of prefill: pictures through the tower, tokens through the decoder.

The batch's prefill and the logits of a whole prompt go through the same two functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import ImageMetadata, TextContext, require_known_tokens
from mlx_vlm_pipes.engine.state import EngineState
from mlx_vlm_pipes.interfaces import ModelOutputs, PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import CacheRow, KVCache, cache_inputs, increment_cache_lengths


@dataclass(frozen=True)
class SliceRow:
    """One row of a slice: its active tokens, where they are cached, its vision rows by key."""

    context: TextContext
    cache: CacheRow
    features: Mapping[int, mx.array]


def image_key(image: ImageMetadata) -> int:
    """The picture's content hash; its identity where it has none."""
    return image.image_hash if image.image_hash is not None else id(image)


def encode(
    model: PipelineModelWithKVCache, images: Mapping[int, ImageMetadata]
) -> dict[int, mx.array]:
    """Vision rows of a micro-batch of pictures, by key, evaluated."""
    rows = model.encode_images(list(images.values()))
    mx.eval(rows)
    return dict(zip(images, rows, strict=True))


def run_slice(
    model: PipelineModelWithKVCache, cache: KVCache, rows: Sequence[SliceRow], return_n_logits: int
) -> ModelOutputs:
    """The active tokens of all rows in one ragged step; counts them as cached. Lazy."""
    kv = cache_inputs(cache, [row.cache for row in rows])
    features = [
        row.features[image_key(image)]
        for row in rows
        for image in row.context.next_images
        if image.start_idx < row.context.tokens.current_position
    ]
    inputs = model.prepare_initial_token_inputs(
        model.as_replicas([row.context for row in rows]),
        kv,
        return_n_logits,
        image_embeddings=mx.concatenate(features) if features else None,
    )
    outputs = model.execute(inputs)
    increment_cache_lengths(kv, [row.context.tokens.active_length for row in rows])
    return outputs


def prompt_logits(state: EngineState, context: TextContext) -> np.ndarray:
    """float32 [T, V]: logits at every position of a prompt, in a cache of its own.

    Raises: OutOfBudget for a prompt that may not be cut and is longer than a slice.
    """
    state.require_slice(context)
    model, config, tokens = state.model, state.config, context.tokens
    require_known_tokens(tokens.all, model.vocab_size)
    images = {image_key(image): image for image in context.next_images}
    keys, features = list(images), {}
    for begin in range(0, len(keys), config.image_batch):
        batch = keys[begin : begin + config.image_batch]
        features |= encode(model, {key: images[key] for key in batch})
    cache = KVCache(model.kv_params)
    row = SliceRow(context, state.new_row(context, cache), features)
    pieces = []
    while tokens.active_length:
        size = state.slice_size(context, config.prefill_chunk)
        tokens.chunk(size)
        pieces.append(np.array(run_slice(model, cache, [row], size).logits))
        tokens.advance_chunk()
    return np.concatenate(pieces)
