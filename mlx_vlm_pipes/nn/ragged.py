"""Ragged batches: several rows on one flat token axis, and where vision rows go in it.

Host side only (numpy in, small arrays out); nothing here waits for the device (docs/api.md#steps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import ImageMetadata, TextContext, require_known_tokens
from mlx_vlm_pipes.errors import ConfigError, ImageTokenMismatch
from mlx_vlm_pipes.interfaces import Phase

DROP = np.iinfo(np.int32).min  # an image row that has no place among the active tokens


def require_replicas(replica_batches: Sequence[Sequence[TextContext]], degree: int = 1) -> None:
    """Raises: ConfigError unless there are exactly `degree` replicas."""
    if len(replica_batches) != degree:
        raise ConfigError(
            f"{len(replica_batches)} replica batches, expected {degree} (data_parallel_degree)"
        )


def replica_splits(replica_batches: Sequence[Sequence[TextContext]]) -> mx.array:
    """int64 [replicas + 1]: replica i is rows splits[i]:splits[i + 1]."""
    return mx.array(np.cumsum([0, *map(len, replica_batches)]).astype(np.int64))


def flat_tokens(contexts: Sequence[TextContext], vocab_size: int) -> mx.array:
    """Active tokens of all rows, int32 [T]. Raises: InputError for one beyond the vocabulary."""
    parts = [context.tokens.active for context in contexts]
    flat = np.concatenate([np.zeros(0, np.int64), *parts])
    require_known_tokens(flat, vocab_size)
    return mx.array(flat.astype(np.int32))


def row_offsets(contexts: Sequence[TextContext]) -> mx.array:
    """uint32 [B + 1]: row i is tokens offsets[i]:offsets[i+1]."""
    lengths = [context.tokens.active_length for context in contexts]
    return mx.array(np.cumsum([0, *lengths]).astype(np.uint32))


def active_images(contexts: Sequence[TextContext]) -> list[ImageMetadata]:
    """The images that this step encodes: those with tokens among the active ones, in order."""
    return [image for context in contexts for image in context.active_images]


def step_phase(contexts: Sequence[TextContext], return_n_logits: int) -> Phase:
    """DECODE where every row runs its last token alone and no vision rows go in.

    The decode step gives one row of logits each; another number asked for is prefill's to judge.
    """
    last = all(c.tokens.active_length == 1 and not c.tokens.is_chunked for c in contexts)
    is_decode = contexts and last and return_n_logits == 1 and not active_images(contexts)
    return Phase.DECODE if is_decode else Phase.PREFILL


def require_image_rows(
    contexts: Sequence[TextContext],
    image_token_id: int | None,
    count_rows: Callable[[ImageMetadata], int],
) -> None:
    """Check that each image has a placeholder token for each of its vision rows.

    image_token_id: the placeholder; None for the first token of each image's range.
    Raises: ImageTokenMismatch naming the image, its range and both counts.
    """
    for context in contexts:
        for i, image in enumerate(context.images):
            span = context.tokens[image.start_idx : image.end_idx]
            token = int(span[0]) if image_token_id is None else image_token_id
            tokens, rows = int((span == token).sum()), count_rows(image)
            if tokens != rows:
                raise ImageTokenMismatch(
                    f"image {i + 1} of {len(context.images)}, at tokens {image.start_idx} to "
                    f"{image.end_idx - 1}: {tokens} image tokens ({token}) for {rows} "
                    "vision rows; process prompt and images in one call"
                )


def image_token_indices(contexts: Sequence[TextContext]) -> np.ndarray:
    """Destination of every vision row of `active_images`, int32 [vision rows].

    Rows outside the active tokens (already processed, or in a later chunk) get DROP.
    """
    pieces, begin = [np.zeros(0, np.int32)], 0
    for context in contexts:
        done, active = context.tokens.processed_length, context.tokens.active_length
        for image in context.active_images:
            place = context.placeholder_positions(image) - done
            inside = (place >= 0) & (place < active)
            pieces.append(np.where(inside, place + begin, DROP).astype(np.int32))
        begin += active
    return np.concatenate(pieces)


def placed_features(
    features: mx.array, indices: mx.array, num_tokens: int
) -> tuple[mx.array, mx.array] | None:
    """The vision rows that have a place among the tokens, and their places; None if none has.

    Args: features [M, E]; indices int32 [M], where those outside 0..num_tokens-1 are skipped.
    Returns: [N, E] and int32 [N]. Raises: ImageTokenMismatch if M differs.
    """
    if features.shape[0] != indices.shape[0]:
        raise ImageTokenMismatch(
            f"{features.shape[0]} vision rows for {indices.shape[0]} image tokens; "
            "process prompt and images in one call"
        )
    where = np.array(indices)
    kept = np.flatnonzero((where >= 0) & (where < num_tokens))
    if not len(kept):
        return None
    rows = features if len(kept) == len(where) else features[mx.array(kept)]
    return rows, mx.array(where[kept])


def merge_image_features(x: mx.array, rows: mx.array, places: mx.array) -> mx.array:
    """Write vision rows over the placeholder embeddings.

    Args: x [T, E]; rows [N, E], cast to x's dtype; places int32 [N], rows of x.
    Returns: [T, E]; the caller's x is unchanged.
    Source: transformers modeling_idefics3.py, inputs_merger.
    """
    merged = mx.array(x)  # index assignment writes into the array it is given
    merged[places] = rows.astype(x.dtype)
    return merged
