"""What all commands share: how their parsers begin, what they write, and how they end."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from mlx_vlm_pipes import __version__
from mlx_vlm_pipes.errors import PipesError, RankLost
from mlx_vlm_pipes.launcher import is_follower
from mlx_vlm_pipes.progress import hidden

USER_MISTAKE, INTERRUPTED, PIPE_CLOSED, TERMINATED = 2, 128 + 2, 128 + 13, 128 + 15
RANK_LOST = 70  # another process of the model has gone: to be started again, all of them


class _NoReader(Exception):
    """Whoever read standard output has gone, as `head` does."""


class _Unwritable(Exception):
    """Standard output is closed or full; the text says which."""


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that what is unfinished is cleared away."""


def new_parser(
    command: str | None, *, description: str, epilog: str, usage: str | None = None
) -> argparse.ArgumentParser:
    """The parser of `python -m mlx_vlm_pipes.<command>`, or of what holds all commands.

    The epilog's lines stay as they are.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mlx_vlm_pipes" + (f".{command}" if command else ""),
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mlx_vlm_pipes {__version__}")
    return parser


def run_command(
    build: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
    *,
    is_joint: bool = False,
) -> int:
    """Build the parser, parse argv (None: the process's own) and run; all of it may be interrupted.

    is_joint: processes that mlx.launch has started run it together, and the first one speaks;
    otherwise the first one runs it alone.

    Returns: the exit status: that of run; 2, with one line on standard error, for a mistake of the
    user's and for output that cannot be written; 130 after Ctrl-C, 141 where the reader of a pipe
    has gone, 143 after SIGTERM within `terminable`, 70 where another rank has gone.
    Raises: SystemExit from argparse (--help, --version, unknown flags), and on other ranks.
    """
    _prepare_streams()
    if is_follower() and not is_joint:
        return 0
    with _first_rank_speaks():
        return _run_said(build, run, argv)


def _run_said(
    build: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """As `run_command`, saying what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            args = _parsed(build(), argv)
            given = vars(args)
            with hidden(is_hidden=bool(given.get("json") or given.get("quiet"))):
                return run(args)
    except RankLost as error:
        say(f"error: {' '.join(str(error).split())}")
        return RANK_LOST
    except PipesError as error:
        say(f"error: {' '.join(str(error).split())}")
        return USER_MISTAKE
    except _Unwritable as error:
        say(f"error: the output cannot be written: {error}")
        return USER_MISTAKE
    except _NoReader:
        return PIPE_CLOSED
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except _Terminated:
        say("terminated")
        return TERMINATED


def put(text: str) -> None:
    """Text on standard output, at once; characters that it does not know as question marks."""
    if sys.stdout is None:
        raise _Unwritable("standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout)
        raise _NoReader from None
    except OSError as error:
        _drop(sys.stdout)
        raise _Unwritable(error.strerror) from None


def put_json(value: Any) -> None:
    """One line of JSON; escaped where standard output does not know its characters."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    put(text + "\n")


def say(line: str) -> None:
    """A line on standard error, which keeps standard output for what was asked."""
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr)  # nowhere is left to say it


@contextmanager
def _first_rank_speaks() -> Iterator[None]:
    """Nothing within is written by the other ranks, unless it ends in an error of ours."""
    if not is_follower():
        yield
        return
    with open(os.devnull, "w") as nowhere:  # noqa: SIM117  # the file must outlive the streams
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM within ends the command as Ctrl-C does; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Ctrl-C within is not for this process: a terminal sends it to all that it has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return parser.parse_args(argv)
    except SystemExit:
        if sys.stdout is not None:
            put("")  # the help text may be waiting still
        raise


def _prepare_streams() -> None:
    """No stream that was closed, or whose encoding is poor, ends a command half way.

    A file that we open must not become descriptor 0, 1 or 2: what a library prints would be
    written into it, and MLX reads no file that is descriptor 0.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _say_warning(message: Warning | str, *_: object) -> None:
    say(f"warning: {' '.join(str(message).split())}")


def _drop(stream: TextIO) -> None:
    """Python tries again to write what is left at its own end, and prints a traceback."""
    with suppress(OSError, ValueError):  # a stream without a descriptor: nothing is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
