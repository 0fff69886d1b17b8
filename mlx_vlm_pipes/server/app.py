"""The routes of a server, and what all of them share: who may ask, how many, and how it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_vlm_pipes.errors import clip
from mlx_vlm_pipes.media.records import MediaRecord
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.processing.types import ProcessedPrompt
from mlx_vlm_pipes.server.answers import Answers, Question, ask, prepared, unless_gone
from mlx_vlm_pipes.server.body import read_object
from mlx_vlm_pipes.server.chat import ChatAnswer, read_chat
from mlx_vlm_pipes.server.completions import TextAnswer, read_completion
from mlx_vlm_pipes.server.errors import ApiError, api_error
from mlx_vlm_pipes.server.events import EventStream
from mlx_vlm_pipes.server.gate import BEARER, PASSWORD, Gate
from mlx_vlm_pipes.server.messages import MessageAnswer, error_body, read_messages, read_prompt
from mlx_vlm_pipes.server.metrics import Metrics
from mlx_vlm_pipes.server.models import Model, Models
from mlx_vlm_pipes.server.page import page
from mlx_vlm_pipes.server.responses import ResponseAnswer, Store, read_response
from mlx_vlm_pipes.server.settings import ServerSettings
from mlx_vlm_pipes.server.told import Told

_LOG = logging.getLogger("mlx_vlm_pipes.server")
CLIENT_GONE = 499  # nobody reads it; it stands in the counters
Handler = Callable[["Server", Request], Awaitable[Response]]


class Answer(Protocol):
    """How a dialect tells the answers to a question."""

    told: list[Told]

    async def whole(self, answers: Answers) -> dict[str, Any]: ...

    def streamed(self, answers: Answers) -> AsyncIterator[bytes]: ...

    def failed(self, error: ApiError) -> bytes: ...


@dataclass(frozen=True)
class Asked:
    """A request that was read: what to ask the engine, and how to tell the answer."""

    pipe: Pipeline
    question: Question
    answer: Answer
    stream: bool


Read = Callable[[dict[str, Any], Model, Pipeline], Asked]


class Server:
    """Models behind HTTP. `app` is the ASGI application."""

    def __init__(self, models: Models, settings: ServerSettings, *, is_local: bool = True) -> None:
        self.models, self.settings = models, settings
        self.gate = Gate(settings, is_local=is_local)
        self.metrics = Metrics(models, self.gate)
        self.store = Store()
        self.app = Starlette(
            routes=[
                Route("/", self._guarded(_page, PASSWORD)),
                Route("/health", self._open(_health)),
                Route("/health/live", self._open(_live)),
                Route("/metrics", self._guarded(_metrics)),
                Route("/v1/models", self._guarded(_list_models)),
                Route("/v1/models/{name:path}", self._guarded(_one_model)),
                Route("/v1/chat/completions", self._guarded(_chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(_completion), methods=["POST"]),
                Route("/v1/messages", self._guarded(_messages), methods=["POST"]),
                Route("/v1/messages/count_tokens", self._guarded(_count), methods=["POST"]),
                Route("/v1/responses", self._guarded(_respond), methods=["POST"]),
                Route("/v1/responses/{name}", self._guarded(_kept), methods=["GET", "DELETE"]),
                Route("/v1/plan", self._guarded(_plan), methods=["POST"]),
            ],
            exception_handlers={HTTPException: self._no_route},
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False  # it would lead to whatever host a client names

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        idle = asyncio.create_task(self._unload_idle())
        try:
            yield
        finally:
            idle.cancel()
            await anyio.to_thread.run_sync(self.models.close)

    async def _unload_idle(self) -> None:
        """Look every second, where the server is to unload what nobody asks for."""
        while self.settings.idle_unload_s is not None:
            await asyncio.sleep(min(1.0, self.settings.idle_unload_s))
            await anyio.to_thread.run_sync(self.models.unload_idle, self.settings.idle_unload_s)

    def _open(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await handler(self, request)

        return answer

    def _guarded(
        self, handler: Handler, challenge: str = BEARER
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler behind the key, with every failure as OpenAI's error object. challenge: how
        a caller without one is asked for it."""

        async def answer(request: Request) -> Response:
            try:
                self.gate.check_caller(request.headers, challenge)
                response = await handler(self, request)
            except Exception as error:
                response = error_response(error, request.url.path)
            self.metrics.count_request(request.scope["route"].path, response.status_code)
            return response

        return answer

    async def _no_route(self, request: Request, error: Exception) -> Response:
        """For a path or method that there is not; told to those only who may ask."""
        assert isinstance(error, HTTPException)
        path, method = request.url.path, request.method
        messages = {404: f"no such path: {path[:100]}", 405: f"{clip(method)} is not for it"}
        try:
            self.gate.check_caller(request.headers, BEARER)
        except ApiError as refused:
            return error_response(refused, path)
        told = messages.get(error.status_code, str(error.detail))
        refusal = ApiError(error.status_code, told, code="not_found", headers=error.headers or {})
        return error_response(refusal, path)

    async def opened(self, name: object, place: ExitStack) -> tuple[Model, Pipeline]:
        """A model by its name, loaded if it is not, and held for as long as the place is."""
        model = self.models.find(name)
        self.models.require_started(model)
        place.enter_context(model.held())
        pipe = model.pipe or await anyio.to_thread.run_sync(self.models.load, model)
        self.gate.rows = max(self.gate.rows, pipe.engine.config.max_batch_size)
        return model, pipe

    async def respond(self, request: Request, read: Read) -> Response:
        """Read, ask and tell. A place is taken before the first byte of the body is awaited, and
        given back when the answer is out or nobody wants it any more."""
        with ExitStack() as place:
            place.enter_context(self.gate.admitted())
            body = await read_object(request, self.settings)
            asked = read(body, *await self.opened(body.get("model"), place))
            if asked.stream:
                answers = await unless_gone(request, self._ask(asked))
                if answers is None:
                    return Response(status_code=CLIENT_GONE)
                ending = place.pop_all()
                ending.callback(self._count, asked)
                ending.callback(answers.close)
                events = self._events(asked, answers)
                return EventStream(events, ending.close)
            told = await unless_gone(request, self._whole(asked))
            return Response(status_code=CLIENT_GONE) if told is None else JSONResponse(told)

    async def _ask(self, asked: Asked) -> Answers:
        try:
            return await ask(asked.pipe, asked.question, self.settings)
        except Exception as error:
            raise api_error(error, asked.question.params) from error

    async def _whole(self, asked: Asked) -> dict[str, Any]:
        answers = await self._ask(asked)
        try:
            told = await asked.answer.whole(answers)
        except Exception as error:
            raise api_error(error, asked.question.params) from error
        finally:
            answers.close()
        self._count(asked)
        return told

    async def _events(self, asked: Asked, answers: Answers) -> AsyncIterator[bytes]:
        """The dialect's events; a failure is the last one."""
        try:
            async with aclosing(asked.answer.streamed(answers)) as events:  # pyright: ignore[reportArgumentType]
                async for part in events:
                    yield part
        except Exception as error:
            yield asked.answer.failed(_refusal(error, asked.question.params))

    def _count(self, asked: Asked) -> None:
        self.metrics.count_answers(asked.answer.told, asked.question.n)


