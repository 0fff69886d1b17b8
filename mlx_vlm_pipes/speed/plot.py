"""A bench's report as a picture. Needs matplotlib, which is imported where it is used."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.paths import user_path, write_whole
from mlx_vlm_pipes.speed.measure import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#2f6fb7", "#d9822b", "#3d9a6c", "#666666"
SUFFIXES = (".png", ".svg", ".pdf")


def plot_path(name: str) -> Path:
    """The file to draw into, before anything is measured.

    Raises: InputError where it cannot be written, is of another kind, or matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise InputError(
            '--plot needs matplotlib; pip install "mlx-vlm-pipes[plot]", or leave it out'
        )
    path = user_path(name)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {name}: expected a name that ends in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {name}: there is no folder {path.absolute().parent}")
    return path


def draw(report: Report, title: str, subtitle: str, path: Path) -> None:
    """One panel for each table that has figures. Raises: InputError for a file that is refused."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"prompts": _prompts, "rows": _rows, "pictures": _pictures}
    found = {name: [row for row in report.table(name) if "skipped" not in row] for name in panels}
    found = {name: rows for name, rows in found.items() if rows}
    figure = Figure(figsize=(4.2 * max(1, len(found)), 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n", fontsize=12, fontweight="bold")
    figure.text(0.5, 0.925, subtitle, ha="center", va="top", fontsize=8.5, color=GREY)
    axes = figure.subplots(1, max(1, len(found)), squeeze=False)[0]
    for axis, (name, rows) in zip(axes, found.items(), strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        panels[name](axis, rows)
        axis.set_ylim(bottom=0)
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:].lower())
    write_whole(path, file.getvalue())


def _prompts(axis: Axes, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    speeds = [row["prompt_tokens_per_s"] for row in rows]
    bars = axis.bar(places, speeds, 0.55, color=BLUE)
    axis.bar_label(bars, [_spent(row["first_token_s"]) for row in rows], fontsize=8, padding=2)
    axis.set_xticks(places, [f"{row['prompt_tokens']:,}" for row in rows])
    axis.set_title("Reading a prompt", fontsize=10, loc="left")
    axis.set_xlabel("prompt tokens  (on the bars: time to the first token)", fontsize=8.5)
    axis.set_ylabel("prompt tokens a second", fontsize=9)


def _rows(axis: Axes, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    bars = axis.bar(places, [row["completion_tokens_per_s"] for row in rows], 0.55, color=GREEN)
    each = [f"{row['each_row_per_s']:.3g}" for row in rows]
    axis.bar_label(bars, each, fontsize=8, padding=2)
    axis.set_xticks(places, [str(row["rows"]) for row in rows])
    axis.set_title("Answering", fontsize=10, loc="left")
    axis.set_xlabel("rows together  (on the bars: tokens a second of each row)", fontsize=8.5)
    axis.set_ylabel("answer tokens a second, all rows", fontsize=9)


def _pictures(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """A bar of three parts: made ready, tower, and what remains up to the first token."""
    places = range(len(rows))
    ready = [1e3 * row["prepare_s"] for row in rows]
    tower = [1e3 * row["tower_s"] for row in rows]
    first = [1e3 * row["first_token_s"] for row in rows]
    below = [a + b for a, b in zip(ready, tower, strict=True)]
    rest = [max(0.0, c - b) for b, c in zip(below, first, strict=True)]
    axis.bar(places, ready, 0.55, color=GREY, label="making ready")
    axis.bar(places, tower, 0.55, bottom=ready, color=ORANGE, label="vision tower")
    top = axis.bar(places, rest, 0.55, bottom=below, color=BLUE, label="prompt")
    counts = [f"{row['image_tokens']:.0f} tokens" for row in rows]
    axis.bar_label(top, counts, fontsize=8, padding=2)
    axis.set_xticks(places, [row["size"] for row in rows])
    axis.set_title("Looking at a picture", fontsize=10, loc="left")
    axis.set_xlabel("size in pixels", fontsize=8.5)
    axis.set_ylabel("milliseconds to the first token", fontsize=9)
    axis.margins(y=0.2)  # room for the legend above the bars
    axis.legend(fontsize=8, frameon=False, loc="upper center", ncols=3, columnspacing=1.2)


def _spent(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
