"""How fast this machine is and what it holds in memory, with MLX as the user has set it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vlm_pipes.doctor.device.precision import FLOAT32_BAR
from mlx_vlm_pipes.doctor.device.random_model import Shape, write_random_model
from mlx_vlm_pipes.doctor.device.references import difference, load_cases, opened, text_logits
from mlx_vlm_pipes.doctor.device.report import Recorder
from mlx_vlm_pipes.dtypes import default_device
from mlx_vlm_pipes.engine.handover import ALWAYS, NEVER, copied_share, overlaps
from mlx_vlm_pipes.errors import PipesError
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.processing.base import VisionProcessor
from mlx_vlm_pipes.processing.types import ProcessedPrompt
from mlx_vlm_pipes.speed.stopwatch import (
    QUESTION,
    cold_answer,
    drawn_picture,
    rows_rate,
    seconds,
    text_prompt,
    tower_seconds,
)

ROWS = 8
COPIED = 0.5  # of the cache, held twice beyond what steps in turn hold: their own arrays
MB = 1e6


@dataclass(frozen=True)
class Amount:
    """How much to measure: the random model, tokens of a prompt and an answer, bytes to copy."""

    shape: Shape
    prompt_tokens: int
    new_tokens: int
    copy_bytes: int
    side: int = 512  # of a picture given to a model of the user's


GPU_AMOUNT = Amount(Shape(), prompt_tokens=512, new_tokens=96, copy_bytes=256 << 20)
CPU_AMOUNT = Amount(Shape(2, 1, 4096, 128), prompt_tokens=32, new_tokens=12, copy_bytes=64 << 20)


def measure_machine(record: Recorder, model: Path | None, amount: Amount | None = None) -> None:
    """The bundled model, one of a real size, and the user's, if there is one."""
    amount = amount or (CPU_AMOUNT if default_device().is_host else GPU_AMOUNT)
    with record.trying("copying"):
        bandwidth = copy_bandwidth(amount.copy_bytes)
        record.figures("machine", {"copy bandwidth, GB/s": bandwidth / 1e9})
    with record.trying("float32 as MLX is set"):
        _measure_float32(record)
    with record.trying("bundled model"):
        _measure(record, "bundled model", BUNDLED, amount, bandwidth)
    with record.trying("random model"), TemporaryDirectory() as name:
        folder = write_random_model(Path(name) / "model", amount.shape)
        _measure(record, amount.shape.name, folder, amount, bandwidth)
        with record.trying("overlapping steps"):
            _measure_ways(record, amount.shape.name, folder, amount)
    if model is not None:
        with record.trying(str(model)):
            _measure(record, str(model), model, amount, bandwidth)


