"""A finished answer, and how one is read from a handle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_vlm_pipes.display.boxes import Box, given_boxes, written_boxes
from mlx_vlm_pipes.display.view import View, shown_answer
from mlx_vlm_pipes.engine.requests import Chunk, Handle, Timings, Usage, figures_line
from mlx_vlm_pipes.errors import InputError, clip
from mlx_vlm_pipes.interfaces import LogProbabilities
from mlx_vlm_pipes.media.places import Places
from mlx_vlm_pipes.media.records import MediaRecord
from mlx_vlm_pipes.progress import Waiting, bar, noted
from mlx_vlm_pipes.speech import THOUGHT


@dataclass(frozen=True)
class GenerationResult:
    """A finished answer. finish_reason: "stop" or "length"; tokens include the end token.

    media: what the model saw, one record for each picture and clip, in the order of the prompt.
    places: what the answer's schema says of places in them.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: list[LogProbabilities] | None = None
    prompt_logprobs: LogProbabilities | None = None
    media: tuple[MediaRecord, ...] = field(default=(), repr=False)
    places: Places | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        seen = f", {len(self.media)} media" if self.media else ""
        told = f"{len(self.tokens)} tokens, {self.finish_reason}{seen}"
        return f"GenerationResult({self.text!r}, {told})"

    @property
    def parsed(self) -> Any:
        """The JSON of the answer, behind its reasoning, as Python's values.

        Places that the schema marks with `"x-coordinates": "source"` are in pixels of the picture;
        `text` has them as the model wrote them. Raises: InputError where it is no JSON.
        """
        for text in (self.text, self.text.partition(THOUGHT)[2]):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                continue
            return value if self.places is None else json.loads(self.places.in_source(text))
        cut = "; max_tokens cut it" if self.finish_reason == "length" else ""
        raise InputError(f"the answer is no JSON{cut}: {clip(self.text)}; give a schema")

    @property
    def boxes(self) -> list[Box]:
        """Boxes and points that the answer holds, in the form that the model's family writes.

        `media[i].to_source(box.values)` gives their places in the picture.
        """
        return written_boxes(self.text, self.media)

    def show(self, boxes: Sequence[Any] | None = None, image: int = 0) -> View:
        """The pictures as the model saw them, with boxes, and the answer; to look at, or to save.

        boxes: in the model's coordinates, on picture number `image`: numbers (x, y, x, y), points
        (x, y), or dicts with bbox_2d and label; None for those of the answer, where there is one
        picture. Raises: InputError for what is no box, and for a picture that is not there.
        """
        note = figures_line(self.finish_reason, self.usage, self.timings)
        if boxes is None:
            return shown_answer(self.text, self.media, note)
        return View(self.media, given_boxes(boxes), image, self.text.lstrip(), note)

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()


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
        places=handle.places,
    )


def collect_all(handles: Sequence[Handle], *, has_bar: bool) -> list[GenerationResult]:
    """Read handles to their ends, in order. Raises: as `collect`."""
    with bar(is_on=has_bar) as watch:
        results = []
        for handle in noted(handles, watch, "answering", "request"):
            handle.watch = None if watch is None else Waiting(watch)
            results.append(collect(handle))
        return results
