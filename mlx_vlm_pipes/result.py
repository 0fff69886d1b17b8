"""A finished answer, and how one is read from a handle."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_vlm_pipes.engine.requests import Chunk, Handle, Timings, Usage
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import LogProbabilities
from mlx_vlm_pipes.media.records import MediaRecord


@dataclass(frozen=True)
class GenerationResult:
    """A finished answer. finish_reason: "stop" or "length"; tokens include the end token.

    media: what the model saw, one record for each picture and clip, in the order of the prompt.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: list[LogProbabilities] | None = None
    prompt_logprobs: LogProbabilities | None = None
    media: tuple[MediaRecord, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.text


def collect(handle: Handle) -> GenerationResult:
    """Read a handle to its end. Raises: whatever the request failed with."""
    texts, tokens, scores = [], [], []
    last: Chunk | None = None
    for chunk in handle:
        texts.append(chunk.text)
        if chunk.token is not None:
            tokens.append(chunk.token)
        if chunk.logprobs is not None:
            scores.append(chunk.logprobs)
        last = chunk
    if last is None or last.usage is None or last.timings is None:
        raise InputError("the request was cancelled before it ended")
    return GenerationResult(
        text="".join(texts),
        tokens=tokens,
        finish_reason=last.finish_reason or "stop",
        usage=last.usage,
        timings=last.timings,
        logprobs=scores or None,
        prompt_logprobs=last.prompt_logprobs,
        media=handle.media,
    )
