"""Idefics3 and Pixtral models driven by hand: configurations, prefill in chunks, decode steps."""

import copy
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.contexts import TextAndVisionContext
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import InferenceSession, ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.kv_cache import KVCache, KVCacheInputs, cache_inputs, increment_cache_lengths
from mlx_vlm_pipes.nn.ragged import active_images
from mlx_vlm_pipes.registry import find_room
from mlx_vlm_pipes.weights import find_weight_files, load_weights
from tests.device import device, device_spec


def pipeline_config(values: dict[str, Any], **options: Any) -> PipelineConfig:
    """A float32 pipeline over a config.json given as a dict."""
    return PipelineConfig(
        model=ModelConfig(
            huggingface_config=HuggingFaceConfig(values),
            quantization_encoding="float32",
            device_specs=[device_spec()],
            **options,
        )
    )


def changed(config: dict[str, Any], part: str = "", **values: Any) -> dict[str, Any]:
    """A copy with keys replaced, at the top or in a part; None removes a key."""
    config = copy.deepcopy(config)
    target = config[part] if part else config
    target.update(values)
    for key in [k for k, v in values.items() if v is None]:
        del target[key]
    return config


@functools.cache
def load(
    path: Path,
    mode: ReturnLogits = ReturnLogits.ALL,
    hidden: ReturnHiddenStates = ReturnHiddenStates.NONE,
    eagle_layers: tuple[int, ...] | None = None,
    **options: Any,
) -> Any:
    """The model of a checkpoint folder, float32; options are ModelConfig's."""
    files, chosen = find_weight_files(path), device()
    config = ModelConfig(
        model_path=str(path),
        weight_path=files,
        quantization_encoding="float32",
        device_specs=[device_spec()],
        **options,
    )
    return find_room(config.huggingface_config).model_class()(
        PipelineConfig(model=config),
        InferenceSession([chosen]),
        [chosen],
        config.kv_cache,
        load_weights(files),
        return_logits=mode,
        return_hidden_states=hidden,
        eagle_layers=eagle_layers,
    )


def new_cache(model: Any, rows: int = 1) -> KVCacheInputs[mx.array, mx.array]:
    cache = KVCache(model.kv_params)
    return cache_inputs(cache, [cache.new_row() for _ in range(rows)])


def run(
    model: Any, contexts: Sequence[TextAndVisionContext], steps: int = 0, *, encoded: bool = False
) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits of every prompt position of each row, and greedy tokens; encoded: images before."""
    kv = new_cache(model, len(contexts))
    images = active_images(contexts)
    rows = mx.concatenate(model.encode_images(images)) if encoded and images else None
    inputs = model.prepare_initial_token_inputs([contexts], kv, image_embeddings=rows)
    longest = max(c.tokens.active_length for c in contexts)
    assert np.array(kv.inputs[0].max_lengths).tolist() == [[longest, 0]]
    out = model.execute(inputs)
    offsets, logits = np.array(out.logit_offsets), np.array(out.logits)
    increment_cache_lengths(kv, [c.tokens.active_length for c in contexts])
    chosen = []
    for _ in range(steps):
        chosen.append(mx.argmax(out.next_token_logits, axis=-1))
        inputs = model.prepare_next_token_inputs(chosen[-1], inputs)
        assert np.array(kv.inputs[0].max_lengths)[0, 0] == 1
        out = model.execute(inputs)
        increment_cache_lengths(kv, [1] * len(contexts))
    parts = [logits[begin:end] for begin, end in itertools.pairwise(offsets)]
    return parts, np.array(chosen, np.int64).reshape(steps, -1).T.tolist()


def run_in_chunks(model: Any, context: TextAndVisionContext, size: int) -> np.ndarray:
    """Logits of every position, the prompt prefilled `size` tokens at a time."""
    kv, parts = new_cache(model), []
    while True:
        tokens = context.tokens
        tokens.chunk(min(size, tokens.active_length))
        out = model.execute(model.prepare_initial_token_inputs([[context]], kv))
        parts.append(np.array(out.logits))
        increment_cache_lengths(kv, [tokens.active_length])
        if not tokens.is_chunked:
            return np.concatenate(parts)
        tokens.advance_chunk()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
