"""Signals at any moment of the commands: the exit status, no traceback, nothing that looks whole.

Moments are counted from where the command begins, and what comes when it has returned counts as
too late: what Python does before and after is not ours.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from mlx_vlm_pipes import check
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.loading import BUNDLED
from tests.fixtures_helper import FIXTURES
from tests.torture import section
from tests.torture.section import Case, require
from tests.torture.worker import ROOT

BEGUN = """
import os, sys
from mlx_vlm_pipes.{command} import main
os.write({mark}, b".")
status = main(sys.argv[1:])
os.write({mark}, bytes([status]))
sys.exit(status)
"""
PICTURE = ROOT / "examples" / "images" / "shapes.png"
SIGNALS = ["SIGINT", "SIGTERM", "SIGKILL", "SIGPIPE", "twice SIGINT", "twice SIGTERM", "SIGHUP"]
# how a command may end: as asked, or by the signal; convert clears up before it ends
ENDS = {
    "SIGINT": {130}, "twice SIGINT": {130, -signal.SIGINT}, "SIGTERM": {143, -signal.SIGTERM},
    "twice SIGTERM": {143, -signal.SIGTERM}, "SIGKILL": {-signal.SIGKILL}, "SIGPIPE": {141},
    "SIGHUP": {-signal.SIGHUP},
}  # fmt: skip
MOST_S = 1.2  # a command takes about as long


class Section(section.Section):
    small: ClassVar[int] = 4
    limit_s: ClassVar[float] = 90.0

    @property
    def whole(self) -> int:
        return 120

    def draw(self, index: int) -> Case:
        rng = self.rng(index)
        kind, delay = rng.choice(SIGNALS), rng.random() ** 1.5 * MOST_S
        command = rng.choice(["generate", "convert", "convert", "check"])
        folder = self.folder / f"case-{index}"
        argv = self._arguments(command, folder, rng)
        about = f"{command} {kind} after {delay:.2f} s"
        return Case(about, lambda: self._try(command, argv, folder, kind, delay))

    def _arguments(self, command: str, folder: Path, rng: random.Random) -> list[str]:
        source = rng.choice([BUNDLED, FIXTURES / "qwen25vl", FIXTURES / "llama-sharded"])
        if command == "generate":
            extra = rng.choice([[], ["--json"], ["--temperature", "1"], ["--plan"]])
            return ["--image", str(PICTURE), "--max-tokens", "400", "--ignore-eos", *extra]
        if command == "check":
            return [str(source), *rng.choice([[], ["--json"], ["--run"]])]
        extra = rng.choice([[], ["--no-measure"], ["--dtype", "bfloat16"]])
        packing = ["--bits", "8", "--group-size", "32"]
        return ["--model", str(source), "--out", str(folder / "out"), *packing, *extra]

    def _try(self, command: str, argv: list[str], folder: Path, kind: str, delay: float) -> None:
        folder.mkdir()
        status, error, is_late = _run(command, argv, folder, kind, delay)
        ended = {0, *ENDS[kind]}
        require(is_late or status in ended, f"status {status}: {' '.join(error.split())[-300:]}")
        is_second = kind == "twice SIGINT"  # Python's own: it meets the line about the first
        require(is_second or is_late or "Traceback" not in error, f"a traceback: {error[-300:]}")
        if status in (130, 143) and not is_second:
            said = [line for line in error.splitlines() if line in ("interrupted", "terminated")]
            require(len(said) == 1, f"says {error[-200:]!r}")
        if command == "convert":
            _whole_or_not_there(folder, argv, dead=status < 0)


def _run(
    command: str, argv: list[str], folder: Path, kind: str, delay: float
) -> tuple[int, str, bool]:
    """Exit status and standard error of a command that a signal met after `delay` seconds.

    The last: whether the command had returned in peace, and Python's own end was met at most.
    """
    begun, mark = os.pipe()
    with (folder.parent / f"{folder.name}.err").open("w+") as error:
        child = subprocess.Popen(
            [sys.executable, "-c", BEGUN.format(command=command, mark=mark), *argv],
            stdout=subprocess.PIPE, stderr=error, cwd=ROOT, pass_fds=[mark],
        )  # fmt: skip
        os.close(mark)
        os.read(begun, 1)
        time.sleep(delay)
        _send(child, kind)
        status = child.wait(timeout=60)
        is_late = os.read(begun, 1) == b"\0"
        os.close(begun)
        error.seek(0)
        return status, error.read(), is_late


def _send(child: subprocess.Popen[bytes], kind: str) -> None:
    assert child.stdout is not None
    if kind == "SIGPIPE":  # the reader goes
        child.stdout.close()
        return
    number: Any = getattr(signal, kind.rpartition(" ")[2])
    child.send_signal(number)
    if kind.startswith("twice"):
        time.sleep(0.02)
        child.send_signal(number)
    child.stdout.read()
    child.stdout.close()


def _whole_or_not_there(folder: Path, argv: list[str], *, dead: bool) -> None:
    """Only a killed process leaves something, hidden; the next one clears it and ends well."""
    out, source = folder / "out", argv[1]
    hidden = [path.name for path in folder.iterdir() if path.name != "out"]
    require(dead or not hidden, f"left behind: {hidden}")
    require(all(name.startswith(".out.incomplete-") for name in hidden), f"left: {hidden}")
    if out.exists():
        require(check.main([str(out), "--run"]) == 0, "the folder is there and not whole")
        return
    convert(ConvertOptions(model=source, out=out, bits=8, group_size=32, measure=False))
    require([path.name for path in folder.iterdir()] == ["out"], "remains are not cleared")
