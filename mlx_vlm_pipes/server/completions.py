"""/v1/completions: texts continued as they stand, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.server.answers import Answers, Question
from mlx_vlm_pipes.server.chat import Telling, wants_usage
from mlx_vlm_pipes.server.errors import ApiError, bad_request
from mlx_vlm_pipes.server.events import event
from mlx_vlm_pipes.server.fields import MAX_N, count, option_values, refuse_unknown, switch
from mlx_vlm_pipes.server.told import (
    Score,
    Told,
    scores_of,
    text_logprobs,
    timings_of,
    usage_of,
)
from mlx_vlm_pipes.server.tools import Manner

PROMPT = "prompt"
KNOWN = frozenset({"prompt", "model", "stream", "stream_options", "n", "logprobs", "echo"})
MAX_PROMPTS = 128
MAX_TOP = 5


def read_completion(body: Mapping[str, Any]) -> tuple[Question, Telling, list[str]]:
    """The question, how it is told (n counts the answers to all prompts) and what stands before
    each.

    Raises: ApiError 400 naming the parameter that is wrong.
    """
    refuse_unknown(body, KNOWN)
    given = body.get("prompt")
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise bad_request("prompt is no text and no list of texts", PROMPT)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise bad_request(f"prompt holds {len(prompts)} texts, expected 1 to {MAX_PROMPTS}", PROMPT)
    n = count(body, "n", low=1, high=MAX_N) or 1
    if n * len(prompts) > MAX_N:
        raise bad_request(f"n: {n * len(prompts)} answers, expected at most {MAX_N} in all", "n")
    top = count(body, "logprobs", low=0, high=MAX_TOP)
    is_echoed = switch(body, "echo")
    if is_echoed and top is not None:  # who scores prompts would take their silence for zeros
        raise bad_request("echo with logprobs: a prompt has none here; leave one out", "echo")
    given = option_values(body)
    if top is not None:
        given.values["logprobs"] = max(top, 1)
    telling = Telling(switch(body, "stream"), Manner(), wants_usage(body), n * len(prompts), top)
    echoed = [text if is_echoed else "" for text in prompts for _ in range(n)]
    params = {"prompt": PROMPT, **given.params}
    question = Question(lambda: prompts, given.values, {"raw": True}, n, params=params)
    return question, telling, echoed


@dataclass
class TextAnswer:
    """The objects of one answer to a client. per_prompt: answers to each prompt."""

    model: str
    telling: Telling
    tokenizer: Tokenizer
    echoed: list[str]
    per_prompt: int

    def __post_init__(self) -> None:
        self._id, self._created = "cmpl-" + uuid.uuid4().hex, int(time.time())
        self.told = [Told(is_trimmed=False) for _ in range(self.telling.n)]
        self._offsets = [len(text) for text in self.echoed]  # where the next token's text begins

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """A text_completion object."""
        async for index, chunk in answers.pieces():
            self.told[index].add(chunk)
        choices = [
            self._choice(i, self.echoed[i] + told.text, told.scores, told.reason)
            for i, told in enumerate(self.told)
        ]
        return {**self._head(), "choices": choices, **self._figures()}

    async def streamed(self, answers: Answers) -> AsyncIterator[bytes]:
        """text_completion events and [DONE]."""
        for index, text in enumerate(self.echoed):
            if text:
                yield self._event([self._choice(index, text, [], None)])
        async for index, chunk in answers.pieces():
            text = "".join(piece.text for piece in self.told[index].add(chunk))
            scores = scores_of(chunk)
            if text or scores or chunk.finish_reason:
                yield self._event([self._choice(index, text, scores, chunk.finish_reason)])
        if self.telling.with_usage:
            yield event({**self._head(), "choices": [], **self._figures()})
        yield event("[DONE]")

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that breaks: no [DONE] behind it."""
        return event(error.body())

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        usage = {"usage": None} if self.telling.with_usage else {}
        return event({**self._head(), "choices": choices, **usage})

    def _choice(
        self, index: int, text: str, scores: list[Score], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.telling.top is not None and scores:
            offset = self._offsets[index]
            logprobs = text_logprobs(scores, self.telling.top, self.tokenizer, offset)
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _figures(self) -> dict[str, Any]:
        usage = usage_of(self.told, self.per_prompt)
        return {"usage": usage, "timings": timings_of(self.told)}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id, "object": "text_completion", "created": self._created,
            "model": self.model,
        }  # fmt: skip
