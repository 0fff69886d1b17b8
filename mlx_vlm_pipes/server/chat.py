"""/v1/chat/completions: OpenAI's chat, in its own words, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.server.answers import Answers, Question
from mlx_vlm_pipes.server.errors import bad_request
from mlx_vlm_pipes.server.events import event
from mlx_vlm_pipes.server.fields import MAX_N, count, option_values, refuse_unknown, switch
from mlx_vlm_pipes.server.media import allowed_messages
from mlx_vlm_pipes.server.settings import ServerSettings
from mlx_vlm_pipes.server.told import Told, chat_logprobs, timings_of, usage_of

PROMPT = "messages"
KNOWN = frozenset({
    "messages", "model", "stream", "stream_options", "n", "logprobs", "top_logprobs",
    "response_format", "tool_choice",
})  # fmt: skip
READING = ("fps", "num_frames", "min_pixels", "max_pixels")  # options of how a prompt is read
MAX_TOP = 20


@dataclass(frozen=True)
class Form:
    """How an answer is to be told. top: rivals of each token, None for no scores at all."""

    stream: bool
    with_usage: bool
    n: int
    top: int | None


def read_chat(body: Mapping[str, Any], settings: ServerSettings) -> tuple[Question, Form]:
    """Raises: ApiError 400 naming the parameter that is wrong."""
    refuse_unknown(body, KNOWN)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages is no list of messages", PROMPT)
    _refuse_formats(body)
    form = Form(
        switch(body, "stream"),
        wants_usage(body),
        count(body, "n", low=1, high=MAX_N) or 1,
        _top(body),
    )
    options = option_values(body)
    reading = {name: options.pop(name) for name in READING if name in options}
    if form.top is not None:
        options["logprobs"] = max(form.top, 1)
    question = Question(
        lambda: [allowed_messages(messages, settings, PROMPT)], options, reading, form.n
    )
    return question, form


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


def _refuse_formats(body: Mapping[str, Any]) -> None:
    """Raises: ApiError 400 for an answer in a form that this server does not enforce."""
    format = body.get("response_format")
    if format is not None and (not isinstance(format, Mapping) or format.get("type") != "text"):
        raise bad_request(
            "response_format: this server gives plain text only, no schemas", "response_format"
        )
    if body.get("tool_choice") not in (None, "none", "auto"):
        raise bad_request("tool_choice: this server calls no tools", "tool_choice")


@dataclass
class ChatAnswer:
    """The objects of one answer to a client."""

    model: str
    form: Form
    tokenizer: Tokenizer
    prefix: str = "chatcmpl-"

    def __post_init__(self) -> None:
        self._id, self._created = self.prefix + uuid.uuid4().hex, int(time.time())
        self.told = [Told() for _ in range(self.form.n)]

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """A chat.completion object."""
        async for index, chunk in answers.pieces():
            self.told[index].add(chunk)
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": told.text, "refusal": None},
                    "logprobs": self._scores(told.scores),
                    "finish_reason": told.reason,
                }
                for index, told in enumerate(self.told)
            ],
            "usage": usage_of(self.told, self.form.n),
            "timings": timings_of(self.told),
        }

    async def streamed(self, answers: Answers) -> AsyncIterator[bytes]:
        """chat.completion.chunk events, without the closing [DONE]."""
        for index in range(self.form.n):
            yield self._chunk(index, {"role": "assistant", "content": None})
        async for index, chunk in answers.pieces():
            text = self.told[index].add(chunk)
            scores = [] if chunk.logprobs is None else [chunk.logprobs]
            if text or scores:
                yield self._chunk(index, {"content": text}, self._scores(scores))
            if chunk.finish_reason is not None:
                yield self._chunk(index, {}, None, chunk.finish_reason)
        if self.form.with_usage:
            yield event({
                **self._head("chat.completion.chunk"),
                "choices": [],
                "usage": usage_of(self.told, self.form.n),
                "timings": timings_of(self.told),
            })  # fmt: skip

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.form.with_usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _scores(self, scores: list[Any]) -> dict[str, Any] | None:
        if self.form.top is None or not scores:
            return None
        return chat_logprobs(scores, self.form.top, self.tokenizer)
