"""/v1/chat/completions: OpenAI's chat, in its own words, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.grammar import SOURCES
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.server.answers import Answers, Question
from mlx_vlm_pipes.server.errors import ApiError, bad_request
from mlx_vlm_pipes.server.events import event
from mlx_vlm_pipes.server.fields import (
    MAX_N,
    Given,
    count,
    option_values,
    refuse_unknown,
    switch,
)
from mlx_vlm_pipes.server.forms import FORM_PARAMS, read_form
from mlx_vlm_pipes.server.media import allowed_messages
from mlx_vlm_pipes.server.placed import Placed
from mlx_vlm_pipes.server.settings import ServerSettings
from mlx_vlm_pipes.server.thinking import add_effort
from mlx_vlm_pipes.server.told import (
    Score,
    Told,
    chat_logprobs,
    scores_of,
    timings_of,
    usage_of,
)
from mlx_vlm_pipes.server.tools import Manner, forced_calls, manner, read_tools
from mlx_vlm_pipes.speech import Kind, Piece

PROMPT = "messages"
KNOWN = frozenset({
    "messages", "model", "stream", "stream_options", "n", "logprobs", "top_logprobs",
    "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort", *FORM_PARAMS,
})  # fmt: skip
# options of how a prompt is read
READING = ("chat_template_kwargs", "fps", "num_frames", "min_pixels", "max_pixels")
MAX_TOP = 20


@dataclass(frozen=True)
class Telling:
    """How an answer is to be told. n: how many there are; top: rivals of each token, None for no
    scores at all; manner: how its text is taken apart."""

    stream: bool
    manner: Manner
    with_usage: bool = False
    n: int = 1
    top: int | None = None

    def begun(self, answers: Answers) -> list[Told]:
        """The answers to the first prompt, of which nothing has come yet."""
        prompt, places = answers.prompts[0], answers.handles[0].places
        return [
            Told(self.manner.speech(prompt.text), places=Placed(places, answers.calls))
            for _ in range(self.n)
        ]


def read_chat(
    body: Mapping[str, Any], tokenizer: Tokenizer, settings: ServerSettings
) -> tuple[Question, Telling]:
    """Raises: ApiError 400 naming the parameter that is wrong."""
    refuse_unknown(body, KNOWN)
    tools = read_tools(body)
    telling = Telling(
        switch(body, "stream"),
        manner(tokenizer, tools),
        wants_usage(body),
        count(body, "n", low=1, high=MAX_N) or 1,
        _top(body),
    )
    given = option_values(body)
    read_form(body, given)
    add_effort(given, body.get("reasoning_effort"), "reasoning_effort", tokenizer)
    forced = forced_calls(body, tools, tokenizer)
    chat = Chat(body.get("messages"), PROMPT, tools, forced)
    return chat_question(chat, given, telling, settings), telling


@dataclass(frozen=True)
class Chat:
    """A chat in OpenAI's form. param: what the request calls its messages; forced: the grammar of
    an answer that must call one of the tools."""

    messages: Any
    param: str
    tools: list[dict[str, Any]]
    forced: str | None


def chat_question(chat: Chat, given: Given, telling: Telling, settings: ServerSettings) -> Question:
    """Raises: ApiError 400 for messages that are no list, and for two forms of the answer."""
    messages, options = chat.messages, dict(given.values)
    if not isinstance(messages, list) or not messages:
        raise bad_request(f"{chat.param} is no list of messages", chat.param)
    if chat.forced is not None:
        if any(name in options for name in SOURCES):
            raise bad_request("tool_choice: an answer is a call or a form, not both", "tool_choice")
        options["grammar"] = chat.forced
    reading = {name: options.pop(name) for name in READING if name in options}
    if chat.tools:
        reading["tools"] = chat.tools
    if telling.top is not None:
        options["logprobs"] = max(telling.top, 1)
    return Question(
        lambda: [allowed_messages(messages, settings, chat.param)],
        options,
        reading,
        telling.n,
        telling.manner.calls.tokens if telling.manner.calls is not None else (),
        {"prompt": chat.param, "grammar": "tool_choice", **given.params},
    )


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream ends with a chunk of its usage."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, Mapping) or not options.keys() <= {
        "include_usage", "include_obfuscation"
    }:  # fmt: skip
        raise bad_request(
            'stream_options is no object with "include_usage" in it', "stream_options"
        )
    if not body.get("stream"):
        raise bad_request("stream_options without stream has no meaning", "stream_options")
    return switch(options, "include_usage")


def _top(body: Mapping[str, Any]) -> int | None:
    top = count(body, "top_logprobs", low=0, high=MAX_TOP)
    if switch(body, "logprobs"):
        return top or 0
    if top is not None:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    return None


@dataclass
class ChatAnswer:
    """The objects of one answer to a client."""

    model: str
    telling: Telling
    tokenizer: Tokenizer
    prefix: str = "chatcmpl-"

    def __post_init__(self) -> None:
        self._id, self._created = self.prefix + uuid.uuid4().hex, int(time.time())
        self.told: list[Told] = []

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """A chat.completion object."""
        self.told = self.telling.begun(answers)
        async for index, chunk in answers.pieces():
            self.told[index].add(chunk)
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(index, told) for index, told in enumerate(self.told)],
            "usage": usage_of(self.told, self.telling.n),
            "timings": timings_of(self.told),
        }

    async def streamed(self, answers: Answers) -> AsyncIterator[bytes]:
        """chat.completion.chunk events and [DONE]."""
        self.told = self.telling.begun(answers)
        for index in range(self.telling.n):
            yield self._chunk(index, {"role": "assistant", "content": None})
        async for index, chunk in answers.pieces():
            told = self.told[index]
            deltas = [self._delta(told, piece) for piece in told.add(chunk)]
            scores = self._scores(scores_of(chunk))
            if scores is not None and not deltas:
                deltas = [{"content": ""}]  # a token without text of its own has a score too
            for i, delta in enumerate(deltas):
                yield self._chunk(index, delta, scores if i == 0 else None)
            if chunk.finish_reason is not None:
                yield self._chunk(index, {}, None, told.openai_reason)
        if self.telling.with_usage:
            yield event({
                **self._head("chat.completion.chunk"),
                "choices": [],
                "usage": usage_of(self.told, self.telling.n),
                "timings": timings_of(self.told),
            })  # fmt: skip
        yield event("[DONE]")

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that breaks: no [DONE] behind it."""
        return event(error.body())

    def _choice(self, index: int, told: Told) -> dict[str, Any]:
        message = {"role": "assistant", "content": told.text, "refusal": None}
        if told.reasoning:
            message["reasoning_content"] = told.reasoning
        if told.calls:
            message["tool_calls"] = [call.as_dict() for call in told.calls]
            message["content"] = told.text or None
        return {
            "index": index,
            "message": message,
            "logprobs": self._scores(told.scores),
            "finish_reason": told.openai_reason,
        }

    def _delta(self, told: Told, piece: Piece) -> dict[str, Any]:
        if piece.kind is Kind.TEXT:
            return {"content": piece.text}
        if piece.kind is Kind.REASONING:
            return {"reasoning_content": piece.text}
        if piece.kind is Kind.ARGUMENTS:
            part = {"index": piece.call, "function": {"arguments": piece.text}}
            return {"tool_calls": [part]}
        begun = {"name": piece.text, "arguments": ""}
        call = {"id": told.calls[piece.call].id, "type": "function", "function": begun}
        return {"tool_calls": [{"index": piece.call, **call}]}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.telling.with_usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _scores(self, scores: list[Score]) -> dict[str, Any] | None:
        if self.telling.top is None or not scores:
            return None
        return chat_logprobs(scores, self.telling.top, self.tokenizer)
