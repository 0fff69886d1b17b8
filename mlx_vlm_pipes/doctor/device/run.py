"""The whole check of a machine: its parts, each in a process that may die without the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from mlx_vlm_pipes.doctor.device.parts import FACTS, PARTS, Part
from mlx_vlm_pipes.doctor.device.report import DeviceReport
from mlx_vlm_pipes.errors import clip

LIMIT_S = 600.0  # of one part; a GPU that hangs must not hang the report
Show = Callable[[int, str], None]


def examine_device(model: Path | None, show: Show) -> DeviceReport:
    """Run all parts, one after the other.

    Args: model, a folder whose speed is measured too; show, called with (parts done, what is
    being done). What fails, or kills its process, is in the report.
    """
    report = DeviceReport({})
    facts = Part(lambda *_: None, exact=False)
    for i, (name, part) in enumerate({FACTS: facts, **PARTS}.items()):
        show(i, name)
        run_child(report, name, part, command(name, model), lambda doing, i=i: show(i, doing))
    return report


def command(name: str, model: Path | None) -> list[str]:
    """The process of one part."""
    words = [sys.executable, "-m", "mlx_vlm_pipes.check", "--device", "--part", name]
    return words if model is None else [*words, str(model)]


def run_child(
    report: DeviceReport,
    name: str,
    part: Part,
    words: Sequence[str],
    show: Callable[[str], None],
    limit_s: float = LIMIT_S,
) -> None:
    """Run one part's process, whose lines of standard output are messages, into the report."""
    variables = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if part.exact:
        variables["MLX_ENABLE_TF32"] = "0"
    doing = name
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=said, text=True, env=variables, encoding="utf-8"
        )
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        try:
            for message in _messages(process.stdout):
                doing = message.get("doing", doing)
                show(doing)
                report.take(message)
            status = process.wait()
        finally:
            is_late = timer.finished.is_set()
            timer.cancel()
            process.kill()
            process.wait()
        if status:
            why = f"took more than {limit_s:g} s" if is_late else f"died ({_ending(status)})"
            report.fail(name, f"{why} at {doing!r}: {_last_line(said)}", part.remedy)


def _messages(stream: IO[str] | None) -> Any:
    """The JSON objects among the lines; a library may print others."""
    for line in stream or ():
        if line.startswith("{"):
            yield json.loads(line)


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _last_line(said: IO[str]) -> str:
    said.seek(0)
    lines = said.read().strip().splitlines()
    return clip(lines[-1], 200) if lines else "it said nothing"