async def _chat(server: Server, request: Request) -> Response:
    def read(body: dict[str, Any], model: Model, pipe: Pipeline) -> Asked:
        question, telling = read_chat(body, pipe.tokenizer, server.settings)
        answer = ChatAnswer(model.name, telling, pipe.tokenizer)
        return Asked(pipe, question, answer, telling.stream)

    return await server.respond(request, read)


async def _completion(server: Server, request: Request) -> Response:
    def read(body: dict[str, Any], model: Model, pipe: Pipeline) -> Asked:
        question, telling, echoed = read_completion(body)
        answer = TextAnswer(model.name, telling, pipe.tokenizer, echoed, question.n)
        return Asked(pipe, question, answer, telling.stream)

    return await server.respond(request, read)


async def _messages(server: Server, request: Request) -> Response:
    def read(body: dict[str, Any], model: Model, pipe: Pipeline) -> Asked:
        question, telling = read_messages(body, pipe.tokenizer, server.settings)
        answer = MessageAnswer(model.name, telling, tuple(body.get("stop_sequences") or ()))
        return Asked(pipe, question, answer, telling.stream)

    return await server.respond(request, read)


async def _respond(server: Server, request: Request) -> Response:
    def read(body: dict[str, Any], model: Model, pipe: Pipeline) -> Asked:
        asked = read_response(body, server.store, pipe.tokenizer, server.settings)
        question, telling, messages = asked
        answer = ResponseAnswer(model.name, telling, body, messages, server.store)
        return Asked(pipe, question, answer, telling.stream)

    return await server.respond(request, read)