def copy_bandwidth(nbytes: int) -> float:
    """Bytes a second, read and written, of the best of five copies."""
    source = mx.zeros(nbytes // 4, mx.uint32)
    mx.eval(source)
    return 2 * nbytes / min(seconds(lambda: mx.eval(source + 1)) for _ in range(5))


def weight_bytes_a_token(pipe: Pipeline) -> int:
    """Bytes of the decoder's weights that a step reads; of an untied embedding hardly any."""
    decoder = cast("nn.Module", pipe.model.language.decoder)
    arrays: list[tuple[str, mx.array]] = tree_flatten(decoder.parameters())  # pyright: ignore[reportAssignmentType]  # a list of pairs
    own_head = any(name.startswith("lm_head.") for name, _ in arrays)
    return sum(
        array.nbytes
        for name, array in arrays
        if not (own_head and name.startswith("embed_tokens."))
    )


def _measure_float32(record: Recorder) -> None:
    """What float32 comes to where MLX_ENABLE_TF32 is as the user has it."""
    cases = [case for case in load_cases() if case.logits is not None][:2]
    with opened(BUNDLED, dtype="float32") as pipe:
        found = [text_logits(pipe, case) for case in cases]
    apart = difference(found, [case.logits for case in cases if case.logits is not None])
    rounded = apart > FLOAT32_BAR
    advice = "rounded (TF32); MLX_ENABLE_TF32=0 gives transformers' numbers" if rounded else "whole"
    values = {"float32 as MLX is set": advice, "float32, of the largest logit": apart}
    record.figures("machine", values)


def _measure(
    record: Recorder, subject: str, folder: Path, amount: Amount, bandwidth: float
) -> None:
    """Speed at one row and eight, a picture, the first answer, memory."""
    with opened(folder) as pipe:
        prompt = text_prompt(pipe, amount.prompt_tokens)
        pipe.engine.worker.call(mx.reset_peak_memory)
        cold, warm = (seconds(lambda: cold_answer(pipe, prompt, 3)) for _ in range(2))
        one, eight = (_traced_rate(pipe, prompt, rows, amount.new_tokens) for rows in (1, ROWS))
        used = weight_bytes_a_token(pipe) * one / bandwidth
        values: dict[str, Any] = {
            "dtype": pipe.model.kv_params.dtype.name,
            "first answer, cold, s": cold,
            "the same again, s": warm,
            "compiling and first use, s": max(0.0, cold - warm),
            "tokens a second, one row": one,
            f"tokens a second, {ROWS} rows": eight,
            "share of the copy bandwidth, one row": used,
        }
        values |= _picture(pipe, amount)
        for name, ask in (
            ("peak memory, MB", mx.get_peak_memory),
            ("pool of freed memory, MB", mx.get_cache_memory),
            ("memory in use, MB", mx.get_active_memory),
        ):
            values[name] = pipe.engine.worker.call(ask) / MB
        record.figures(subject, values)


def _traced_rate(pipe: Pipeline, prompt: ProcessedPrompt, rows: int, tokens: int) -> float:
    """Tokens a second of all rows together, traced at this size before."""
    rows_rate(pipe, prompt, rows, tokens)
    return rows_rate(pipe, prompt, rows, tokens)


def _picture(pipe: Pipeline, amount: Amount) -> dict[str, Any]:
    """Milliseconds of one picture's way through the tower, and its tokens; nothing without one."""
    if not isinstance(pipe.processor, VisionProcessor):
        return {}
    try:
        prompt = pipe.encode(QUESTION, images=[drawn_picture(amount.side, amount.side)])
    except PipesError as error:  # a base model has no chat template
        return {"a picture": str(error)}
    _, *times = (tower_seconds(pipe, prompt) for _ in range(3))
    tokens = sum(record.num_tokens for record in prompt.media)
    return {"a picture, ms": min(times) * 1e3, "a picture, tokens": tokens}


def _measure_ways(record: Recorder, subject: str, folder: Path, amount: Amount) -> None:
    """Whether eight rows' keys and values are written in place: either way, and as it chooses."""
    with opened(folder) as pipe:
        config = pipe.engine.config
    ways = {"in turn": NEVER, "overlapping": ALWAYS, "as chosen": config.overlap_bytes}
    least = 0.0
    for way, limit in ways.items():
        with opened(folder, engine=replace(config, overlap_bytes=limit)) as pipe:
            prompt = text_prompt(pipe, amount.prompt_tokens)
            speed = _traced_rate(pipe, prompt, ROWS, amount.new_tokens)
            overlapped, share = _held_twice(pipe, prompt, 4 * amount.new_tokens)
        least = share if way == "in turn" else least
        values = {
            "tokens a second": speed,
            "overlap": overlapped,
            "cache held twice": share,
            "writes": "copied" if share - least > COPIED else "in place",
        }
        record.figures(subject, {f"steps {way}, {name}": value for name, value in values.items()})


def _held_twice(pipe: Pipeline, prompt: ProcessedPrompt, tokens: int) -> tuple[bool, float]:
    """Whether eight rows' steps overlap, and the share of their cache that is held twice."""
    scheduler, device = pipe.engine.scheduler, pipe.model.device
    options: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True}
    handles = [pipe.submit(prompt, **options) for _ in range(ROWS)]
    try:
        for handle in handles:
            handle.next_chunk()  # all rows decode from here on
        return pipe.engine.worker.call(
            lambda: (
                overlaps(scheduler.state),
                copied_share(scheduler.state, scheduler.step, device),
            )
        )
    finally:
        for handle in handles:
            handle.close()
