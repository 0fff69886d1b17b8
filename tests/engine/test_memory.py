"""What the engine holds on to, and what a long context costs."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes import load
from mlx_vlm_pipes.config import KVCacheConfig
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.engine.requests import Chunk
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs
from tests.engine.models import finish, new_scheduler, open_model, prompt_ids, submit, write_llama
from tests.fixtures_helper import FIXTURES


def noise(seed: int) -> Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


@pytest.mark.slow
def test_300_requests_with_pictures_leave_nothing_behind() -> None:
    limits = EngineConfig(prefix_bytes=400_000, image_bytes=50_000)
    pipe = load(FIXTURES / "idefics3-whole", dtype="float32", engine=limits)

    def active() -> int:
        pipe.engine.forget()
        return pipe.engine.worker.call(mx.get_active_memory)

    try:
        for i in range(8):  # traces and caches of the first requests
            pipe.generate(f"Number {i}?", [noise(i)], max_tokens=3)
        baseline, filled = active(), 0
        for i in range(300):
            if i % 10 == 0:
                pipe.stream(f"Left {i}", [noise(i)], max_tokens=50).__next__()  # dropped at once
            pipe.generate(f"Number {i}?", [noise(i)], max_tokens=2)
            if i % 50 == 49:
                filled = max(filled, pipe.engine.worker.call(mx.get_active_memory))
        assert filled < baseline + limits.prefix_bytes + limits.image_bytes + 300_000
        assert active() <= baseline + 20_000
    finally:
        pipe.close()


def long_run(folder: Path, bits: int | None, length: int) -> tuple[int, list[Chunk]]:
    """Peak bytes above the weights of a prompt and 8 tokens, and the chunks."""
    model = open_model(folder, kv_cache=KVCacheConfig(bits=bits))
    scheduler = new_scheduler(model, prefill_chunk=256)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    handle = submit(scheduler, prompt_ids(length), 8, logprobs=128)
    finish(scheduler)
    return mx.get_peak_memory() - before, list(handle)


@pytest.mark.slow
def test_a_quantised_cache_makes_the_peak_at_8k_lower(tmp_path: Path) -> None:
    length = 8192
    # Two layers: of the last one, prefill computes no more than the tokens that get logits.
    two = write_llama(tmp_path / "two", layers=2, heads=1, kv_heads=1)
    one = write_llama(tmp_path / "one", layers=1, heads=1, kv_heads=1)
    plain, _ = long_run(two, None, length)
    _, expected = long_run(one, None, length)
    cache = 2 * 2 * 64 * 4 * length  # keys and values of two layers, one head of 64, float32
    assert plain > cache
    for bits, saved, bar in ((8, 0.6, 0.02), (4, 0.7, 0.4)):
        peak, _ = long_run(two, bits, length)
        assert peak < plain - saved * cache, (bits, peak, plain)
        _, found = long_run(one, bits, length)
        first, wanted = found[0].logprobs, expected[0].logprobs
        assert first is not None
        assert wanted is not None
        (ours,), (theirs,) = first.top_log_probabilities, wanted.top_log_probabilities
        gap = max(abs(ours[token] - theirs[token]) for token in theirs)
        assert gap < bar, (bits, gap)


def test_prefill_over_a_quantised_cache_is_lazy_and_holds_few_tiles(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama", layers=2, heads=1, kv_heads=1)
    model = open_model(folder, kv_cache=KVCacheConfig(bits=8))
    cache, length = KVCache(model.kv_params), 4096
    row = cache.new_row()
    context = TextContext(tokens=TokenBuffer(np.array(prompt_ids(length))), max_length=16384)
    kv = cache_inputs(cache, [row])
    inputs = model.prepare_initial_token_inputs([[context]], kv)
    mx.synchronize()
    before = mx.get_active_memory()
    logits = model.execute(inputs).logits
    assert mx.get_active_memory() - before < 50_000 < cache.params.bytes_per_token * length
    mx.reset_peak_memory()
    mx.eval(logits, *row.arrays())
    # 136 tiles a layer, each 0.5 MB with its scores and dequantised keys: 42 MB if left to itself
    assert mx.get_peak_memory() - before < 25e6


def test_a_quantised_batch_gives_what_each_row_gives_alone(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    lengths = (5, 40, 300, 90, 17)
    for bits in (8, 4):
        model = open_model(folder, kv_cache=KVCacheConfig(bits=bits))

        def run(rows: list[int], size: int = 2048, model=model) -> list[list[int | None]]:
            scheduler = new_scheduler(model, prefill_chunk=size)
            handles = [submit(scheduler, prompt_ids(lengths[i], i), 20) for i in rows]
            finish(scheduler)
            return [[chunk.token for chunk in handle] for handle in handles]

        alone = [run([i])[0] for i in range(5)]
        assert run([0, 1, 2, 3, 4]) == alone
        assert run([4, 2, 0], size=64) == [alone[4], alone[2], alone[0]]
