"""The connections: uvicorn's, with limits of time on clients that neither send nor read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_vlm_pipes.server.errors import ApiError

HEAD_BYTES = 64 * 1024  # of a request's line and headers


class QuietServer(uvicorn.Server):
    """Signals are the caller's: uvicorn would end the process with one after a drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def web_server(app: ASGIApp, timeout_s: float, **options: Any) -> QuietServer:
    """A uvicorn server of an application. options: of uvicorn.Config."""

    class Connection(_Connection):
        limit_s = timeout_s

    config = uvicorn.Config(
        app, http=Connection, ws="none", log_level="warning", access_log=False,
        h11_max_incomplete_event_size=HEAD_BYTES, timeout_graceful_shutdown=1, **options,
    )  # fmt: skip
    return QuietServer(config)


class _Connection(H11Protocol):
    """One connection. Between two requests at most limit_s go by, however many bytes come: half a
    header, or the rest of a body whose request was answered, is not held for ever. Neither is a
    client that reads nothing of its answer for that long."""

    limit_s: float
    _silence: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._silence, self._stall = _stopped(self._silence), _stopped(self._stall)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = _stopped(self._stall)
        self._stall = self.loop.call_later(self.limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall = _stopped(self._stall)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # it has not read the answer: a close would wait for that
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP."""
        self._refuse(ApiError(400, msg, code="invalid_http"), "Bad Request")

    def _watch(self) -> None:
        """Start the clock where no request is being answered, stop it where one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._silence = _stopped(self._silence)
        elif self._silence is None and not self.transport.is_closing():
            self._silence = self.loop.call_later(self.limit_s, self._end_silence)

    def _end_silence(self) -> None:
        began, _ = self.conn.trailing_data
        if began and self.cycle is None:
            message = f"the headers took longer than {self.limit_s:g} s"
            self._refuse(ApiError(408, message, code="timeout"), "Request Timeout")
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError, phrase: str) -> None:
        body = json.dumps(error.body()).encode()
        self.transport.write(
            f"HTTP/1.1 {error.status} {phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        self.transport.close()


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
