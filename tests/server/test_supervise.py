"""`serve --supervise` with real processes, killed in real ways."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.driving import call, until

CHAT = "/v1/chat/completions"
LONG = {
    "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1500, "ignore_eos": True,
    "stream": True,
}  # fmt: skip
SHORT = {**LONG, "max_tokens": 1, "stream": False}


@contextlib.contextmanager
def command(*more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command, and its port."""
    given = [sys.executable, "-m", "mlx_vlm_pipes.serve", "--port", "0", *more]
    process = subprocess.Popen(given, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        yield process, int(line.rsplit(":", 1)[1].split("/")[0])
    finally:
        process.kill()
        process.stderr.close()
        process.wait(10)


def child_of(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def is_well(port: int) -> bool:
    return call(port, "/health").status == 200


def begun_stream(port: int) -> socket.socket:
    """A long stream, its first bytes read."""
    body = json.dumps(LONG).encode()
    raw = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    raw.sendall(head.encode() + body)
    got = b""
    while b"delta" not in got:
        got += raw.recv(4096)
    return raw


def to_the_end(raw: socket.socket) -> bytes:
    got = b""
    with raw, contextlib.suppress(ConnectionResetError):
        while part := raw.recv(1 << 16):
            got += part
    return got


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
def test_a_killed_child_is_replaced_on_the_same_socket() -> None:
    with command("--supervise") as (parent, port):
        until(lambda: is_well(port))
        stream = begun_stream(port)
        os.kill(child_of(parent), signal.SIGKILL)
        assert b"[DONE]" not in to_the_end(stream)
        refused = call(port, CHAT, SHORT)  # while no child listens
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        assert refused.error["code"] == "restarting"
        until(lambda: is_well(port))
        assert call(port, CHAT, SHORT).status == 200
        stream, child = begun_stream(port), child_of(parent)
        parent.send_signal(signal.SIGTERM)
        assert to_the_end(stream).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert parent.wait(20) == 0
        assert not Path(f"/proc/{child}").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
def test_a_child_does_not_outlive_its_parent() -> None:
    with command("--supervise") as (parent, port):
        until(lambda: is_well(port))
        child = child_of(parent)
        parent.kill()
        until(lambda: not Path(f"/proc/{child}").exists())


def test_five_quick_deaths_are_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from mlx_vlm_pipes.server import supervise

    class Child:
        """Stands for the process: it dies at once."""

        def __init__(self, *_: Any, pass_fds: tuple[int, int], **__: Any) -> None:
            begun.append(pass_fds[0])

        def wait(self) -> int:
            return -9

    begun: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(supervise.subprocess, "Popen", Child)
    monkeypatch.setattr(supervise, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(supervise, "say", said.append)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert asyncio.run(supervise.Supervisor([], listening).run()) == 1
        assert begun == [listening.fileno()] * 5
    assert said[0].endswith("of signal 9; starting it again in 0.01 s")
    assert said[-1] == "error: the server died 5 times in a row, last of signal 9"


@pytest.mark.slow
def test_a_mistake_of_the_users_is_not_tried_again(tmp_path: Path) -> None:
    given = [sys.executable, "-m", "mlx_vlm_pipes.serve", "--port", "0", "--supervise"]
    done = subprocess.run(
        [*given, "--model", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr


DEAD = """
import sys, threading
from mlx_vlm_pipes import loading, serve
from mlx_vlm_pipes.engine.scheduler import Scheduler
opened, step = loading.load, Scheduler.step
def failing(self):
    if self.stats.decode_steps > 50:
        raise RuntimeError("the device is gone")
    return step(self)
Scheduler.step = failing
sys.exit(serve.main(["--port", "0"]))
"""


@pytest.mark.slow
def test_a_dead_thread_ends_the_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", DEAD], stderr=subprocess.PIPE, text=True)
    with process:
        port = int(process.stderr.readline().rsplit(":", 1)[1].split("/")[0])
        until(lambda: is_well(port))
        replies: list[bytes] = []
        reader = threading.Thread(target=lambda: replies.append(call(port, CHAT, LONG).body))
        reader.start()
        assert process.wait(20) == 1
        reader.join(10)
        assert process.stderr.read().endswith("error: the thread of tiny-idefics3 has died\n")
    last = replies[0].rstrip().rpartition(b"\n\n")[2]
    assert json.loads(last.removeprefix(b"data: "))["error"]["type"] == "service_unavailable"