async def _kept(server: Server, request: Request) -> Response:
    """A response that is kept, or the end of it."""
    name = request.path_params["name"]
    kept = server.store.response(name)
    if request.method == "GET":
        return JSONResponse(kept)
    server.store.forget(name)
    return JSONResponse({"id": name, "object": "response.deleted", "deleted": True})


async def _count(server: Server, request: Request) -> Response:
    """Anthropic's count_tokens."""

    def read(body: dict[str, Any], tokenizer: Tokenizer) -> Question:
        return read_prompt(body, tokenizer, server.settings)[0]

    def count(pipe: Pipeline, prompt: ProcessedPrompt, options: dict[str, Any]) -> dict[str, Any]:
        return {"input_tokens": len(prompt.input_ids)}

    return await _told_before(server, request, read, count)


async def _plan(server: Server, request: Request) -> Response:
    """The body is that of a chat: tokens and memory before it runs."""

    def read(body: dict[str, Any], tokenizer: Tokenizer) -> Question:
        return read_chat(body, tokenizer, server.settings)[0]

    def plan(pipe: Pipeline, prompt: ProcessedPrompt, options: dict[str, Any]) -> dict[str, Any]:
        media = [_seen(record) for record in prompt.media]
        return {**pipe.plan(prompt, **options).as_dict(), "media": media}

    return await _told_before(server, request, read, plan)


def _seen(record: MediaRecord) -> dict[str, Any]:
    """What is told of a picture or clip. Sizes are (width, height) in pixels."""
    tiles = record.tiles
    return {
        "kind": record.kind,
        "source_size": record.source_size,
        "resized_size": record.resized_size,
        "tiles": {
            "rows": tiles.rows,
            "columns": tiles.columns,
            "size": tiles.size,
            "overview": tiles.overview,
        },
        "num_frames": record.num_frames,
        "tokens": record.num_tokens,
    }


async def _told_before(
    server: Server,
    request: Request,
    read: Callable[[dict[str, Any], Tokenizer], Question],
    tell: Callable[[Pipeline, ProcessedPrompt, dict[str, Any]], dict[str, Any]],
) -> Response:
    """What can be told of a question without running it."""
    with ExitStack() as place:
        place.enter_context(server.gate.admitted())
        body = await read_object(request, server.settings)
        _, pipe = await server.opened(body.get("model"), place)
        question = read(body, pipe.tokenizer)

        def told() -> dict[str, Any]:
            ((prompt, options),) = prepared(pipe, question, server.settings)
            return tell(pipe, prompt, options)

        try:
            return JSONResponse(await anyio.to_thread.run_sync(told))
        except Exception as error:
            raise api_error(error, question.params) from error


async def _list_models(server: Server, request: Request) -> Response:
    models = [model.describe() for model in server.models.all()]
    return JSONResponse({"object": "list", "data": models})


async def _one_model(server: Server, request: Request) -> Response:
    return JSONResponse(server.models.find(request.path_params["name"]).describe())


async def _metrics(server: Server, request: Request) -> Response:
    text = await anyio.to_thread.run_sync(server.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _page(server: Server, request: Request) -> Response:
    return page()


async def _live(server: Server, request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _health(server: Server, request: Request) -> Response:
    """200 where a chat would be answered now, 503 with a word where not."""
    first = server.models.first
    status = "ok"
    if server.gate.is_draining:
        status = "draining"
    elif first.failure is not None:
        status = "failed"
    elif server.models.is_starting:
        status = "loading"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


def error_response(error: Exception, path: str) -> Response:
    refusal = _refusal(error)
    body = error_body(refusal) if path.startswith("/v1/messages") else refusal.body()
    return JSONResponse(body, refusal.status, dict(refusal.headers))


def _refusal(error: Exception, params: Mapping[str, str] | None = None) -> ApiError:
    """What a client is told; a fault of ours goes to the log, not to the client."""
    try:
        return api_error(error, params)
    except Exception:
        _LOG.exception("a request failed")
        return ApiError(500, "the server failed; its log says how", code="internal_error")


async def drain(server: Server) -> None:
    """Let nobody in any more, and wait until those inside have got their answers. What then still
    runs fails: a stream ends with an error."""
    server.gate.is_draining = True
    loop = asyncio.get_running_loop()
    end = loop.time() + server.settings.timeout_s
    while server.gate.inside and loop.time() < end:
        await asyncio.sleep(0.05)
    await anyio.to_thread.run_sync(server.models.close)
