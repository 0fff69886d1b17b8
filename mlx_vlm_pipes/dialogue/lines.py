"""What a user types: messages of one line or several, with the arrow keys' history."""

from __future__ import annotations

import glob
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from mlx_vlm_pipes.command import say
from mlx_vlm_pipes.launcher import launched_size
from mlx_vlm_pipes.paths import user_path

QUOTES = '"""'
MORE = "... "
MAX_HISTORY = 1000  # lines


class Lines:
    """Standard input, message by message; a context in which the terminal's history is there.

    commands: completed by the tab key at the start of a line; elsewhere it completes paths.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands
        has_terminal = sys.stdin is not None and sys.stdin.isatty()
        self.is_terminal = has_terminal or launched_size() > 1  # mlx.launch hands lines on
        self._readline = _find_readline() if has_terminal else None
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")

    def __enter__(self) -> Lines:
        if self._readline is not None:
            self._prepare(self._readline)
        return self

    def __exit__(self, *error: object) -> None:
        if self._readline is not None:
            _save_history(self._readline)

    def read(self, sign: str) -> str | None:
        """A message, None at the end of the input.

        It is one line; or several, each but the last ending with a backslash; or what stands
        between two times three quotes. sign: shown before it on a terminal.
        Raises: KeyboardInterrupt, which drops what was typed.
        """
        line = self._line(sign)
        if line is None:
            return None
        if line.lstrip().startswith(QUOTES):
            return self._quoted(line.lstrip().removeprefix(QUOTES))
        while line.endswith("\\"):
            more = self._line(MORE)
            line = line[:-1] + ("" if more is None else f"\n{more}")
        return line

    def _quoted(self, line: str | None) -> str:
        lines = []
        while line is not None:
            text, quotes, _ = line.partition(QUOTES)
            lines.append(text)
            if quotes:
                break
            line = self._line(MORE)
        return "\n".join(lines).strip("\n")

    def _line(self, sign: str) -> str | None:
        if self.is_terminal and sys.stdout is not None and sys.stdout.isatty():
            try:
                return input(sign)
            except EOFError:
                say("")
                return None
        if self.is_terminal:
            sys.stderr.write(sign)  # standard output is a file, which holds the answers only
            sys.stderr.flush()
        line = "" if sys.stdin is None else sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None

    def _prepare(self, readline: ModuleType) -> None:
        readline.set_history_length(MAX_HISTORY)
        with suppress(OSError):  # there is none yet, or it is another library's
            readline.read_history_file(history_file())
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self._complete)
        is_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")

    def _complete(self, text: str, state: int) -> str | None:
        found = [name + " " for name in self._commands if name.startswith(text)]
        if self._readline is None or self._readline.get_begidx() > 0 or not found:
            paths = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
            names = [f"{path}/" if os.path.isdir(path) else path for path in paths]
            found = [name.replace(" ", r"\ ") for name in names]
        return found[state] if state < len(found) else None


def history_file() -> Path:
    """Where the lines of earlier sessions are: the user's state folder, as XDG says."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return user_path(state) / "mlx_vlm_pipes" / "chat_history"


def _find_readline() -> ModuleType | None:
    """The line editor, where Python was built with one; without it lines are read all the same."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def _save_history(readline: ModuleType) -> None:
    file = history_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)  # whoever else uses the machine need not read it
        readline.write_history_file(file)
    except OSError as error:
        say(f"the lines of this session are not kept: {file}: {error.strerror}")
