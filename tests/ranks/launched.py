"""Processes of this machine as the ranks of a model: started as `mlx.launch` does, and what they
say. A rank's own code calls `joined` and `report`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_pipes.ranks import Ranks

ROOT = Path(__file__).parent.parent.parent


def launch(
    size: int, module: str, arguments: Sequence[str], folder: Path, timeout: float = 300
) -> list[Any]:
    """Run `python -m module arguments` as `size` ranks over MLX's ring; what each has reported.

    folder: for the ranks' reports and their list of hosts. Raises: AssertionError with the end of
    what a rank has written, if one fails; no process stays.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    processes = []
    for rank in range(size):
        extra = {
            "MLX_RANK": str(rank),
            "MLX_HOSTFILE": str(hosts),
            "MLX_ENABLE_TF32": "0",
            "PYTHONPATH": str(ROOT),
            "RANK_REPORT": str(folder / f"rank{rank}.json"),
        }
        with (folder / f"rank{rank}.txt").open("w") as log:
            command = [sys.executable, "-m", module, *arguments]
            started = subprocess.Popen(command, env=os.environ | extra, stdout=log, stderr=log)
        processes.append(started)
    try:
        ends = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / f"rank{rank}.txt").read_text()[-3000:] for rank in range(size)]
    assert not any(ends), f"ranks ended with {ends}:\n" + "\n".join(logs)
    reports = [folder / f"rank{rank}.json" for rank in range(size)]
    return [json.loads(path.read_text()) for path in reports]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for listening in sockets:
        listening.bind(("127.0.0.1", 0))
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


def joined() -> Ranks:
    """This rank among those that `launch` has started."""
    group = mx.distributed.init(strict=True, backend="ring")
    return Ranks(group.rank(), group.size(), group)


def report(facts: Any) -> None:
    """What the test is to know of this rank."""
    Path(os.environ["RANK_REPORT"]).write_text(json.dumps(facts))
