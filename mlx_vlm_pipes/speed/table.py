"""A bench's report as lines of at most 80 columns."""

from __future__ import annotations

from typing import Any

from mlx_vlm_pipes.errors import clip
from mlx_vlm_pipes.speed.measure import Report

MS = 1e3
# table: (name in the report, heading, factor, digits) of each column
COLUMNS = {
    "prompts": (
        ("prompt_tokens", "prompt tokens", 1, 0),
        ("first_token_s", "first token, ms", MS, 1),
        ("prompt_tokens_per_s", "prompt tokens/s", 1, 0),
        ("completion_tokens_per_s", "answer tokens/s", 1, 1),
    ),
    "rows": (
        ("rows", "rows together", 1, 0),
        ("completion_tokens_per_s", "answer tokens/s", 1, 1),
        ("each_row_per_s", "of each row", 1, 1),
    ),
    "pictures": (
        ("size", "picture", 1, 0),
        ("image_tokens", "tokens", 1, 0),
        ("prepare_s", "prepare, ms", MS, 1),
        ("tower_s", "tower, ms", MS, 1),
        ("first_token_s", "first token, ms", MS, 1),
    ),
}


def table_lines(report: Report) -> list[str]:
    """Each table with its headings; what was skipped, with the reason; the peak of memory."""
    lines: list[str] = []
    for name, columns in COLUMNS.items():
        found = report.table(name)
        if found:
            headings = [heading for _, heading, _, _ in columns]
            lines += ["  ".join(f"{h:>{_width(h)}}" for h in headings)]
            lines += [_line(row, columns) for row in found]
            lines += [""]
        elif name in report.skipped:
            lines += [f"{name}: skipped, {report.skipped[name]}", ""]
    return [*lines, f"peak memory: {report.peak_memory_bytes / 1e6:.4g} MB"]


def _line(row: dict[str, Any], columns: tuple[tuple[str, str, float, int], ...]) -> str:
    first = f"{row[columns[0][0]]:>{_width(columns[0][1])}}"
    if "skipped" in row:
        return f"{first}  skipped: {clip(row['skipped'], 79 - len(first) - len('  skipped: '))}"
    cells = [
        f"{row[name] * factor:>{_width(heading)}.{digits}f}"
        for name, heading, factor, digits in columns[1:]
    ]
    return "  ".join([first, *cells])


def _width(heading: str) -> int:
    return max(len(heading), 9)
