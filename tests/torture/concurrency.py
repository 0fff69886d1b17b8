"""Threads that submit, iterate, cancel, share and close as they like: all answers are those alone.

Nobody waits for ever, and nothing runs on when all have gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mlx_vlm_pipes import GenerationResult, Pipeline, load
from mlx_vlm_pipes.errors import EngineClosed, PipesError
from mlx_vlm_pipes.pipeline import collect
from tests.fixtures_helper import FIXTURES
from tests.torture.drawing import (
    FAMILIES,
    PipelineSection,
    Request,
    configure,
    difference,
    draw_limits,
    draw_request,
    same_logits,
)
from tests.torture.section import Broken, Case, require

WAIT_S = 60.0  # for all threads of a case
LONG = "The quick brown fox jumps over the lazy dog. " * 12


class Section(PipelineSection):
    @property
    def whole(self) -> int:
        return 150

    def draw(self, index: int) -> Case:
        rng, family = self.rng(index), FAMILIES[index % len(FAMILIES)]
        kind = rng.choices(["crowd", "closing", "fork"], [8, 3, 1])[0]
        if kind == "fork":
            return Case(f"{family}: a fork while it runs", lambda: self._fork(family, rng))
        count = rng.choice([2, 4, 8, 16])
        if kind == "closing":
            about = f"{family}: {count} threads, closed meanwhile"
            return Case(about, lambda: self._closing(family, count, rng))
        limits = draw_limits(rng)
        if limits["prefill_chunk"] < 16:  # for so many, a token a step takes minutes
            limits |= {"prefill_chunk": 16, "running_chunk": 64}
        about = f"{family}: {count} threads, {limits}"
        return Case(about, lambda: self._crowd(family, count, limits, rng))

    def _crowd(self, family: str, count: int, limits: dict[str, Any], rng: random.Random) -> None:
        pipe = self._pipes.get(family)
        jobs = _jobs(pipe, family, rng)
        configure(pipe, **limits)
        seeds = [rng.random() for _ in range(count)]
        _in_threads([lambda seed=seed: _busy(pipe, jobs, random.Random(seed)) for seed in seeds])
        _idle(pipe)

    def _closing(self, family: str, count: int, rng: random.Random) -> None:
        """Each thread gets right answers, and then EngineClosed."""
        pipe = load(FIXTURES / family, dtype="float32")
        jobs = _jobs(pipe, family, rng)
        delay, seeds = rng.random() * 0.3, [rng.random() for _ in range(count)]

        def work(seed: float) -> None:
            with contextlib.suppress(EngineClosed):
                for _ in range(1000):
                    _busy(pipe, jobs, random.Random(seed))

        def end() -> None:
            time.sleep(delay)
            pipe.close()

        closers = [end] * rng.choice([1, 1, 3])
        _in_threads([*(lambda seed=seed: work(seed) for seed in seeds), *closers])
        _after_the_end(pipe)

    def _fork(self, family: str, rng: random.Random) -> None:
        """The child is told at once, and the parent does not notice."""
        pipe = self._pipes.get(family)
        jobs = _jobs(pipe, family, rng)
        handle = pipe.submit(**jobs[0][0])
        time.sleep(rng.random() * 0.05)
        child = os.fork()
        if not child:
            said = 0
            asks: list[Callable[[], object]] = [
                lambda: pipe.generate("x"), lambda: pipe.logits("x"), lambda: list(handle),
                lambda: load(FIXTURES / family), lambda: pipe.generate_batch(["x"]),
            ]  # fmt: skip
            for ask in asks:
                with contextlib.suppress(BaseException):
                    try:
                        ask()
                    except EngineClosed as error:
                        said += "spawn" in str(error)
            os._exit(said)
        status = _ended(child)
        require(status == 5, f"the forked process ended with {status}, expected 5 refusals")
        _equal(collect(handle), jobs[0][1], jobs[0][0])


Job = tuple[Request, GenerationResult, Any]


def _jobs(pipe: Pipeline, family: str, rng: random.Random) -> list[Job]:
    """Requests with what each answers alone, and the logits of its prompt."""
    configure(pipe, enable_prefix_caching=False)
    requests = [draw_request(rng, family, longest=30) for _ in range(3)]
    requests.append({"prompt": LONG, "max_tokens": 3, "logprobs": 3})
    return [(r, pipe.generate(**r), pipe.logits(**_reading(r))) for r in requests]


def _reading(request: Request) -> Request:
    return {name: request[name] for name in ("prompt", "images", "videos") if name in request}


def _busy(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    """A few things that a user may do, one after the other."""
    for _ in range(rng.randint(1, 4)):
        rng.choice(DEEDS)(pipe, jobs, rng)


Deed = Callable[[Pipeline, list[Job], random.Random], object]


def _generate(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    request, alone, _ = rng.choice(jobs)
    _equal(pipe.generate(**request), alone, request)


def _stream(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    request, alone, _ = rng.choice(jobs)
    found = [chunk.token for chunk in pipe.stream(**request) if chunk.token is not None]
    require(len(found) == len(alone.tokens), f"{len(found)} tokens streamed")


def _leave(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    handle = pipe.submit(**{**rng.choice(jobs)[0], "max_tokens": 50})
    for _ in range(rng.randint(0, 3)):
        handle.next_chunk()
    handle.close()


def _drop(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    next(iter(pipe.stream(**rng.choice(jobs)[0])))


def _batch(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    some = rng.choices(jobs, k=3)
    answers = pipe.generate_batch([request for request, *_ in some])
    for answer, (request, alone, _) in zip(answers, some, strict=True):
        _equal(answer, alone, request)


def _logits(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    request, _, logits = rng.choice(jobs)
    same_logits(pipe.logits(**_reading(request)), logits)


def _shared(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    """Two threads read one handle: each chunk goes to one of them."""
    request, alone, _ = rng.choice(jobs)
    handle, found = pipe.submit(**request), []
    _in_threads([lambda: found.extend(c.token for c in handle if c.token is not None)] * 2)
    require(len(found) == len(alone.tokens), f"{len(found)} tokens between two readers")


def _several(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    request, alone, _ = rng.choice(jobs)
    _equal(pipe.generate_n(n=2, **request)[0], alone, request)


def _await(pipe: Pipeline, jobs: list[Job], rng: random.Random) -> None:
    request, alone, _ = rng.choice(jobs)
    asyncio.run(_awaited(pipe, request, alone))


DEEDS: list[Deed] = [
    _generate, _stream, _leave, _drop, _batch, _logits, _shared, _several, _await,
    lambda pipe, jobs, rng: pipe.plan(**rng.choice(jobs)[0]),
    lambda pipe, jobs, rng: _wrong(pipe),
    lambda pipe, jobs, rng: pipe.engine.forget(),
]  # fmt: skip


async def _awaited(pipe: Pipeline, request: Request, alone: GenerationResult) -> None:
    async def read() -> list[int | None]:
        return [chunk.token async for chunk in pipe.submit(**request)]

    lost = asyncio.create_task(read())
    answers = await asyncio.wait_for(asyncio.gather(read(), read()), timeout=WAIT_S)
    lost.cancel()
    for tokens in answers:
        require(len(tokens) == len(alone.tokens), f"{len(tokens)} tokens awaited")


def _wrong(pipe: Pipeline) -> None:
    for options in ({"max_tokens": 10**9}, {"top_p": 5}, {"images": [b"x"]}, {"adapter": "x"}):
        try:
            pipe.generate("Hello", **options)
        except EngineClosed:
            raise
        except PipesError:
            continue
        raise Broken(f"{options} was taken")


def _equal(answer: GenerationResult, alone: GenerationResult, request: Request) -> None:
    apart = difference(answer, alone)
    require(not apart, f"{request['prompt'][:40]!r}: {apart}")


def _idle(pipe: Pipeline) -> None:
    """Raises: Broken if something runs on, though nobody waits for it."""
    ends = time.monotonic() + 10
    while pipe.engine.scheduler.is_busy or pipe.engine.scheduler.state.cache.placed:
        require(time.monotonic() < ends, "something runs on when all have gone")
        time.sleep(0.01)


def _after_the_end(pipe: Pipeline) -> None:
    for ask in (lambda: pipe.generate("x"), lambda: pipe.logits("x"), lambda: pipe.submit("x")):
        try:
            ask()
        except EngineClosed:
            continue
        raise Broken("a closed pipeline answers")
    pipe.close()


def _in_threads(works: list[Callable[[], object]]) -> None:
    """Raises: what the first of them raised, Broken if one does not end."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + WAIT_S
    for thread in threads:
        thread.join(timeout=max(0.0, ends - time.monotonic()))
    if errors:
        raise errors[0]
    require(not any(thread.is_alive() for thread in threads), "a thread waits for ever")


def _ended(child: int) -> int:
    """The exit status of a forked process. Raises: Broken if it hangs."""
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise Broken(f"the forked process hangs on {sys.platform}")
