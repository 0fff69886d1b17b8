"""What is told of answers in every dialect of OpenAI's: texts, reasons, usage, timings, scores."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_vlm_pipes.engine.requests import Chunk, Timings, Usage
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.server.placed import Placed
from mlx_vlm_pipes.speech import Kind, Piece, Speech


@dataclass
class Call:
    """A call of a tool. arguments: a JSON text, as far as it has come."""

    id: str
    name: str
    arguments: str = ""

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's tool call."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Score:
    """Of a token: its log probability, and the best tokens with theirs, the best first."""

    token: int
    value: float
    best: list[tuple[int, float]]


@dataclass
class Told:
    """One answer as far as it has come.

    speech: what takes its text apart. is_trimmed: leave out spaces before its first word, which
    some models write in every chat, in streams and in whole answers alike. places: takes marked
    numbers to pixels of the picture. calls: ids, names and JSON texts of the arguments.
    """

    speech: Speech = field(default_factory=Speech)
    is_trimmed: bool = True
    places: Placed | None = None
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    stop: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    scores: list[Score] = field(default_factory=list)

    def add(self, chunk: Chunk) -> list[Piece]:
        """Take a chunk in. Returns: what it adds."""
        is_first = self.is_trimmed and not self.text
        pieces = self.speech.add(chunk.text)
        if chunk.finish_reason is not None:
            pieces += self.speech.finish()
        if self.places is not None:
            pieces = self.places.add(pieces, is_last=chunk.finish_reason is not None)
        if is_first:
            pieces = _trimmed(pieces)
        for piece in pieces:
            self._take(piece)
        self.scores += scores_of(chunk)
        if chunk.finish_reason is not None:
            self.reason, self.stop = chunk.finish_reason, chunk.stop
            self.usage, self.timings = chunk.usage, chunk.timings
        return pieces

    @property
    def openai_reason(self) -> str | None:
        """finish_reason of a chat: "stop", "length", or "tool_calls" where it ended with some."""
        return "tool_calls" if self.calls and self.reason == "stop" else self.reason

    def _take(self, piece: Piece) -> None:
        if piece.kind is Kind.TEXT:
            self.text += piece.text
        elif piece.kind is Kind.REASONING:
            self.reasoning += piece.text
        elif piece.kind is Kind.CALL:
            self.calls.append(Call(f"call_{uuid.uuid4().hex[:24]}", piece.text))
        else:
            self.calls[piece.call].arguments += piece.text


def _trimmed(pieces: list[Piece]) -> list[Piece]:
    """Without the space before the first word of the text."""
    out, is_begun = [], False
    for piece in pieces:
        if piece.kind is Kind.TEXT and not is_begun:
            piece = replace(piece, text=piece.text.lstrip())
            is_begun = bool(piece.text)
        if piece.text:
            out.append(piece)
    return out


def usage_of(answers: Iterable[Told], n: int) -> dict[str, Any]:
    """OpenAI's usage object; the prompt of n answers counts once."""
    used = [answer.usage for answer in answers if answer.usage is not None]
    prompts = used[::n]
    prompt, completion = (
        sum(usage.prompt_tokens for usage in prompts),
        sum(usage.completion_tokens for usage in used),
    )
    kept = sum(usage.accepted_tokens for usage in used)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(usage.cached_tokens for usage in prompts),
            "image_tokens": sum(usage.image_tokens for usage in prompts),
        },
        "completion_tokens_details": {
            "accepted_prediction_tokens": kept,
            "rejected_prediction_tokens": sum(usage.drafted_tokens for usage in used) - kept,
        },
    }


def timings_of(answers: Iterable[Told]) -> dict[str, float]:
    """Seconds (ours): the longest of each kind among the answers."""
    found = [answer.timings for answer in answers if answer.timings is not None]
    return {
        "queued_s": max((t.queued_s for t in found), default=0.0),
        "prompt_s": max((t.prompt_s for t in found), default=0.0),
        "generation_s": max((t.generation_s for t in found), default=0.0),
    }


def scores_of(chunk: Chunk) -> list[Score]:
    """Of the chunk's token, where scores were asked for."""
    if chunk.token is None or chunk.logprobs is None:
        return []
    values = chunk.logprobs
    best = list(values.top_log_probabilities[0].items())
    return [Score(chunk.token, values.token_log_probabilities[0], best)]


def chat_logprobs(scores: Iterable[Score], top: int, of: Tokenizer) -> dict[str, Any]:
    """OpenAI's logprobs object of a chat's choice: each token with its `top` best rivals."""
    content = []
    for score in scores:
        best = [_token(token, value, of) for token, value in score.best[:top]]
        content.append({**_token(score.token, score.value, of), "top_logprobs": best})
    return {"content": content, "refusal": None}


def text_logprobs(scores: Iterable[Score], top: int, of: Tokenizer, offset: int) -> dict[str, Any]:
    """OpenAI's older form, of /v1/completions. offset: where in the text the first token begins."""
    tokens, values, tops, offsets = [], [], [], []
    for score in scores:
        text = _text(score.token, of)
        tokens.append(text)
        values.append(score.value)
        tops.append({_text(t, of): v for t, v in score.best[:top]})
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets
    }  # fmt: skip


def _token(token: int, value: float, of: Tokenizer) -> dict[str, Any]:
    text = _text(token, of)
    whole = "\ufffd" not in text  # part of a character has no text of its own
    return {
        "token": text,
        "logprob": max(value, -9999.0),  # JSON knows no minus infinity
        "bytes": list(text.encode()) if whole else None,
    }


def _text(token: int, of: Tokenizer) -> str:
    return of.decode([token], skip_special_tokens=False)
