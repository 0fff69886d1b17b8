"""Nothing is computed twice: prefixes of the KV cache, features of pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes import Pipeline, Usage, load
from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.engine.caches import ImageCache, PrefixCache, common_prefix
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.kv_cache import CacheRow, KVCache
from tests.engine.driving import IDEFICS3, LLAMA
from tests.fixtures_helper import FIXTURES

PARAMS = KVCacheParams(
    dtype=DType.float32, n_kv_heads=1, head_dim=4, num_layers=2, devices=[DeviceRef.CPU()]
)


def stored_row(length: int) -> CacheRow:
    row = KVCache(PARAMS).new_row()
    row.reserve(length)
    row.length = length
    return row.copy(length, length)


def test_the_longest_prefix_is_found_and_the_least_used_goes() -> None:
    size = stored_row(8).nbytes
    cache = PrefixCache(3 * size)
    rows = {first: stored_row(8) for first in (1, 2, 3, 4)}
    keys = {first: np.array([first, *range(10, 17)]) for first in rows}
    for first in (1, 2, 3):
        cache.store(keys[first], rows[first])
    assert cache.match(keys[1])[0] == 8  # now 2 is the least recently used
    cache.store(keys[4], rows[4])
    assert cache.nbytes <= cache.budget_bytes
    assert cache.match(keys[2])[0] == 0
    length, row = cache.match(np.array([1, 10, 11, 99]))
    assert (length, row) == (3, rows[1])


def test_a_longer_row_takes_the_place_of_its_prefixes() -> None:
    cache = PrefixCache(1 << 20)
    keys = np.arange(12)
    cache.store(keys[:5], stored_row(5))
    cache.store(keys[:9], stored_row(9))
    assert len(cache) == 1
    assert cache.covers(keys[:7])
    assert not cache.covers(keys)


def test_what_is_found_is_what_a_search_through_all_finds() -> None:
    draw = np.random.default_rng(0)
    cache, kept = PrefixCache(1 << 30), dict[bytes, np.ndarray]()
    for _ in range(400):
        keys = draw.integers(-2, 2, draw.integers(1, 12))
        longest = max((common_prefix(keys, other) for other in kept.values()), default=0)
        length, row = cache.match(keys)
        assert length == longest
        assert (row is None) == (length == 0)
        if length < len(keys):
            cache.store(keys, stored_row(len(keys)))
            for name in [n for n, o in kept.items() if common_prefix(keys, o) == len(o)]:
                del kept[name]
            kept[keys.tobytes()] = keys
        assert len(cache) == len(kept)
    cache.shrink(cache.nbytes // 2)
    assert 0 < len(cache) < len(kept)
    cache.shrink(-1)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_image_cache_is_bounded() -> None:
    cache = ImageCache(2 * 400)
    for name in range(3):
        cache.put([name], [mx.zeros((10, 10))])
        cache.get(0)
    assert cache.get(1) is None
    assert cache.get(0) is not None
    assert cache.nbytes <= 800
    cache.put([None], [mx.zeros((10, 10))])
    assert cache.get(None) is None


def test_common_prefix() -> None:
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4])) == 2
    assert common_prefix(np.array([1, 2]), np.array([1, 2, 4])) == 2
    assert common_prefix(np.array([9]), np.array([1])) == 0


@pytest.fixture(scope="module")
def idefics3() -> Iterator[Pipeline]:
    made = load(IDEFICS3, dtype="float32")
    yield made
    made.close()


@pytest.fixture
def pipe(idefics3: Pipeline) -> Pipeline:
    idefics3.engine.forget()
    idefics3.engine.scheduler.state.config = EngineConfig()
    return idefics3


def picture(name: str, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """Noise: no two parts of it, nor of two pictures, are alike."""
    numbers = np.random.default_rng(list(name.encode()))
    return Image.fromarray(numbers.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def ask(pipe: Pipeline, images: list[Any], text: str = "What is it?", **options: Any) -> Usage:
    return pipe.generate(text, images, max_tokens=2, **options).usage


def frames(pipe: Pipeline, image: Any) -> int:
    return len(pipe.encode("", [image]).images)


def test_a_chat_computes_only_what_is_new(pipe: Pipeline) -> None:
    image = picture("red")
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    ]
    first = pipe.generate(turns, [image], max_tokens=6)
    assert first.usage.images_encoded == frames(pipe, image)
    assert first.usage.cached_tokens == 0
    turns += [
        {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]},
        {"role": "user", "content": [{"type": "text", "text": "Are you sure about that?"}]},
    ]
    before = pipe.engine.stats
    second = pipe.generate(turns, [image], max_tokens=6)
    assert second.usage.images_encoded == 0
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - 1
    after = pipe.engine.stats
    computed = after.prefill_tokens - before.prefill_tokens
    assert computed == second.usage.prompt_tokens - second.usage.cached_tokens
    pipe.engine.forget()
    assert pipe.generate(turns, [image], max_tokens=6).tokens == second.tokens


def test_only_new_pictures_are_encoded(pipe: Pipeline) -> None:
    red, green, blue = (picture(c) for c in ("red", "green", "blue"))
    each = frames(pipe, red)
    assert ask(pipe, [red, green]).images_encoded == 2 * each
    assert ask(pipe, [green, red]).images_encoded == 0
    assert ask(pipe, [green, blue, red]).images_encoded == each
    assert ask(pipe, [blue]).images_encoded == 0
    assert ask(pipe, [red, red], "Twice?").images_encoded == 0
    pipe.engine.forget()
    assert ask(pipe, [red, red]).images_encoded == each  # the same picture twice is one


def test_requests_that_arrive_together_share_a_picture(pipe: Pipeline) -> None:
    red, green = picture("red"), picture("green")
    each = frames(pipe, red)
    requests: list[Any] = [
        {"prompt": "What is it?", "images": [red]},
        {"prompt": "Look:", "images": [green, red]},
        {"prompt": "And here?", "images": [green]},
    ]
    before = pipe.engine.stats.images_encoded
    results = pipe.generate_batch(requests, max_tokens=3)
    assert sum(r.usage.images_encoded for r in results) == 2 * each
    assert pipe.engine.stats.images_encoded - before == 2 * each
    pipe.engine.forget()
    for request, result in zip(requests, results, strict=True):
        assert (
            pipe.generate(request["prompt"], request["images"], max_tokens=3).tokens
            == result.tokens
        )


def test_an_overwritten_file_is_a_new_picture(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture("red").save(path)
    red = pipe.generate("What is it?", [path], max_tokens=4, logprobs=1)
    assert ask(pipe, [path]).images_encoded == 0
    picture("blue").save(path)
    blue = pipe.generate("What is it?", [path], max_tokens=4, logprobs=1)
    assert blue.usage.images_encoded > 0
    assert blue.logprobs != red.logprobs
    copy = tmp_path / "copy.png"
    shutil.copy(path, copy)
    assert ask(pipe, [copy]).images_encoded == 0  # the same picture under another name


@pytest.mark.parametrize("name", ["pixtral", "qwen25vl", "qwen3vl"])
def test_equal_bytes_of_another_size_are_another_picture(name: str) -> None:
    """Flat pictures, wide and high: their bytes, and their patches, are the same."""
    pipe = load(FIXTURES / name, dtype="float32")
    try:
        wide, high = (Image.new("RGB", size, (90, 90, 90)) for size in ((64, 32), (32, 64)))
        texts = [
            pipe.generate("What?", [image], max_tokens=6, logprobs=3) for image in (wide, high)
        ]
        assert wide.tobytes() == high.tobytes()
        hashes = [pipe.encode("What?", [image]).images[0].image_hash for image in (wide, high)]
        assert hashes[0] != hashes[1]
        assert texts[1].usage.images_encoded == 1
        pipe.engine.forget()
        again = pipe.generate("What?", [high], max_tokens=6, logprobs=3)
        assert again.tokens == texts[1].tokens
    finally:
        pipe.close()


def test_clips_of_other_speed_do_not_share_a_prefix() -> None:
    """The same frames at another rate have other positions (M-RoPE), so other keys."""
    pipe = load(FIXTURES / "qwen25vl", dtype="float32")
    try:
        clip = [picture(c, (56, 56)) for c in ("red", "red", "blue", "blue", "green", "green")]
        slow = pipe.generate("What?", videos=[clip], fps=0.25, max_tokens=4, logprobs=3)
        pipe.engine.forget()
        pipe.generate("What?", videos=[clip], fps=8.0, max_tokens=4)
        warm = pipe.generate("What?", videos=[clip], fps=0.25, max_tokens=4, logprobs=3)
        assert warm.tokens == slow.tokens
        assert slow.logprobs is not None
        assert warm.logprobs is not None
        for a, b in zip(slow.logprobs, warm.logprobs, strict=True):
            np.testing.assert_allclose(
                a.token_log_probabilities, b.token_log_probabilities, atol=1e-4
            )
    finally:
        pipe.close()


def test_pictures_are_still_answered_with_no_cache_at_all(pipe: Pipeline) -> None:
    images = [picture("red"), picture("green"), picture("blue")]
    expected = pipe.generate("What is it?", images, max_tokens=5).tokens
    state = pipe.engine.scheduler.state
    pipe.engine.forget()
    state.config = replace(state.config, enable_prefix_caching=False, prefill_chunk=16)
    state.images.budget_bytes, budget = 0, state.images.budget_bytes
    try:
        result = pipe.generate("What is it?", images, max_tokens=5)
        assert result.tokens == expected
        assert result.usage.images_encoded == sum(frames(pipe, i) for i in images)
    finally:
        state.images.budget_bytes = budget


def test_prefixes_stay_under_their_budget() -> None:
    pipe = load(LLAMA, dtype="float32")
    try:
        token = pipe.model.kv_params.bytes_per_token
        prefixes = pipe.engine.scheduler.state.prefixes
        prefixes.budget_bytes = 200 * token
        for i in range(10):
            pipe.generate(f"{i} different beginnings of prompts " * 2, max_tokens=4, raw=True)
            assert prefixes.nbytes <= prefixes.budget_bytes
        assert len(prefixes) >= 2
        assert pipe.generate("x" * 450, max_tokens=2, raw=True).usage.cached_tokens <= 1
        assert prefixes.nbytes <= prefixes.budget_bytes  # what is larger than all of it is not kept
    finally:
        pipe.close()


def test_n_answers_read_the_prompt_once(pipe: Pipeline) -> None:
    before = pipe.engine.stats
    results = pipe.generate_n(
        "Long? " * 30, 4, [picture("red")], temperature=1.0, seed=5, max_tokens=6
    )
    after = pipe.engine.stats
    prompt = results[0].usage.prompt_tokens
    assert after.prefill_tokens - before.prefill_tokens == prompt + 3
    assert [r.usage.cached_tokens for r in results] == [0, *[prompt - 1] * 3]
    assert sum(r.usage.images_encoded for r in results) == frames(pipe, picture("red"))
