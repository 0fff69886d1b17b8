"""What a request will need, before anything runs: tokens, cache, peak memory.

The peak is what is resident (weights, caches) + keys and values + the larger of encoding and
prefill. Their transients follow how MLX runs a layer: the outputs of some ten consecutive
operations are alive at once, which comes to about 9 hidden states, 4 widths of all heads, 5 MLP
widths and, without fused attention, the scores of one layer. The factors were fitted to measured
peaks, with a margin so that the plan is not below them (tests/engine/test_plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.contexts import ImageMetadata, TextContext
from mlx_vlm_pipes.engine.state import EngineConfig, EngineState
from mlx_vlm_pipes.interfaces import LayerWork, PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import capacity_bucket

HIDDEN_STATES = 9
HEAD_WIDTHS = 4
MLP_WIDTHS = 5
SCORES = 1.25  # a mask or a second, smaller copy beside them
MARGIN = 1.2
FIXED_BYTES = 1 << 15  # small arrays, whatever the size of the request


@dataclass(frozen=True)
class Plan:
    """Counts in tokens, sizes in bytes. fits: peak, cache and slices are within their limits."""

    prompt_tokens: int
    image_tokens: int
    max_new_tokens: int
    kv_bytes: int
    resident_bytes: int
    vision_peak_bytes: int
    prefill_peak_bytes: int
    peak_bytes: int
    memory_bytes: int
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"prompt: {self.prompt_tokens} tokens ({self.image_tokens} of them image tokens), "
            f"answer: up to {self.max_new_tokens}; KV cache: {self.kv_bytes / 1e6:.1f} MB; "
            f"predicted peak: {self.peak_bytes / 1e6:.1f} MB of {self.memory_bytes / 1e9:.1f} GB; "
            f"{verdict}"
        )


def make_plan(
    state: EngineState, context: TextContext, resident_bytes: int, memory_bytes: int
) -> Plan:
    """The plan of one processed request on an otherwise idle engine."""
    tokens, limit = context.tokens, context.sampling_params.max_new_tokens
    new = min(limit or context.max_length, context.max_length - len(tokens))
    kv = cache_bytes(state.model.kv_params, len(tokens) + new)
    vision = _vision_bytes(state.model, context.images, state.config)
    decoder, itemsize = state.model.language.decoder.config, state.model.kv_params.dtype
    fused = not state.model.device.is_host
    prefill = prefill_bytes(decoder, itemsize.size_in_bytes, len(tokens), state.config, fused=fused)
    peak = peak_bytes(resident_bytes, kv, max(vision, prefill), state.config)
    in_bytes = peak <= memory_bytes and kv <= state.config.kv_bytes
    fits = in_bytes and state.config.takes(len(tokens))
    return Plan(
        len(tokens),
        len(context.image_token_indices),
        new,
        kv,
        resident_bytes,
        vision,
        prefill,
        peak,
        memory_bytes,
        fits,
    )


def cache_bytes(params: KVCacheParams, tokens: int) -> int:
    """Keys and values of one row, in the bucket that its tokens take."""
    return capacity_bucket(tokens) * params.bytes_per_token


def peak_bytes(resident: int, kv: int, transient: int, config: EngineConfig) -> int:
    """Weights and what is resident with them, one row's cache, and the widest moment beside them.

    A finished row is copied into the prefix cache while its own arrays are still there.
    """
    return resident + kv + max(transient, kv if config.enable_prefix_caching else 0)


class DecoderSizes(Protocol):
    """The widths of a decoder that a plan reads (nn.decoder.DecoderConfig)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def _transient(work: LayerWork, itemsize: int, *, fused: bool) -> float:
    """fused: attention without its scores in memory, as on a GPU."""
    widths = HIDDEN_STATES * work.width + HEAD_WIDTHS * work.heads + MLP_WIDTHS * work.inner
    scores = 0 if fused else SCORES * work.scores
    return FIXED_BYTES + MARGIN * itemsize * (work.tokens * widths + scores)


def _vision_bytes(
    model: PipelineModelWithKVCache, images: Sequence[ImageMetadata], config: EngineConfig
) -> int:
    """The largest micro-batch of images, and the rows that all of them leave behind."""
    itemsize = model.kv_params.dtype.size_in_bytes
    fused = not model.device.is_host
    sizes = [_transient(model.vision_work(image), itemsize, fused=fused) for image in images]
    sizes = [size + image.pixel_values.nbytes for size, image in zip(sizes, images, strict=True)]
    batches = [
        sum(sizes[i : i + config.image_batch]) for i in range(0, len(sizes), config.image_batch)
    ]
    return int(max(batches, default=0))


def prefill_bytes(
    decoder: DecoderSizes, itemsize: int, tokens: int, config: EngineConfig, *, fused: bool
) -> int:
    """What prefilling `tokens` tokens holds beside weights and cache, at its widest slice.

    itemsize: bytes of an element while computing; fused: on a GPU, attention without its scores.
    """
    chunk = min(tokens, config.prefill_chunk)
    work = LayerWork(
        tokens=chunk,
        width=decoder.hidden_size,
        heads=decoder.num_heads * decoder.head_dim,
        inner=decoder.intermediate_size,
        scores=decoder.num_heads * chunk * tokens,
    )
    return int(_transient(work, itemsize, fused=fused)) + 4 * 3 * decoder.vocab_size
