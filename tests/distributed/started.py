"""Processes of this machine as the ranks of one model, started as `mlx.launch` does but watched by
the test: the launcher itself ends all of them once one has failed, and its own status may be 0."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Started:
    """Ranks that run Python with these arguments, and what each has written."""

    def __init__(
        self, size: int, arguments: Sequence[str], folder: Path, env: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            own = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "PYTHONPATH": str(ROOT)}
            with self._log(rank, "out").open("w") as out, self._log(rank, "err").open("w") as err:
                command = [sys.executable, *arguments]
                started = subprocess.Popen(
                    command, env={**os.environ, **own, **(env or {})}, stdout=out, stderr=err
                )
            self.processes.append(started)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def out(self, rank: int) -> str:
        return self._log(rank, "out").read_text()

    def err(self, rank: int) -> str:
        return self._log(rank, "err").read_text()

    def wait_for(self, text: str, rank: int = 0, timeout_s: float = 120) -> None:
        """Until the rank has written it. Raises: AssertionError with what it has written."""
        end = time.monotonic() + timeout_s
        while text not in self.out(rank):
            assert time.monotonic() < end, f"no {text!r}: {self.out(rank)}{self.err(rank)[-2000:]}"
            assert self.processes[rank].poll() is None, self.err(rank)[-3000:]
            time.sleep(0.05)

    def ends(self, timeout_s: float) -> list[int]:
        """The exit statuses, once all have ended. Raises: subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout_s
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def _log(self, rank: int, kind: str) -> Path:
        return self.folder / f"rank{rank}.{kind}"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for listening in sockets:
        listening.bind(("127.0.0.1", 0))
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports
