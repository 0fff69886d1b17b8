"""What a request will need, before anything runs: tokens, cache, peak memory.

The peak is what is resident (weights, caches) + keys and values + the larger of encoding and
prefill. Their transients follow how MLX runs a layer: the outputs of some ten consecutive
operations are alive at once, which comes to about 9 hidden states, 4 widths of all heads, 5 MLP
widths and, where attention is not fused, the scores of one layer. The factors were fitted to
measured peaks, with a margin so that the plan is not below them (tests/engine/test_plan.py).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.contexts import ImageMetadata, TextContext
from mlx_vlm_pipes.engine.memory import fuses_attention, machine_memory
from mlx_vlm_pipes.engine.state import EngineConfig, EngineState
from mlx_vlm_pipes.errors import OutOfBudget
from mlx_vlm_pipes.interfaces import LayerWork, PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import capacity_bucket

HIDDEN_STATES = 9
HEAD_WIDTHS = 4
MLP_WIDTHS = 5
SCORES = 1.25  # a mask or a second, smaller copy beside them
SCORE_BYTES = 4  # on a CPU they are float32 whatever the dtype (rounding.attend)
MARGIN = 1.2
FIXED_BYTES = 1 << 15  # small arrays, whatever the size of the request


@dataclass(frozen=True)
class Plan:
    """Counts in tokens, sizes in bytes. memory_bytes: what the device has for all of it
    (engine.memory.machine_memory). fits: peak, cache and slices are within their limits."""

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

    def _repr_html_(self) -> str:
        from mlx_vlm_pipes.display.html import bars_html, said_bytes

        of_them = f", {self.image_tokens} of them image tokens" if self.image_tokens else ""
        sizes = {
            "weights and what is resident": self.resident_bytes,
            "KV cache": self.kv_bytes,
            "encoding pictures": self.vision_peak_bytes,
            "reading the prompt": self.prefill_peak_bytes,
            "predicted peak": self.peak_bytes,
        }
        share = 100 * self.peak_bytes / self.memory_bytes
        note = (
            f"{self.prompt_tokens} prompt tokens{of_them}, up to {self.max_new_tokens} new ones; "
            f"the peak is {share:.2g} % of the {said_bytes(self.memory_bytes)} that the device has"
        )
        title = "Plan: fits" if self.fits else "Plan: does not fit"
        return bars_html(title, sizes, self.memory_bytes, note)

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
    kv = capacity_bucket(len(tokens) + new) * state.token_bytes(context)
    vision = _vision_bytes(state, context.images)
    scored = context.log_probabilities_echo
    prefill = _prompt_bytes(state.model, len(tokens), state.config, scored=scored)
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

    A finished row is copied into the prefix cache, where it fits, while its own arrays are there.
    """
    copied = min(kv, config.prefix_bytes) if config.enable_prefix_caching else 0
    return resident + kv + max(transient, copied)


def default_limits(
    model: PipelineModelWithKVCache, others_bytes: int = 0, parts: int = 1
) -> EngineConfig:
    """The engine's limits by the model's own settings and the memory of its device.

    others_bytes: the weights of other models there; parts: models that share what is left.
    """

    def limits(step_bytes: int) -> EngineConfig:
        return EngineConfig.from_pipeline(
            model.pipeline_config,
            machine_memory(model.device),
            model.weight_bytes + others_bytes,
            model.kv_cache_config,
            step_bytes,
        )

    first = limits(0)
    whole = limits(_prompt_bytes(model, min(first.prefill_chunk, model.max_seq_len), first))
    return replace(
        whole,
        kv_bytes=whole.kv_bytes // parts,
        prefix_bytes=whole.prefix_bytes // parts,
        image_bytes=whole.image_bytes // parts,
    )


def require_room(
    state: EngineState, context: TextContext, new_tokens: int | None, *, scored: bool
) -> None:
    """Raises: OutOfBudget for a request that the device cannot hold even alone, with what it can.

    new_tokens: None for as many as max_length leaves. scored: all its prompt's tokens get logits.
    """
    prompt, model, memory = len(context.tokens), state.model, state.memory_bytes
    asked = context.max_length if new_tokens is None else prompt + new_tokens
    pictures = max((picture_bytes(model, image) for image in context.images), default=0)

    def needed(tokens: int) -> int:
        text = _prompt_bytes(model, min(prompt, tokens), state.config, scored=scored)
        widest = max(pictures, text)
        kv = capacity_bucket(tokens) * state.token_bytes(context)
        return peak_bytes(state.weight_bytes, kv, widest, state.config)

    total = min(asked, context.max_length)
    need = needed(total)
    if need <= memory:
        return
    fitting = bisect.bisect_right(range(1, total + 1), memory, key=needed)
    said = f"the request needs {need / 1e6:.4g} MB with the weights, the device has"
    if fitting:
        remedy = f"at most {fitting} tokens fit, prompt and answer together"
    elif pictures and peak_bytes(state.weight_bytes, 0, pictures, state.config) > memory:
        remedy = f"one of its pictures alone takes {pictures / 1e6:.4g} MB; give smaller ones"
    else:
        remedy = "no token fits; use a smaller or a quantised model"
    raise OutOfBudget(f"{said} {memory / 1e6:.4g} MB; {remedy}")


class DecoderSizes(Protocol):
    """The widths of a decoder that a plan reads (nn.decoder_config.DecoderConfig)."""

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
    """fused: attention without its scores in memory (engine.memory.fuses_attention)."""
    widths = HIDDEN_STATES * work.width + HEAD_WIDTHS * work.heads + MLP_WIDTHS * work.inner
    scores = 0 if fused else SCORES * work.scores
    scored = max(itemsize, SCORE_BYTES)
    return FIXED_BYTES + MARGIN * (itemsize * work.tokens * widths + scored * scores)


def picture_bytes(model: PipelineModelWithKVCache, image: ImageMetadata) -> int:
    """What encoding one picture holds at its widest, pixels included."""
    work, dtype = model.vision_work(image), model.kv_params.dtype
    fused = fuses_attention(model.device, work.head_dim, dtype.to_mx())
    return int(_transient(work, dtype.size_in_bytes, fused=fused)) + image.pixel_values.nbytes


def picture_room(state: EngineState) -> int:
    """Bytes that several pictures encoded together may take, beside weights and full caches."""
    if state.picture_bytes is not None:
        return state.picture_bytes
    config = state.config
    caches = config.kv_bytes + config.prefix_bytes + config.image_bytes
    return max(0, state.memory_bytes - state.weight_bytes - caches)


def _vision_bytes(state: EngineState, images: Sequence[ImageMetadata]) -> int:
    """The largest micro-batch of images."""
    sizes, count = [picture_bytes(state.model, i) for i in images], state.config.image_batch
    batches = [sum(sizes[i : i + count]) for i in range(0, len(sizes), count)]
    largest = max(sizes, default=0)
    return min(max(batches, default=0), max(largest, picture_room(state)))


def _prompt_bytes(
    model: PipelineModelWithKVCache, tokens: int, config: EngineConfig, *, scored: bool = False
) -> int:
    """`prefill_bytes` of a loaded model; scored: with logits of all tokens of a slice."""
    decoder, dtype = model.language.decoder.config, model.kv_params.dtype
    fused = fuses_attention(model.device, decoder.head_dim, dtype.to_mx())
    logits = 4 * decoder.vocab_size * min(tokens, config.prefill_chunk) if scored else 0
    return prefill_bytes(decoder, dtype.size_in_bytes, tokens, config, fused=fused) + logits


def prefill_bytes(
    decoder: DecoderSizes, itemsize: int, tokens: int, config: EngineConfig, *, fused: bool
) -> int:
    """What prefilling `tokens` tokens holds beside weights and cache, at its widest slice.

    itemsize: bytes of an element while computing; fused: attention without its scores.
    """
    chunk = min(tokens, config.prefill_chunk)
    work = LayerWork(
        tokens=chunk,
        width=decoder.hidden_size,
        heads=decoder.num_heads * decoder.head_dim,
        inner=decoder.intermediate_size,
        scores=decoder.num_heads * chunk * tokens,
        head_dim=decoder.head_dim,
    )
    return int(_transient(work, itemsize, fused=fused)) + 4 * 3 * decoder.vocab_size
