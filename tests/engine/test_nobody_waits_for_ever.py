"""Whatever goes wrong, whoever waits for an answer hears of it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.engine.requests import Chunk, Handle
from mlx_vlm_pipes.errors import EngineClosed
from mlx_vlm_pipes.kv_cache import CacheRow, KVCache
from tests.engine.driving import LLAMA, Driven

PROMPTS = ["Hello", "What do you see in this picture?", "The quick brown fox. " * 5]
FORKED = """
import os, sys
from mlx_vlm_pipes import load
from mlx_vlm_pipes.errors import EngineClosed

pipe = load(sys.argv[1])
before = pipe.generate("Hello", max_tokens=4).tokens
handle = pipe.submit("Hello", max_tokens=4)
tries = [
    lambda: pipe.generate("Hello"), lambda: pipe.logits("Hello"), lambda: list(handle),
    lambda: pipe.plan("Hello"), lambda: load(sys.argv[1]),
]
child = os.fork()
if not child:
    said = 0
    for ask in tries:
        try:
            ask()
        except EngineClosed as error:
            said += "spawn" in str(error)
    pipe.close()
    os._exit(said)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == len(tries)
assert pipe.generate("Hello", max_tokens=4).tokens == before
assert [chunk.token for chunk in handle] == before
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_forked_process_is_told_at_once() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, str(LLAMA)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (run.stdout, run.returncode) == ("done\n", 0), run.stderr


@pytest.fixture(scope="module")
def driven() -> Driven:
    return Driven(LLAMA)


def failing(*args: Any, **more: Any) -> Any:
    del args, more
    raise MemoryError("no memory")


def unfreed(cache: KVCache) -> Callable[..., None]:
    """`release` that still makes rows ready for prefill, but frees none."""
    release = cache.release

    def only_staged(row: CacheRow, *, keep: bool = False) -> None:
        return release(row, keep=True) if keep else failing()

    return only_staged


def test_a_row_that_cannot_be_freed(driven: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished answer is given, the others are told, and new requests are answered."""
    driven.restart(driven.scheduler.state.config)
    alone = driven.generate(PROMPTS[0], max_tokens=6, ignore_eos=True)
    short = driven.submit(PROMPTS[0], max_tokens=6, ignore_eos=True)
    long = driven.submit(PROMPTS[1], max_tokens=60, ignore_eos=True)
    driven.step(3)
    waiting = [driven.submit(PROMPTS[2], max_tokens=20, ignore_eos=True) for _ in range(20)]
    with monkeypatch.context() as patch:
        cache = driven.scheduler.state.cache
        patch.setattr(cache, "release", unfreed(cache))
        driven.finish()
    assert driven.tokens(short) == alone
    with pytest.raises(MemoryError):
        driven.tokens(long)
    for handle in waiting:  # answered, or told
        try:
            assert len(driven.tokens(handle)) == 20
        except MemoryError:
            continue
    assert driven.generate(PROMPTS[0], max_tokens=6, ignore_eos=True) == alone


@pytest.mark.parametrize("count", [1, 3])
def test_a_row_that_cannot_be_freed_after_a_failure(
    driven: Driven, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    driven.restart(driven.scheduler.state.config)
    handles = [driven.submit(prompt, max_tokens=9) for prompt in PROMPTS[:count]]
    with monkeypatch.context() as patch:
        cache = driven.scheduler.state.cache
        patch.setattr(cache, "release", unfreed(cache))
        patch.setattr(driven.model, "execute", lambda inputs: 1 / 0)
        driven.finish()
    for handle in handles:
        with pytest.raises((ZeroDivisionError, MemoryError)):
            driven.tokens(handle)


def test_a_prefix_that_cannot_be_kept_loses_no_answer(
    driven: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven.restart(driven.scheduler.state.config)
    alone = driven.generate(PROMPTS[2], max_tokens=6, ignore_eos=True)
    for place in ("copy_row", "store"):
        driven.restart(driven.scheduler.state.config)
        state = driven.scheduler.state
        owner: object = state.cache if place == "copy_row" else state.prefixes
        monkeypatch.setattr(owner, place, failing)
        with pytest.warns(RuntimeWarning, match="a prefix is not cached: no memory"):
            assert driven.generate(PROMPTS[2], max_tokens=6, ignore_eos=True) == alone
        assert not state.cache.placed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_step_that_ends_the_thread_ends_every_wait() -> None:
    pipe = load(LLAMA)
    pipe.generate("Hello", max_tokens=2)
    pipe.engine.worker.idle_work = lambda: sys.exit(3)
    handle = pipe.submit("Hello", max_tokens=40)
    with pytest.raises(EngineClosed):
        list(handle)
    with pytest.raises(EngineClosed):
        pipe.generate("Hello")
    pipe.close()


def in_threads(count: int, work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)


def test_threads_share_one_handle() -> None:
    pipe = load(LLAMA)
    try:
        alone = pipe.generate("Hello", max_tokens=40, ignore_eos=True).tokens
        handle = pipe.submit("Hello", max_tokens=40, ignore_eos=True)
        found: list[int] = []
        in_threads(3, lambda: found.extend(c.token for c in handle if c.token is not None))
        assert sorted(found) == sorted(alone)
    finally:
        pipe.close()


def test_an_error_reaches_every_reader_of_a_handle() -> None:
    handle, told = Handle(), []

    def read() -> None:
        try:
            list(handle)
        except ValueError as error:
            told.append(str(error))

    handle.put(Chunk("a"))
    threading.Timer(0.2, lambda: handle.put(ValueError("broken"))).start()
    in_threads(3, read)
    assert told == ["broken"] * 3


def test_tasks_share_one_handle() -> None:
    handle = Handle()

    async def read() -> list[str]:
        return [chunk.text async for chunk in handle]

    async def everything() -> list[list[str]]:
        tasks = [asyncio.create_task(read()) for _ in range(3)]
        await asyncio.sleep(0.05)
        for text in "abc":
            handle.put(Chunk(text))
        handle.put(None)
        return await asyncio.wait_for(asyncio.gather(*tasks), timeout=10)

    parts = asyncio.run(everything())
    assert sorted(text for part in parts for text in part) == ["a", "b", "c"]
