"""Server-sent events: a response that ends its work when the client goes or no longer reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING_S = 15.0  # a comment that often in a long prefill, so that no proxy takes it for dead
PING = b": still working\n\n"


def event(value: dict[str, Any] | str, name: str | None = None) -> bytes:
    """One event. value: JSON, or a text as it is; name: its type, where a dialect has some."""
    data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


class EventStream(Response):
    """Sends events as they are made; ends at once where the client has gone. close: is called at
    the end, however it comes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], object]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self._close()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        now = asyncio.get_running_loop().time
        self._sent_at = now()
        pings = asyncio.create_task(self._ping(send))
        try:
            async with aclosing(self._events) as events:  # pyright: ignore[reportArgumentType]
                async for part in events:
                    self._sent_at = now()
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        """A comment wherever no event has come for a while."""
        now = asyncio.get_running_loop().time
        while True:
            left = self._sent_at + PING_S - now()
            if left > 0:
                await asyncio.sleep(left)
                continue
            self._sent_at = now()
            await send({"type": "http.response.body", "body": PING, "more_body": True})


async def disconnected(receive: Receive) -> None:
    """Returns once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
