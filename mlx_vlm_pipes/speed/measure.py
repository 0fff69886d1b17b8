"""A model's speed over prompt lengths, rows and picture sizes: medians of repeated rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_vlm_pipes.errors import PipesError
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.processing.base import VisionProcessor
from mlx_vlm_pipes.progress import Watch, noted
from mlx_vlm_pipes.speed.stopwatch import (
    QUESTION,
    cold_answer,
    decode_rate,
    drawn_picture,
    rows_rate,
    seconds,
    text_prompt,
    tower_seconds,
)

Figures = dict[str, float]


@dataclass(frozen=True)
class Grid:
    """What is measured. prompt_tokens: lengths of prompts; rows: how many are answered together, of
    the first of these lengths; pictures: (width, height) in pixels; rounds: behind one that warms
    up.
    """

    prompt_tokens: Sequence[int] = (128, 512, 1024)
    rows: Sequence[int] = (1, 2, 4, 8)
    pictures: Sequence[tuple[int, int]] = ((256, 256), (512, 512), (1024, 768))
    new_tokens: int = 32
    rounds: int = 3


@dataclass
class Cell:
    """One line of the tables. name: (its column, what stands there); samples: of each round."""

    table: str
    name: tuple[str, int | str]
    measure: Callable[[], Figures]
    samples: list[Figures] = field(default_factory=list)
    refusal: str = ""

    @property
    def medians(self) -> Figures:
        names = self.samples[0] if self.samples else ()
        return {name: statistics.median(sample[name] for sample in self.samples) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """The medians, to four digits; what was refused says why."""
        column, value = self.name
        figures = {name: float(f"{median:.4g}") for name, median in self.medians.items()}
        return {column: value, **figures, **({"skipped": self.refusal} if self.refusal else {})}


@dataclass(frozen=True)
class Report:
    """What was found. skipped: a table that there is not, with the reason."""

    grid: Grid
    cells: Sequence[Cell]
    skipped: dict[str, str]
    peak_memory_bytes: int

    def table(self, name: str) -> list[dict[str, Any]]:
        """One object for each line of a table: prompts, rows or pictures."""
        return [cell.as_dict() for cell in self.cells if cell.table == name]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rounds": self.grid.rounds,
            "new_tokens": self.grid.new_tokens,
            "rows_prompt_tokens": self.grid.prompt_tokens[0],
            **{name: self.table(name) for name in ("prompts", "rows", "pictures")},
            "skipped": self.skipped,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def run_bench(pipe: Pipeline, grid: Grid, watch: Watch | None = None) -> Report:
    """Measure every cell once to warm up, then round by round, so that all share what disturbs.

    watch: told how many measurements are done. A cell that the model cannot hold is skipped, with
    the reason.
    """
    cells = [*_prompt_cells(pipe, grid), *_row_cells(pipe, grid)]
    skipped = {}
    if isinstance(pipe.processor, VisionProcessor):
        cells += [_picture_cell(pipe, size) for size in grid.pictures]
    elif grid.pictures:
        skipped["pictures"] = "a text model"
    turns = [(i, cell) for i in range(grid.rounds + 1) for cell in cells]
    for i, cell in noted(turns, watch, "measuring", "step"):
        if cell.refusal:
            continue
        try:
            figures = cell.measure()
        except PipesError as error:
            cell.refusal = str(error)
            continue
        if i:
            cell.samples.append(figures)
    return Report(grid, cells, skipped, pipe.peak_memory_bytes())


def _prompt_cells(pipe: Pipeline, grid: Grid) -> list[Cell]:
    """First token and decode speed of one row, by the length of its prompt."""

    def cell(tokens: int) -> Cell:
        prompt = text_prompt(pipe, tokens)

        def measure() -> Figures:
            result = cold_answer(pipe, prompt, grid.new_tokens)
            spent = result.timings.prompt_s
            return {
                "first_token_s": spent,
                "prompt_tokens_per_s": tokens / spent,
                "completion_tokens_per_s": decode_rate(result),
            }

        return Cell("prompts", ("prompt_tokens", tokens), measure)

    return [cell(tokens) for tokens in grid.prompt_tokens]


def _row_cells(pipe: Pipeline, grid: Grid) -> list[Cell]:
    """Decode speed of several rows together, their prompts being cached."""
    prompt = text_prompt(pipe, grid.prompt_tokens[0])

    def cell(rows: int) -> Cell:
        def measure() -> Figures:
            rate = rows_rate(pipe, prompt, rows, grid.new_tokens)
            return {"completion_tokens_per_s": rate, "each_row_per_s": rate / rows}

        return Cell("rows", ("rows", rows), measure)

    return [cell(rows) for rows in grid.rows]


def _picture_cell(pipe: Pipeline, size: tuple[int, int]) -> Cell:
    """A picture's way: made ready on the CPU, through the tower, to the first token."""
    pixels = drawn_picture(*size)

    def measure() -> Figures:
        begun = time.perf_counter()
        prompt = pipe.encode(QUESTION, images=[pixels])
        prepared = time.perf_counter() - begun
        return {
            "image_tokens": sum(record.num_tokens for record in prompt.media),
            "prepare_s": prepared,
            "tower_s": tower_seconds(pipe, prompt),
            "first_token_s": prepared + seconds(lambda: cold_answer(pipe, prompt, 1)),
        }

    return Cell("pictures", ("size", f"{size[0]}x{size[1]}"), measure)
