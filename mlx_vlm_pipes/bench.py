"""python -m mlx_vlm_pipes.bench: how fast a model is on this machine."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.arguments import (
    BUNDLED_NOTE,
    add_model_options,
    load_pipeline,
    model_name,
)
from mlx_vlm_pipes.command import new_parser, put, put_json, run_command, say
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.launcher import launched_size
from mlx_vlm_pipes.options import Option
from mlx_vlm_pipes.progress import bar

if TYPE_CHECKING:
    from mlx_vlm_pipes.pipeline import Pipeline
    from mlx_vlm_pipes.speed.measure import Grid

_EPILOG = """\
example:
  python -m mlx_vlm_pipes.bench --model HuggingFaceTB/SmolVLM-256M-Instruct \\
      --prompt-tokens 128,1024,4096 --rows 1,8 --pictures 512x512 --plot speed.png

Prompts are cold: nothing of them is cached. Figures are medians of the rounds.
"""
MAX_SIDE = 16384


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "bench",
        description="Measure how fast a model reads prompts and pictures, and how fast it answers.",
        epilog=_EPILOG,
        usage="%(prog)s [options]",
    )
    add_model_options(parser)
    grid = parser.add_argument_group("what to measure (lists with commas; none for nothing)")
    grid.add_argument(
        "--prompt-tokens", default="128,512,1024", help="lengths of prompts (default %(default)s)"
    )
    grid.add_argument(
        "--rows",
        default="1,2,4,8",
        help="how many are answered together, with prompts of the first length "
        "(default %(default)s)",
    )
    grid.add_argument(
        "--pictures",
        default="256x256,512x512,1024x768",
        help="sizes in pixels (default %(default)s)",
    )
    grid.add_argument(
        "--new-tokens", type=int, default=32, help="tokens of an answer (default %(default)s)"
    )
    grid.add_argument("--rounds", type=int, default=3, help="of each (default %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--plot", metavar="FILE", help="draw the figures: .png, .svg or .pdf")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on standard error for a user's mistake."""
    return run_command(build_parser, _run, argv, is_joint=True)


def _run(args: argparse.Namespace) -> int:
    if launched_size() > 1 and _words(args.pictures):
        # its stopwatch runs the tower between two steps, of which other ranks know nothing
        raise InputError("--pictures: not with several ranks; give --pictures none")
    grid = _grid(args)
    from mlx_vlm_pipes.speed.plot import draw, plot_path

    plot = None if args.plot is None else plot_path(args.plot)
    if args.model is None:
        say(BUNDLED_NOTE)
    from mlx_vlm_pipes.doctor.device.parts import machine_facts
    from mlx_vlm_pipes.speed.measure import run_bench
    from mlx_vlm_pipes.speed.table import table_lines

    with load_pipeline(args) as pipe:
        has_bar, pipe.has_bars = pipe.has_bars, False  # one for the whole, none for its parts
        with bar(is_on=has_bar) as watch:
            report = run_bench(pipe, grid, watch)
        facts = {**_model_facts(args.model, pipe), "machine": machine_facts()}
    title = f"{facts['model']}, {facts['dtype']} on {facts['device']}"
    rounds = "one round" if grid.rounds == 1 else f"medians of {grid.rounds} rounds"
    measured = f"{rounds}, answers of {grid.new_tokens} tokens"
    if args.json:
        put_json({**facts, **report.as_dict()})
    else:
        put("\n".join([f"{title}; {measured}", "", *table_lines(report)]) + "\n")
    if plot is not None:
        draw(report, title, f"{facts['machine']['chip']}; {measured}", plot)
        say(f"drawn: {plot}")
    return 0


def _model_facts(name: str | None, pipe: Pipeline) -> dict[str, Any]:
    model = pipe.model
    return {
        "model": model_name(name),
        "dtype": model.dtype.name,
        "device": model.device.label,
        "weight_bytes": model.weight_bytes,
        "kv_bits": model.kv_cache_config.bits,
    }


def _grid(args: argparse.Namespace) -> Grid:
    """Raises: InputError for a list that is none, and for numbers below 1."""
    from mlx_vlm_pipes.speed.measure import Grid

    prompts = [_whole("--prompt-tokens", text) for text in _words(args.prompt_tokens)]
    if not prompts:
        raise InputError("--prompt-tokens: expected one length at least")
    return Grid(
        prompt_tokens=prompts,
        rows=[_whole("--rows", text) for text in _words(args.rows)],
        pictures=[_size(text) for text in _words(args.pictures)],
        new_tokens=Option("", name="--new-tokens", kind=int, low=2).read(args.new_tokens),
        rounds=Option("", name="--rounds", kind=int, low=1).read(args.rounds),
    )


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    return [word for word in words if word not in ("", "none")]


def _whole(flag: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise InputError(f"{flag} {text!r}: expected whole numbers with commas between")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise InputError(f"--pictures {text!r}: expected WIDTHxHEIGHT, at most {MAX_SIDE} each")
    return sides


if __name__ == "__main__":
    sys.exit(main())
