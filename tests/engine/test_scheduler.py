"""Scheduling, driven one step at a time on this thread."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import TokenBuffer
from mlx_vlm_pipes.engine.requests import Handle
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.errors import InputError, OutOfBudget
from mlx_vlm_pipes.kv_cache import Layer, row_bucket
from mlx_vlm_pipes.kv_cache.groups import Move
from tests.engine.driving import IDEFICS3, LLAMA, Driven, fixture_requests
from tests.fixtures_helper import FIXTURES

PROMPTS = ["Hello", "What do you see in this picture?", "The quick brown fox. " * 5]


@pytest.fixture(scope="module")
def llama() -> Driven:
    return Driven(LLAMA)


@pytest.fixture(scope="module")
def idefics3() -> Driven:
    return Driven(IDEFICS3)


@pytest.fixture
def fresh(llama: Driven) -> Driven:
    llama.restart(EngineConfig(enable_prefix_caching=False))
    return llama


def pictures(driven: Driven) -> list[tuple[Any, list[str]]]:
    return [(r["prompt"], r["images"]) for r in fixture_requests(IDEFICS3).values() if r["images"]]


def test_requests_join_and_leave_between_steps(fresh: Driven) -> None:
    alone = [
        fresh.generate(p, max_tokens=n, ignore_eos=True)
        for p, n in zip(PROMPTS, (4, 30, 12), strict=True)
    ]
    long = fresh.submit(PROMPTS[1], max_tokens=30, ignore_eos=True)
    fresh.step(6)
    short = fresh.submit(PROMPTS[0], max_tokens=4, ignore_eos=True)
    fresh.step(2)
    assert [job.handle for job in fresh.scheduler.running] == [long, short]
    late = fresh.submit(PROMPTS[2], max_tokens=12, ignore_eos=True)
    fresh.step(6)
    assert [job.handle for job in fresh.scheduler.running] == [long, late]
    fresh.finish()
    assert [fresh.tokens(h) for h in (short, long, late)] == alone
    assert fresh.scheduler.state.cache.slots == 0


def test_prompts_of_one_token_share_a_slice(fresh: Driven) -> None:
    def submit(token: int) -> Handle:
        context = fresh.context("a", max_tokens=6, ignore_eos=True)
        context.tokens = TokenBuffer(np.array([token]))
        return fresh.scheduler.submit(context, fresh.processor.tokenizer.stream_decoder())

    alone = []
    for token in (40, 41, 42):
        handle = submit(token)
        fresh.finish()
        alone.append(fresh.tokens(handle))
    handles = [submit(token) for token in (40, 41, 42)]
    fresh.finish()
    assert [fresh.tokens(h) for h in handles] == alone


def test_a_cancelled_request_frees_its_row_within_two_steps(fresh: Driven) -> None:
    handles = [fresh.submit(p, max_tokens=50, ignore_eos=True) for p in PROMPTS]
    fresh.step(5)
    assert len(fresh.scheduler.state.cache.placed) == 3
    chunks = iter(handles[0])
    next(chunks)
    chunks.close()
    fresh.step(2)
    assert len(fresh.scheduler.state.cache.placed) == 2
    del chunks
    unread = iter(handles[1])
    unread.close()  # before its first chunk
    fresh.step(2)
    assert len(fresh.scheduler.state.cache.placed) == 1
    fresh.finish()
    assert len(fresh.tokens(handles[2])) == 50


def test_cancelled_while_waiting_or_in_prefill(fresh: Driven) -> None:
    fresh.restart(EngineConfig(prefill_chunk=8, max_batch_size=1, enable_prefix_caching=False))
    handles = [fresh.submit(PROMPTS[2], max_tokens=5) for _ in range(3)]
    fresh.step(2)
    assert len(fresh.scheduler.prefilling) == 1
    assert len(fresh.scheduler.waiting) == 2
    handles[0].close()
    handles[2].close()
    fresh.step(2)
    assert [job.handle for job in fresh.scheduler.prefilling] == [handles[1]]
    assert not fresh.scheduler.waiting
    fresh.finish()
    assert len(fresh.tokens(handles[1])) == 5


def test_what_does_not_fit_waits_and_what_never_can_is_refused(fresh: Driven) -> None:
    row = 128 * fresh.model.kv_params.bytes_per_token
    fresh.restart(EngineConfig(kv_bytes=2 * row, enable_prefix_caching=False))
    handles = [fresh.submit(PROMPTS[1], max_tokens=60, ignore_eos=True) for _ in range(5)]
    rows = set()
    while fresh.step():
        cache = fresh.scheduler.state.cache
        assert cache.nbytes <= 2 * row
        rows.add(len(cache.placed))
    assert max(rows) == 2
    assert len({tuple(fresh.tokens(h)) for h in handles}) == 1
    with pytest.raises(
        OutOfBudget,
        match=r"MB of KV cache for 4\d\d tokens, the engine may use .* MB, enough for \d+;",
    ):
        fresh.submit(PROMPTS[1], max_tokens=400)


def test_a_short_row_beside_a_long_one_counts_at_the_long_ones_capacity(fresh: Driven) -> None:
    token = fresh.model.kv_params.bytes_per_token
    fresh.restart(EngineConfig(kv_bytes=512 * token, enable_prefix_caching=False))
    long = fresh.submit(PROMPTS[1], max_tokens=300, ignore_eos=True)  # 384 tokens of capacity
    short = fresh.submit(
        PROMPTS[0], max_tokens=4, ignore_eos=True
    )  # 64, but 384 beside the long one
    while fresh.step():
        assert fresh.scheduler.state.cache.nbytes <= 512 * token
    assert (len(fresh.tokens(long)), len(fresh.tokens(short))) == (300, 4)


def test_one_trace_for_each_bucket(llama: Driven) -> None:
    driven = Driven(LLAMA, EngineConfig(enable_prefix_caching=False))
    for count in (1, 3, 4, 2, 5, 3):
        handles = [driven.submit(p, max_tokens=40, ignore_eos=True) for p in (PROMPTS * 2)[:count]]
        driven.finish()
        assert all(len(driven.tokens(h)) == 40 for h in handles)
    stats = driven.scheduler.stats
    assert 4 <= stats.traces <= stats.buckets <= 4 * 3  # rows 1, 2, 3, 4; capacities 64, 128, 192
    before = stats.traces
    driven.generate(PROMPTS[0], max_tokens=40)
    assert driven.scheduler.stats.traces == before


def test_running_requests_wait_for_a_bounded_slice(idefics3: Driven) -> None:
    idefics3.restart(
        EngineConfig(running_chunk=16, image_batch=2, enable_prefix_caching=False, image_bytes=0)
    )
    runs = idefics3.submit("Hello", max_tokens=200, ignore_eos=True)
    idefics3.step(3)
    for prompt, images in pictures(idefics3):
        idefics3.submit(prompt, images, max_tokens=2)
    tokens = []
    while idefics3.scheduler.prefilling or idefics3.scheduler.waiting:
        before = idefics3.scheduler.stats.decode_steps
        idefics3.step()
        tokens.append(idefics3.scheduler.stats.decode_steps - before)
    assert min(tokens) == 1  # a token after every slice
    stats = idefics3.scheduler.stats
    assert stats.largest_slice_tokens == 16
    assert stats.largest_slice_images == 2
    assert 0 < stats.longest_slice_s < 10
    runs.close()
    idefics3.finish()


def break_sampler(driven: Driven, handle: Handle) -> None:
    """The request's sampler raises at its third token."""
    job = next(job for job in driven.scheduler.waiting if job.handle is handle)

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        if job.sampler.steps == 2:
            raise ValueError("this sampler is broken")
        return logits

    job.sampler.processors = (processor,)


