"""A question on its way through the engine, whatever dialect it was asked in."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio.to_thread
from starlette.requests import Request

from mlx_vlm_pipes.engine.requests import Chunk, Handle
from mlx_vlm_pipes.errors import ContextTooLong
from mlx_vlm_pipes.media.places import Places
from mlx_vlm_pipes.pipeline import Pipeline, Prompt
from mlx_vlm_pipes.processing.messages import part_kind
from mlx_vlm_pipes.processing.types import ProcessedPrompt
from mlx_vlm_pipes.server.events import disconnected
from mlx_vlm_pipes.server.placed import marked_tools
from mlx_vlm_pipes.server.settings import ServerSettings

T = TypeVar("T")
# Prompts with pictures that are read at once: more would make all of a burst as late as its last.
_READERS = threading.BoundedSemaphore(os.cpu_count() or 1)


@dataclass(frozen=True)
class Question:
    """What a request asks for: n answers to each prompt. `prompts` makes them, off the event loop:
    it reads files and hosts. params: what the request calls its options, and the prompt itself."""

    prompts: Callable[[], Sequence[Prompt]]
    options: dict[str, Any]
    reading: dict[str, Any]
    n: int = 1
    keep_tokens: tuple[str, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Answers:
    """The handles of a question, in order: all answers to the first prompt, then the next.

    prompts: as they were read, one for each. calls: places in the arguments of calls, by function.
    """

    prompts: list[ProcessedPrompt] = field(default_factory=list)
    handles: list[Handle] = field(default_factory=list)
    calls: Mapping[str, Places] = field(default_factory=dict)
    is_closed: bool = False

    def add(self, prompt: ProcessedPrompt, handles: list[Handle]) -> None:
        """On the thread that reads the prompts, which goes on where its caller was cancelled."""
        self.prompts.append(prompt)
        self.handles += handles
        if self.is_closed:  # set before the handles are looked at, and read after they are there
            self.close()

    async def pieces(self) -> AsyncIterator[tuple[int, Chunk]]:
        """The chunks of all, as they come, each with the number of its answer.

        Raises: what the first that fails fails with. Ending it early cancels all.
        """
        if len(self.handles) == 1:  # no task and no queue between the engine and the client
            async with aclosing(aiter(self.handles[0])) as chunks:  # pyright: ignore[reportArgumentType]
                async for chunk in chunks:
                    yield 0, chunk
            return
        arrived: asyncio.Queue[tuple[int, Chunk | None, Exception | None]] = asyncio.Queue()
        readers = [
            asyncio.create_task(_read(i, handle, arrived)) for i, handle in enumerate(self.handles)
        ]
        left = len(readers)
        try:
            while left:
                index, chunk, error = await arrived.get()
                if error is not None:
                    raise error
                if chunk is None:
                    left -= 1
                else:
                    yield index, chunk
        finally:
            self.close()
            for reader in readers:
                reader.cancel()

    def close(self) -> None:
        self.is_closed = True
        for handle in self.handles:
            handle.close()


async def ask(pipe: Pipeline, question: Question, settings: ServerSettings) -> Answers:
    """Read a question's prompts and queue its requests, in a thread.

    Raises: InputError and ApiError. Nothing stays queued where it raises or is cancelled.
    """
    answers = Answers()
    try:
        await anyio.to_thread.run_sync(_submit, pipe, question, settings, answers)
    except BaseException:
        answers.close()
        raise
    return answers


def _submit(pipe: Pipeline, question: Question, settings: ServerSettings, answers: Answers) -> None:
    for prompt, options in prepared(pipe, question, settings, lambda: not answers.is_closed):
        if answers.is_closed:
            return
        kept = question.keep_tokens
        answers.calls = marked_tools(question.reading.get("tools", ()), prompt.media)
        answers.add(prompt, pipe.submit_n(prompt, question.n, keep_tokens=kept, **options))


def prepared(
    pipe: Pipeline,
    question: Question,
    settings: ServerSettings,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[ProcessedPrompt, dict[str, Any]]]:
    """Each prompt as the engine takes it, with the options of its answers; no more of them once
    they are not wanted.

    Raises: InputError and ApiError; ContextTooLong where no answer has room.
    """
    for prompt in question.prompts():
        with _READERS if _has_pictures(prompt) else nullcontext():
            if not is_wanted():
                return
            processed = pipe.encode(prompt, local_files=False, **question.reading)
        room = pipe.max_seq_len - len(processed.input_ids)
        if room < 1:
            raise ContextTooLong(
                f"{len(processed.input_ids)} prompt tokens leave no room for an answer; this "
                f"model holds {pipe.max_seq_len}; shorten the prompt"
            )
        yield processed, {"max_tokens": min(settings.max_tokens, room), **question.options}


def _has_pictures(prompt: Prompt) -> bool:
    if isinstance(prompt, (str, ProcessedPrompt)):
        return False
    contents = [each.get("content") for each in prompt if isinstance(each, Mapping)]
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(part_kind(part) != "text" for part in parts)


async def _read(index: int, handle: Handle, arrived: asyncio.Queue[Any]) -> None:
    try:
        async with aclosing(aiter(handle)) as chunks:  # pyright: ignore[reportArgumentType]
            async for chunk in chunks:
                arrived.put_nowait((index, chunk, None))
    except Exception as error:  # handed to whoever reads the pieces
        arrived.put_nowait((index, None, error))
    else:
        arrived.put_nowait((index, None, None))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of the work, or None where the client has gone meanwhile: it is cancelled then."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
