"""Runs a section's cases in a child process, so that a crash or a hang is one failed case."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from tests.torture.section import Section

ROOT = Path(__file__).parent.parent.parent
START_S = 60.0  # for imports, and what all cases share
MAX_VIRTUAL_BYTES = 16 * 2**30  # a flood of memory ends the child, not the machine
MAX_GROWTH_BYTES = 1_500_000_000  # of resident memory, in one case


@dataclass(frozen=True)
class Verdict:
    """failure: in one line; empty where the case held."""

    about: str
    failure: str = ""
    seconds: float = 0.0


class Worker:
    """The cases of one module's `Section`, tried in a child process; a context manager."""

    def __init__(self, module: str, seed: int) -> None:
        self.module, self.seed = module, seed
        self.section = import_module(module).Section(seed, Path())
        self._child: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="torture-")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout=10)
        self._kill()
        self._folder.cleanup()

    def run(self, index: int) -> Verdict:
        """Try one case."""
        fresh = self._child is None
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{index}\n".encode())
        child.stdin.flush()
        limit = self.section.limit_s + START_S * fresh
        ready, _, _ = select.select([child.stdout], [], [], limit)
        line = child.stdout.readline() if ready else b""
        if line:
            return Verdict(**json.loads(line))
        status = "hangs" if not ready else f"the process ended with {child.wait()}"
        self._kill()
        return Verdict(f"case {index}", f"{status}: {self._last_words()}")

    def _start(self) -> subprocess.Popen[bytes]:
        with (Path(self._folder.name) / "stderr").open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", __name__, self.module, str(self.seed), self._folder.name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                start_new_session=True, cwd=ROOT,
            )  # fmt: skip
        return self._child

    def _kill(self) -> None:
        if self._child is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)  # its own session: its children too
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                stream.close()
        self._child = None

    def _last_words(self) -> str:
        text = (Path(self._folder.name) / "stderr").read_text(errors="replace")
        return " ".join(text.split())[-200:] or "it said nothing"


def try_case(section: Section, index: int) -> Verdict:
    """One case in this process."""
    about, before, started = f"case {index}", _resident_bytes(), time.perf_counter()
    try:
        case = section.draw(index)
        about = case.about
        case.run()
    except BaseException as error:
        return Verdict(about, _described(error))
    grown, seconds = _resident_bytes() - before, time.perf_counter() - started
    if grown > MAX_GROWTH_BYTES:
        return Verdict(about, f"memory grew by {grown} bytes")
    return Verdict(about, seconds=seconds)


def _described(error: BaseException) -> str:
    """An exception in one line, with the place in the package that it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "mlx_vlm_pipes" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def _resident_bytes() -> int:
    """The most that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def serve(module: str, seed: int, folder: Path) -> None:
    """The child: numbers of cases on standard input, verdicts on standard output."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no verdict
    with contextlib.suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (MAX_VIRTUAL_BYTES, MAX_VIRTUAL_BYTES))
    files = folder / str(time.monotonic_ns())
    files.mkdir()
    section = import_module(module).Section(seed, files)
    for line in sys.stdin:
        replies.write(json.dumps(asdict(try_case(section, int(line)))) + "\n")
        replies.flush()
    section.close()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
