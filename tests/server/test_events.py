"""A stream of events as ASGI sends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mlx_vlm_pipes.server import events
from mlx_vlm_pipes.server.events import EventStream


async def sent(made: AsyncIterator[bytes], gone_s: float | None = None) -> list[bytes]:
    """The bodies of a stream whose client goes after that time, if it does."""
    bodies, closed = [], []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])

    async def receive() -> Any:
        await asyncio.sleep(3600 if gone_s is None else gone_s)
        return {"type": "http.disconnect"}

    await EventStream(made, lambda: closed.append(True))({"type": "http"}, receive, send)
    assert closed == [True]
    return bodies


async def slow(waits: list[float], ended: list[bool]) -> AsyncIterator[bytes]:
    try:
        for i, seconds in enumerate(waits):
            await asyncio.sleep(seconds)
            yield f"{i}".encode()
    finally:
        ended.append(True)


def test_a_long_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PING_S", 0.1)
    ended: list[bool] = []
    bodies = asyncio.run(sent(slow([0.0, 0.01, 0.35, 0.01], ended)))
    pings = bodies.count(events.PING)
    assert 1 <= pings <= 3
    assert bodies == [b"0", b"1", *[events.PING] * pings, b"2", b"3", b""]
    assert ended


def test_a_client_that_goes_ends_what_makes_the_events() -> None:
    ended: list[bool] = []
    assert asyncio.run(sent(slow([0.0, 3600.0], ended), gone_s=0.05)) == [b"0"]
    assert ended
