"""Clients that speak HTTP badly, slowly or not at all."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from tests.server.driving import call, running, until

CHAT = "/v1/chat/completions"
LIMIT_S = 0.4


def serve(pipe: Pipeline, **settings: Any) -> Server:
    models = Models({"shapes": lambda: pipe})
    models.load(models.first)
    server = Server(models, ServerSettings(max_body_bytes=1 << 20, **settings))
    server.gate.rows = pipe.engine.config.max_batch_size
    return server


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Server:
    return serve(pipe, timeout_s=LIMIT_S)


@pytest.fixture(scope="module")
def port(server: Server) -> Iterator[int]:
    with running(server) as port:
        yield port


def ask(text: str = "Who?", **more: Any) -> bytes:
    """A whole request of a chat, as bytes."""
    body = json.dumps({"messages": [{"role": "user", "content": text}], **more}).encode()
    return post(body, f"Content-Length: {len(body)}")


def post(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST {CHAT} HTTP/{version}", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def connected(port: int) -> socket.socket:
    raw = socket.socket()
    raw.settimeout(20)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", port))
    return raw


def answer_to(port: int, *parts: bytes) -> bytes:
    """All that comes until the server closes."""
    with connected(port) as raw:
        for part in parts:
            raw.sendall(part)
        return to_the_end(raw)


def to_the_end(raw: socket.socket) -> bytes:
    got = b""
    while part := raw.recv(1 << 16):
        got += part
    return got


@pytest.mark.parametrize("begun", [b"POST ", ask()[:40]])
def test_half_a_header_is_not_held(port: int, begun: bytes) -> None:
    assert answer_to(port, begun)[:12] in (b"HTTP/1.1 408", b"")


def test_a_used_connection_is_not_held_by_bytes_that_drip(port: int) -> None:
    with connected(port) as raw:
        raw.sendall(ask(max_tokens=1))
        until(lambda: b"usage" in raw.recv(1 << 16))
        with pytest.raises(OSError):  # noqa: PT011  reset, or a broken pipe
            drip(raw, b"P")


def test_the_rest_of_a_body_is_not_waited_for(port: int) -> None:
    with connected(port) as raw:
        raw.sendall(post(b"{", f"Content-Length: {100 << 20}"))
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 413")
        with pytest.raises(OSError):  # noqa: PT011  reset, or a broken pipe
            drip(raw, b" ")


def drip(raw: socket.socket, part: bytes) -> None:
    for _ in range(40):
        raw.sendall(part)
        time.sleep(LIMIT_S / 8)


def test_a_client_that_sends_more_than_it_may_still_reads_why(pipe: Pipeline) -> None:
    with running(serve(pipe, timeout_s=10.0)) as port:
        reply = call(port, CHAT, b" " * (20 << 20))
    assert (reply.status, reply.error["type"]) == (413, "invalid_request_error")


BROKEN = [
    post(b"{}", "Content-Length: two"),
    post(b"{}", "Content-Length: -1"),
    post(b"{}", "Content-Length: 2", "Content-Length: 3"),
    post(b"{}", "Content-Length: 2", "Host: evil.example"),
    post(b"{}", "Content-Length: 2", "A\0b: c"),
    post(b"", "X: " + "y" * 70_000),
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://localhost:99999999/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
]


@pytest.mark.parametrize("request_bytes", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_http_is_told_so(
    port: int, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    got = answer_to(port, request_bytes)
    assert got[:11] == b"HTTP/1.1 40", got
    assert set(json.loads(got.partition(b"\r\n\r\n")[2])) == {"error"}
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


def test_several_requests_on_one_connection_and_the_older_http(port: int) -> None:
    got = answer_to(port, ask(max_tokens=1) * 3)  # sent before the first is answered
    assert got.count(b"HTTP/1.1 200") == got.count(b'"usage"') == 3
    body = json.dumps({"messages": [{"role": "user", "content": "Who?"}], "stream": True}).encode()
    older = post(body, f"Content-Length: {len(body)}", version="1.0").replace(
        b"Host: localhost\r\n", b""
    )
    got = answer_to(port, older)
    assert got.endswith(b"data: [DONE]\n\n")
    assert b"Transfer-Encoding" not in got


@pytest.mark.slow
def test_a_client_that_does_not_read_frees_its_row(server: Server, pipe: Pipeline) -> None:
    asked = ask(
        stream=True, n=8, max_tokens=1500, ignore_eos=True, logprobs=True, top_logprobs=20
    )  # more than the sockets of both sides hold
    with running(server) as port, connected(port) as raw:
        raw.sendall(asked)
        until(lambda: pipe.engine.running > 0)
        until(lambda: pipe.engine.running + pipe.engine.waiting + server.gate.inside == 0, 60)
        assert b"[DONE]" not in what_is_left(raw)


def what_is_left(raw: socket.socket) -> bytes:
    try:
        return to_the_end(raw)
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_its_prompt_is_read_leaves_nothing(
    server: Server,
    pipe: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    reading, gone, encode = threading.Event(), threading.Event(), pipe.encode

    def slowly(*given: Any, **options: Any) -> Any:
        reading.set()
        assert gone.wait(10)
        return encode(*given, **options)

    monkeypatch.setattr(pipe, "encode", slowly)
    with running(server) as port:
        with connected(port) as raw:
            raw.sendall(ask(stream=stream, n=2, max_tokens=2000, ignore_eos=True))
            assert reading.wait(10)
        time.sleep(0.1)  # the server learns that it has gone
        gone.set()
        until(lambda: server.gate.inside == 0)
        steps = pipe.engine.stats.decode_steps
        until(lambda: pipe.engine.running + pipe.engine.waiting == 0)
        assert pipe.engine.stats.decode_steps - steps < 500
    assert not caplog.records
