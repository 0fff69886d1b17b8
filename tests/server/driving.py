"""A server of our own on a free port of this machine, and requests to it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.wire import web_server


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """What the events carry, but for the closing [DONE]."""
        parts = [part for part in self.body.decode().split("\n\n") if part.startswith("data: ")]
        assert parts[-1] == "data: [DONE]"
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def call(port: int, path: str, body: Any = None, **headers: str) -> Reply:
    """GET, or POST where there is a body: bytes as they are, else as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is None:
            connection.request("GET", path, headers=named)
        else:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, raw, named)
        answer = connection.getresponse()
        return Reply(answer.status, dict(answer.getheaders()), answer.read())


@contextlib.contextmanager
def running(server: Server, lifespan: Literal["on", "off"] = "off") -> Iterator[int]:
    """The port of a server that runs in a thread of this process."""
    web = web_server(server.app, server.settings.timeout_s, port=0, lifespan=lifespan)
    thread = threading.Thread(target=lambda: asyncio.run(web.serve()), daemon=True)
    thread.start()
    until(lambda: web.started)
    try:
        yield web.servers[0].sockets[0].getsockname()[1]
    finally:
        web.should_exit = True
        thread.join(10)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait. Raises: AssertionError where it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.005)
