"""Who is let in, and what a client may not do to the others."""

from __future__ import annotations

import base64
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.server import body as bodies
from tests.server.driving import call, running
from tests.server.test_server import CHAT, plain, serve


@pytest.fixture(scope="module")
def port(pipe: Pipeline) -> Iterator[int]:
    with running(serve(pipe, api_keys=("one", "two"))) as port:
        yield port


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{key}".encode()).decode()


def test_every_path_but_health_wants_a_key(port: int) -> None:
    assert [call(port, path).status for path in ("/health", "/health/live")] == [200, 200]
    for path in ("/", "/v1/models", "/metrics", "/v1/models/x", "/nope", "/v1/responses/x", CHAT):
        refused = call(port, path)
        assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        kind = refused.headers["www-authenticate"].split()[0]
        assert kind == ("Basic" if path == "/" else "Bearer")  # a browser asks where it says Basic
    for wrong in ("Bearer wrong", "Bearer", "Basic !", basic("wrong"), basic("\xff"), "one"):
        assert call(port, CHAT, plain(), authorization=wrong).status == 401
    assert call(port, "/v1/messages", {}).json["type"] == "error"


def test_a_key_is_taken_from_clients_and_browsers(port: int) -> None:
    for headers in ({"authorization": "Bearer two"}, {"x_api_key": "one"},
                    {"authorization": basic("two")}):  # fmt: skip
        assert call(port, CHAT, plain(max_tokens=1), **headers).status == 200
        assert b"<title>" in call(port, "/", **headers).body
    key, here = basic("one"), f"127.0.0.1:{port}"
    for origin, status in (("https://evil.example", 401), ("null", 401), (f"http://{here}", 200)):
        reply = call(port, CHAT, plain(max_tokens=1), authorization=key, origin=origin)
        assert reply.status == status  # a page of others would have the browser send the password


EVIL = "x\r\nX-Evil: 1"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, plain(model=EVIL)),
        (CHAT, plain(max_tokens=1, stream=True, user=EVIL, metadata={EVIL: EVIL})),
        ("/v1/responses", {"input": "Who?", "previous_response_id": EVIL}),
        ("/v1/models/x%0d%0aX-Evil:%201", None),
        ("/v1/responses/x%0d%0aX-Evil:%201", None),
        ("/v1/models/", None),
        ("//evil.example/%2e%2e/v1/models/", None),
        ("/nope%0d%0aX-Evil:%201", None),
    ],
)
def test_nothing_of_the_clients_is_in_a_header(port: int, path: str, body: Any) -> None:
    named = {"authorization": "Bearer one", "x_request_id": "evil", "host": "localhost:1"}
    reply = call(port, path, body, **named)
    assert "x-evil" not in reply.headers
    assert not {"location", "x-request-id"} & reply.headers.keys()
    assert not any("evil" in value.lower() for value in reply.headers.values())
    assert reply.status in (200, 404)


@pytest.mark.parametrize("key", ["one\rX-Evil: 1", "one\x00", "\xff\xfe"])
def test_a_key_with_what_no_header_may_hold_is_refused(port: int, key: str) -> None:
    head = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(head.encode("latin-1"))
        assert raw.recv(100).split()[1] in (b"400", b"401")


def test_a_large_body_is_parsed_while_others_are_answered(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    loads = json.loads

    def slow(text: str, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        return loads(text, **options)

    large = json.dumps(plain(max_tokens=1, user="x" * bodies.SMALL_BYTES)).encode()
    replies = []

    def send() -> None:
        replies.append(call(port, CHAT, large, authorization="Bearer one"))

    client = threading.Thread(target=send)
    with monkeypatch.context() as patched:
        patched.setattr(bodies.json, "loads", slow)
        client.start()
        assert begun.wait(20)
        began = time.monotonic()
        assert call(port, "/health").status == 200
        assert time.monotonic() - began < 10
        go_on.set()
        client.join(20)
    assert [reply.status for reply in replies] == [200]


def test_warnings_of_the_web_server_are_written() -> None:
    assert logging.getLogger("uvicorn.error").isEnabledFor(logging.WARNING)
