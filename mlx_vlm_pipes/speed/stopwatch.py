"""Single measurements on a loaded model. Seconds, tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.pipeline import GenerationResult, Pipeline
from mlx_vlm_pipes.processing.types import ProcessedPrompt

SENTENCE = "a large green triangle above a small red circle. "
QUESTION = "Describe the picture."


def text_prompt(pipe: Pipeline, tokens: int) -> ProcessedPrompt:
    """A prompt of exactly so many tokens of ordinary text."""
    ids: list[int] = []
    repeats = 8
    while len(ids) < tokens:
        ids = pipe.encode(SENTENCE * repeats, raw=True).input_ids
        repeats *= 4
    return ProcessedPrompt(SENTENCE, ids[:tokens], [], [])


def drawn_picture(width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: two slopes of colour and a disc, the same each time."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    disc = np.hypot(across - 128, down - 128) < 64
    return np.stack([across, down, np.where(disc, 255, 64)], axis=-1).astype(np.uint8)


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def cold_answer(pipe: Pipeline, prompt: ProcessedPrompt, new_tokens: int) -> GenerationResult:
    """An answer of so many tokens; nothing of the prompt, or of its pictures, is cached."""
    pipe.engine.forget()
    return pipe.generate(prompt, max_tokens=new_tokens, ignore_eos=True)


def decode_rate(result: GenerationResult) -> float:
    """Tokens a second behind the first; 0 for an answer of one token."""
    behind, spent = len(result.tokens) - 1, result.timings.generation_s
    return behind / spent if behind and spent > 0 else 0.0


def rows_rate(pipe: Pipeline, prompt: ProcessedPrompt, rows: int, new_tokens: int) -> float:
    """Tokens a second of all rows together, while all decode: their prompt is cached before."""
    options: dict[str, Any] = {"max_tokens": new_tokens, "ignore_eos": True}
    pipe.generate(prompt, max_tokens=1, ignore_eos=True)
    return sum(decode_rate(result) for result in pipe.generate_n(prompt, rows, **options))


def tower_seconds(pipe: Pipeline, prompt: ProcessedPrompt) -> float:
    """The pictures of a prompt through the tower, once."""
    context = pipe.processor.new_context(prompt, max_length=pipe.max_seq_len)

    def encode() -> None:
        mx.eval(pipe.model.encode_images(context.images))

    return pipe.engine.worker.call(lambda: seconds(encode))
