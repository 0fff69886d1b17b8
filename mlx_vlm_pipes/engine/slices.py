"""One slice of prefill: pictures through the tower, tokens through the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.contexts import ImageMetadata, TextContext
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
        row.features[image_key(image)] for row in rows for image in row.context.active_images
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
