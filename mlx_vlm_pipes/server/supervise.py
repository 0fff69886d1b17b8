"""A parent that holds the listening socket and starts the serving process again when it dies."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_vlm_pipes.command import USER_MISTAKE, say
from mlx_vlm_pipes.server.errors import ApiError

FIRST_WAIT_S, MAX_DEATHS = 0.5, 5
QUICK_S = 60.0  # a child that lived longer is not one that cannot start
CLIENT_S = 2.0  # for a request that is answered with a 503
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """Keeps a child on the socket, and answers 503 on it while there is none.

    arguments: of `python -m mlx_vlm_pipes.serve`, to which the file descriptors are added.
    """

    def __init__(self, arguments: Sequence[str], listening: socket.socket) -> None:
        self._arguments, self._listening = list(arguments), listening
        self._stopping = asyncio.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Exit status: 0 where it was told to end, 2 for a user's mistake, 1 where it gives up."""
        loop = asyncio.get_running_loop()
        self._listening.settimeout(0)
        for number in SIGNALS:
            loop.add_signal_handler(number, self._pass_on)
        deaths = 0
        while True:
            begun = time.monotonic()
            status = await self._one_child()
            if self._stopping.is_set() or status in (0, USER_MISTAKE):
                return status
            deaths = deaths + 1 if time.monotonic() - begun < QUICK_S else 1
            if deaths == MAX_DEATHS:
                say(f"error: the server died {deaths} times in a row, last {_how(status)}")
                return 1
            wait_s = FIRST_WAIT_S * 2 ** (deaths - 1)
            say(f"the server died {_how(status)}; starting it again in {wait_s:g} s")
            with self._refusing():
                stopped = asyncio.create_task(self._stopping.wait())
                await asyncio.wait({stopped}, timeout=wait_s)
                stopped.cancel()
            if self._stopping.is_set():
                return 0

    def _pass_on(self) -> None:
        """A first signal lets the child drain; a second one ends it at once."""
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)
        self._stopping.set()

    async def _one_child(self) -> int:
        """Start it, refuse until it listens, wait for its end. Returns: its exit status."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                fds = (self._listening.fileno(), theirs.fileno())
                command = [sys.executable, "-m", "mlx_vlm_pipes.serve", *self._arguments]
                self._child = subprocess.Popen(
                    [*command, "--child-fds", f"{fds[0]},{fds[1]}"],
                    pass_fds=fds,
                    start_new_session=True,  # Ctrl-C comes from here, once
                )
            ours.settimeout(0)
            loop = asyncio.get_running_loop()
            with self._refusing():
                is_listening = bool(await loop.sock_recv(ours, 1))
            if is_listening:
                await loop.sock_recv(ours, 1)  # the end of its life
            status = await asyncio.to_thread(self._child.wait)
            self._child = None
            return status

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Meanwhile the socket is answered here. Not by asyncio.start_server: what it accepts while
        it is closed is forgotten."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listening, self._accept)
        try:
            yield
        finally:
            loop.remove_reader(self._listening)

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return  # it has gone, or the child was quicker
        task = asyncio.create_task(_refuse(connection))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)


async def _refuse(connection: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        await asyncio.wait_for(_say_503(reader, writer), CLIENT_S)
    except (OSError, EOFError, asyncio.TimeoutError, asyncio.LimitOverrunError):
        return  # it is slow, has gone, or speaks no HTTP
    finally:
        writer.transport.abort()


async def _say_503(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Whatever is asked; what the client still sends is read, so that it sees the answer."""
    await reader.readuntil(b"\r\n\r\n")
    error = ApiError(503, "the server is being started; try again", code="restarting")
    body = json.dumps(error.body()).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    writer.write_eof()
    while await reader.read(1 << 16):
        pass


def _how(status: int) -> str:
    return f"of signal {-status}" if status < 0 else f"with status {status}"
