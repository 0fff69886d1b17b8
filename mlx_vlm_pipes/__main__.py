"""python -m mlx_vlm_pipes COMMAND: all commands behind one name.

Without a command's name the arguments are those of `generate`.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from mlx_vlm_pipes.command import new_parser, put, run_command

COMMANDS = {
    "generate": "answer a prompt about pictures and clips",
    "chat": "talk about pictures and clips in the terminal",
    "convert": "write a model folder: of another type, quantised, with a LoRA fused",
    "bench": "measure how fast a model is on this machine",
    "serve": "answer OpenAI's clients over HTTP",
    "check": "say what a model, or this machine, is good for",
}
_EPILOG = """\
commands:
{}

COMMAND --help says its options. Without a command's name the options are those of generate.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit status: that of the command; 0 for the list of them."""
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in COMMANDS:
        return import_module(f"mlx_vlm_pipes.{given[0]}").main(given[1:])
    if given and given[0] not in ("-h", "--help", "--version"):
        return import_module("mlx_vlm_pipes.generate").main(given)
    return run_command(_build_parser, _put_help, given)


def _build_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = (f"  {name:{width}}  {about}" for name, about in COMMANDS.items())
    return new_parser(
        None,
        description="Vision-language models on Apple Silicon through MLX.",
        epilog=_EPILOG.format("\n".join(listed)),
        usage="python -m mlx_vlm_pipes [COMMAND] [options]",
    )


def _put_help(_: argparse.Namespace) -> int:
    put(_build_parser().format_help())
    return 0


if __name__ == "__main__":
    sys.exit(main())