def test_a_sampler_that_raises_fails_its_request_only(fresh: Driven) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "temperature": 1.0}
    alone = [fresh.generate(p, seed=i, **options) for i, p in enumerate(PROMPTS)]
    handles = [fresh.submit(p, seed=i, **options) for i, p in enumerate(PROMPTS)]
    bad = fresh.submit("Hello", **options)
    break_sampler(fresh, bad)
    after = fresh.submit("Hello", seed=0, **options)
    fresh.finish()
    with pytest.raises(ValueError, match="this sampler is broken"):
        list(bad)
    assert [fresh.tokens(h) for h in handles] == alone
    assert fresh.tokens(after) == alone[0]


def test_a_job_without_a_row_is_an_error(fresh: Driven) -> None:
    fresh.restart(EngineConfig(prefill_chunk=2, enable_prefix_caching=False))
    handle = fresh.submit(PROMPTS[0])
    fresh.step()
    (job,) = fresh.scheduler.prefilling
    job.held = None  # dropped from the list, it would lend its tokens to its neighbour's row
    fresh.finish()
    with pytest.raises(RuntimeError, match="without a cache row"):
        list(handle)


def test_a_picture_that_cannot_be_encoded_fails_its_request_only(
    idefics3: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = pictures(idefics3)
    idefics3.restart(EngineConfig(enable_prefix_caching=False))
    alone = [idefics3.generate(p, images, max_tokens=4) for p, images in requests]
    idefics3.restart(EngineConfig(enable_prefix_caching=False))
    poison = idefics3.context(*requests[1]).images[0].image_hash  # pyright: ignore[reportAttributeAccessIssue]  # a vision context
    encode = idefics3.model.encode_images

    def failing(images: Any) -> Any:
        if any(image.image_hash == poison for image in images):
            raise ValueError("a bad picture")
        return encode(images)

    monkeypatch.setattr(idefics3.model, "encode_images", failing)
    handles = [idefics3.submit(p, images, max_tokens=4) for p, images in requests]
    idefics3.finish()
    with pytest.raises(ValueError, match="a bad picture"):
        list(handles[1])
    assert idefics3.tokens(handles[0]) == alone[0]
    assert idefics3.tokens(handles[2]) == alone[2]


def test_a_failing_prefill_is_traced_to_its_request(
    fresh: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.restart(EngineConfig(prefill_chunk=20, enable_prefix_caching=False))
    alone = [fresh.generate(p, max_tokens=4) for p in PROMPTS]
    prepare = fresh.model.prepare_initial_token_inputs

    def failing(batches: Any, *args: Any, **more: Any) -> Any:
        if any(len(c.tokens) == len(bad) and c.tokens.generated_length == 0 for c in batches[0]):
            raise ValueError("a bad prompt")
        return prepare(batches, *args, **more)

    bad = fresh.context(PROMPTS[1]).tokens
    monkeypatch.setattr(fresh.model, "prepare_initial_token_inputs", failing)
    handles = [fresh.submit(p, max_tokens=4) for p in PROMPTS]
    fresh.finish()
    with pytest.raises(ValueError, match="a bad prompt"):
        list(handles[1])
    assert [fresh.tokens(handles[0]), fresh.tokens(handles[2])] == [alone[0], alone[2]]


def test_a_failing_decode_step_ends_what_ran_and_nothing_after(
    fresh: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = fresh.generate(PROMPTS[0], max_tokens=6, ignore_eos=True)
    running = [fresh.submit(p, max_tokens=50) for p in PROMPTS]
    fresh.step(3)
    with monkeypatch.context() as patch:
        patch.setattr(fresh.model, "execute", lambda inputs: 1 / 0)
        fresh.step()
    for handle in running:
        with pytest.raises(ZeroDivisionError):
            list(handle)
    assert not fresh.scheduler.is_busy
    assert fresh.generate(PROMPTS[0], max_tokens=6, ignore_eos=True) == alone


def test_bad_values_are_refused_at_once(fresh: Driven) -> None:
    for options in (
        {"temperature": -1.0}, {"temperature": "hot"}, {"top_p": 0.0}, {"top_k": 0}, {"min_p": 2.0},
        {"max_tokens": 0}, {"min_tokens": -1}, {"seed": "x"}, {"logit_bias": {10**6: 1.0}},
        {"repetition_penalty": 0.0}, {"temperature": float("nan")},
    ):  # fmt: skip
        with pytest.raises(InputError):
            fresh.submit("Hello", **options)
    assert not fresh.scheduler.is_busy
    with pytest.raises(InputError, match="image_batch is 0"):
        EngineConfig(image_batch=0)


def test_rows_keep_their_slots_when_others_leave(
    fresh: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (30, 5, 30, 30)
    handles = [fresh.submit(PROMPTS[0], max_tokens=n, ignore_eos=True) for n in lengths]
    fresh.step(4)
    moved: list[int] = []
    cache = fresh.scheduler.state.cache
    layer = Move.layer

    def spy(self: Move, *given: Any) -> Layer:
        moved.append(len(self.rows))
        return layer(self, *given)

    monkeypatch.setattr(Move, "layer", spy)
    sizes = set()
    while fresh.step():
        sizes |= set(cache.shapes)
    assert not moved  # the last row moved into the gap; nothing else was copied
    assert sizes == {(4, 64)}
    assert [len(fresh.tokens(h)) for h in handles] == list(lengths)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (3, 3), (9, 10), (17, 20), (65, 80)])
def test_row_buckets(rows: int, bucket: int) -> None:
    assert row_bucket(rows) == bucket


@pytest.fixture(scope="module")
def phi3() -> Driven:
    return Driven(FIXTURES / "phi3-longrope")


def test_longrope_rows_that_cross_are_recomputed_beside_others(phi3: Driven) -> None:
    edge = phi3.model.cache_break_length
    assert edge == 20
    phi3.restart(EngineConfig(enable_prefix_caching=False))
    prompts = ["Hi", "Hello there", "What is it? " * 6]
    assert len(phi3.context(prompts[0]).tokens) < edge < len(phi3.context(prompts[2]).tokens)
    alone = [phi3.generate(p, max_tokens=40, ignore_eos=True) for p in prompts]
    # one whole prefill over everything must agree with what was decoded across the edge
    ids = np.concatenate([phi3.context(prompts[0]).tokens.all, alone[0][:-1]])
    context = phi3.context(prompts[0])
    context.tokens = TokenBuffer(ids)
    again = phi3.scheduler.submit(context, phi3.processor.tokenizer.stream_decoder())
    phi3.finish()
    assert phi3.tokens(again)[0] == alone[0][-1]
    handles = [phi3.submit(p, max_tokens=40, ignore_eos=True) for p in prompts]
    phi3.finish()
    assert [phi3.tokens(h) for h in handles] == alone
    phi3.restart(EngineConfig(prefill_chunk=1, running_chunk=1, enable_prefix_caching=False))
    handles = [phi3.submit(p, max_tokens=40, ignore_eos=True) for p in prompts]
    phi3.finish()
    assert [phi3.tokens(h) for h in handles] == alone
