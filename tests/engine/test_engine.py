"""The engine from outside: any thread, sync and async, closing, and what outlives what."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from itertools import islice

import pytest

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.dtypes import default_device
from mlx_vlm_pipes.engine.requests import Handle
from mlx_vlm_pipes.engine.worker import OwnerThread
from mlx_vlm_pipes.errors import EngineClosed
from mlx_vlm_pipes.pipeline import collect
from tests.engine.driving import LLAMA

PROMPTS = [f"Number {i} " * (1 + i % 4) for i in range(12)]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    made = load(LLAMA, dtype="float32")
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> list[list[int]]:
    return [pipe.generate(p, max_tokens=10, ignore_eos=True).tokens for p in PROMPTS]


def test_many_threads(pipe: Pipeline, alone: list[list[int]]) -> None:
    found: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        found[i] = pipe.generate(PROMPTS[i], max_tokens=10, ignore_eos=True).tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[i] for i in range(len(PROMPTS))] == alone


def test_async_iterators_together(pipe: Pipeline, alone: list[list[int]]) -> None:
    async def read(handle: Handle) -> list[int | None]:
        return [chunk.token async for chunk in handle]

    async def everything() -> list[list[int | None]]:
        handles = [pipe.submit(p, max_tokens=10, ignore_eos=True) for p in PROMPTS]
        return await asyncio.gather(*(read(h) for h in handles))

    assert asyncio.run(everything()) == alone


def test_leaving_an_async_iterator_cancels(pipe: Pipeline) -> None:
    async def few() -> Handle:
        handle = pipe.submit("Hello", max_tokens=400, ignore_eos=True)
        chunks = handle.__aiter__()
        for _ in range(3):
            await anext(chunks)
        await chunks.aclose()  # pyright: ignore[reportAttributeAccessIssue]  # an async generator
        return handle

    assert asyncio.run(few()).is_closed
    idle(pipe)


def test_an_error_is_raised_where_the_request_is_awaited(pipe: Pipeline) -> None:
    handle = Handle()
    handle.put(ValueError("broken"))

    async def read() -> None:
        async for _ in handle:
            pass

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(read())
    assert list(handle) == []


def idle(pipe: Pipeline) -> None:
    """Wait until nothing runs; fails if something never ends."""
    for _ in range(200):
        if not pipe.engine.worker.call(lambda: pipe.engine.scheduler.is_busy):
            assert not pipe.engine.scheduler.state.cache.placed
            return
        threading.Event().wait(0.02)
    raise AssertionError("still busy")


@pytest.mark.parametrize("read", [0, 3])
def test_dropping_a_stream_cancels(pipe: Pipeline, read: int) -> None:
    stream = pipe.stream("Hello", max_tokens=400, ignore_eos=True)
    assert len(list(islice(stream, read))) == read
    before = pipe.engine.stats.decode_steps
    del stream
    idle(pipe)
    assert pipe.engine.stats.decode_steps - before < 200


def test_a_stream_outlives_the_name_of_its_pipeline() -> None:
    stream = load(LLAMA).stream("Hello", max_tokens=30, ignore_eos=True)
    gc.collect()
    assert len([chunk for chunk in stream if chunk.token is not None]) == 30


def test_closing_ends_every_wait() -> None:
    pipe = load(LLAMA)
    stream = pipe.stream("Hello", max_tokens=400, ignore_eos=True)
    next(stream)
    waiting = pipe.submit("Hello", max_tokens=400, ignore_eos=True)
    pipe.close()
    with pytest.raises(EngineClosed):
        list(stream)
    with pytest.raises(EngineClosed):
        collect(waiting)
    with pytest.raises(EngineClosed):
        pipe.generate("Hello")


def test_a_dropped_pipeline_ends_its_thread() -> None:
    pipe = load(LLAMA)
    pipe.generate("Hello", max_tokens=2)
    thread, engine = pipe.engine.worker._thread, weakref.ref(pipe.engine)
    del pipe
    gc.collect()
    thread.join(timeout=5)
    assert engine() is None
    assert not thread.is_alive()


def test_calls_that_are_queued_when_the_thread_ends_fail() -> None:
    worker, hold = OwnerThread(default_device()), threading.Event()
    worker.post(hold.wait)
    queued = worker.post(lambda: 1)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    while not worker._stopping:
        pass
    hold.set()
    stopper.join(timeout=5)
    # taken before or after the stop: either way nobody waits for ever
    assert queued.exception(timeout=5) is None or isinstance(queued.exception(), EngineClosed)


def test_logits_do_not_disturb_what_runs(pipe: Pipeline, alone: list[list[int]]) -> None:
    stream = pipe.stream(PROMPTS[3], max_tokens=10, ignore_eos=True)
    tokens = [next(stream).token for _ in range(4)]
    pipe.logits(PROMPTS[5])
    assert tokens + [chunk.token for chunk in stream] == alone[3]
