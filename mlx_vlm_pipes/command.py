"""What all commands share: how their parsers begin, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from mlx_vlm_pipes import __version__
from mlx_vlm_pipes.errors import PipesError


def new_parser(command: str, *, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of `python -m mlx_vlm_pipes.<command>`; the epilog's lines stay as they are."""
    parser = argparse.ArgumentParser(
        prog=f"python -m mlx_vlm_pipes.{command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mlx_vlm_pipes {__version__}")
    return parser


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Parse argv (None: the process's own) and run.

    Returns: the exit status: that of run; 2, with one line on standard error, for a mistake of the
    user's; 130 after Ctrl-C. Raises: SystemExit from argparse (--help, --version, unknown flags).
    """
    args = parser.parse_args(argv)
    try:
        return run(args)
    except PipesError as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def say(line: str) -> None:
    """A line on standard error, which keeps standard output for what was asked."""
    sys.stderr.write(line + "\n")
