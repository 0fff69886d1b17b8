"""The server over real sockets, with the bundled model behind it."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from tests.server.driving import call, running, until

IMAGES = Path(__file__).parents[2] / "examples" / "images"
CHAT = "/v1/chat/completions"
NAME = "shapes"


def data_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((IMAGES / name).read_bytes()).decode()


def chat(
    text: str = "Describe the picture.", url: str | None = None, **more: Any
) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": url or data_url("shapes.png")}}
    content = [picture, {"type": "text", "text": text}]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **more}


def plain(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Who?"}], **more}


def serve(pipe: Pipeline, **settings: Any) -> Server:
    models = Models({NAME: lambda: pipe})
    models.load(models.first)
    server = Server(models, ServerSettings(**settings))
    server.gate.rows = pipe.engine.config.max_batch_size
    return server


@pytest.fixture(scope="module")
def port(pipe: Pipeline) -> Iterator[int]:
    with running(serve(pipe, timeout_s=5.0)) as port:
        yield port


def test_a_chat_is_what_the_pipeline_answers(pipe: Pipeline, port: int) -> None:
    own = pipe.generate("Describe the picture.", [IMAGES / "shapes.png"])
    told = call(port, CHAT, chat(logprobs=True, top_logprobs=2)).json
    choice = told["choices"][0]
    assert choice["message"] == {
        "role": "assistant", "content": own.text.strip(), "refusal": None
    }  # fmt: skip
    assert (choice["finish_reason"], told["object"]) == ("stop", "chat.completion")
    assert told["usage"]["prompt_tokens"] == own.usage.prompt_tokens
    assert told["usage"]["completion_tokens"] == len(own.tokens)
    assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == own.usage.prompt_tokens - 1
    scored = choice["logprobs"]["content"]
    assert len(scored) == len(own.tokens)
    assert bytes(b for token in scored[:-1] for b in token["bytes"]).decode() == own.text
    assert all(len(token["top_logprobs"]) == 2 for token in scored)


def test_a_stream_tells_the_same_in_openais_order(port: int) -> None:
    whole = call(port, CHAT, chat()).json
    reply = call(port, CHAT, chat(stream=True, stream_options={"include_usage": True}))
    assert reply.headers["content-type"].startswith("text/event-stream")
    first, *middle, reason, usage = reply.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    text = "".join(event["choices"][0]["delta"]["content"] for event in middle)
    assert text == whole["choices"][0]["message"]["content"]
    assert (reason["choices"][0]["delta"], reason["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == (
        [], whole["usage"]["completion_tokens"],
    )  # fmt: skip
    assert {event["id"] for event in reply.events} == {first["id"]}


def test_n_answers_are_those_of_their_seeds(pipe: Pipeline, port: int) -> None:
    asked = plain(n=3, temperature=1.5, seed=5, max_tokens=8)
    own = pipe.generate_n("Who?", 3, temperature=1.5, seed=5, max_tokens=8)
    texts = [answer.text.lstrip() for answer in own]
    choices = call(port, CHAT, asked).json["choices"]
    assert [choice["message"]["content"] for choice in choices] == texts
    parts = [""] * 3
    for event in call(port, CHAT, {**asked, "stream": True}).events:
        for choice in event["choices"]:
            parts[choice["index"]] += choice["delta"].get("content") or ""
    assert parts == texts


def test_answers_in_a_form(port: int) -> None:
    properties = {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["colour", "size"]}
    schema["additionalProperties"] = False
    form = {
        "type": "json_schema",
        "json_schema": {"name": "shape", "strict": True, "schema": schema},
    }
    for more in ({"response_format": form}, {"guided_json": schema}):
        told = call(port, CHAT, plain(temperature=1.0, seed=1, max_tokens=100, **more)).json
        value = json.loads(told["choices"][0]["message"]["content"])
        assert value["colour"] in ("red", "blue")
    told = call(port, CHAT, plain(guided_regex="[ab]{3}")).json
    assert re.fullmatch("[ab]{3}", told["choices"][0]["message"]["content"])
    asked = {"input": "Who?", "text": {"format": {"type": "json_schema", "schema": schema}}}
    told = call(port, "/v1/responses", {**asked, "max_output_tokens": 100}).json
    assert "colour" in json.loads(told["output"][0]["content"][0]["text"])


def test_completions_continue_texts(pipe: Pipeline, port: int) -> None:
    prompts = ["a large", "a small red"]
    told = call(port, "/v1/completions", {"prompt": prompts, "max_tokens": 4, "echo": True, "n": 2})
    own = [pipe.generate(text, raw=True, max_tokens=4).text for text in prompts for _ in range(2)]
    texts = [choice["text"] for choice in told.json["choices"]]
    assert texts == [
        p + t for p, t in zip([p for p in prompts for _ in range(2)], own, strict=True)
    ]
    asked = {"prompt": "a large", "max_tokens": 4, "logprobs": 2}
    refused = call(port, "/v1/completions", {**asked, "echo": True})
    assert (refused.status, refused.error["param"]) == (400, "echo")
    scored = call(port, "/v1/completions", asked)
    scores = scored.json["choices"][0]["logprobs"]
    assert scores["text_offset"][1] == len(scores["tokens"][0])
    asked["stream"] = True
    parts = [
        event["choices"][0]["logprobs"] for event in call(port, "/v1/completions", asked).events
    ]
    assert [at for part in parts if part for at in part["text_offset"]] == scores["text_offset"]


SCHEMA_FROG = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frog"}}}
WRONG: list[tuple[Any, str | None, str]] = [
    (b"[" * 100_000, None, "no JSON"),
    (b"[1]", None, "expected an object"),
    (plain(stop=5), "stop", "stop is 5"),
    (plain(stop=[None]), "stop", "stop is [None]"),
    (plain(stream="yes"), "stream", "True or False"),
    (plain(logprobs="yes"), "logprobs", "True or False"),
    (plain(top_logprobs=3), "top_logprobs", "needs logprobs"),
    (plain(temperature=float("inf")), "temperature", "finite"),
    (plain(stream_options={"include_usage": True}), "stream_options", "without stream"),
    (plain(stream=True, stream_options={"usage": 1}), "stream_options", "include_usage"),
    (plain(max_completion_tokens=0), "max_completion_tokens", "max_completion_tokens is 0"),
    (plain(max_completion_tokens=1, max_tokens=1), "max_completion_tokens", "give one"),
    (plain(logit_bias={"a": 1}), "logit_bias", "token ids"),
    (plain(n=0), "n", "n is 0"),
    (plain(modalities=["audio"]), "modalities", "not supported"),
    (plain(response_format={"type": "xml"}), "response_format", "json_schema"),
    (plain(response_format={"type": "json_schema"}), "response_format", "no schema"),
    (plain(response_format=SCHEMA_FROG), "response_format", "Invalid type"),
    (plain(guided_regex=5), "guided_regex", "no text"),
    (plain(guided_regex="a", guided_json={}), "guided_json", "one form"),
    (plain(adapter="mine"), "adapter", "mine"),
    (plain(guided_regex="(", max_tokens=5), "guided_regex", "regex"),
    (plain(guided_regex="a", ignore_eos=True), "ignore_eos", "leave it out"),
    (plain(guided_regex="a", min_tokens=5), "min_tokens", "forbid"),
    (plain(logit_bias={"10000000": 1}), "logit_bias", "vocabulary"),
    (plain(thinking_budget=5), "thinking_budget", "leave it out"),
    (plain(reasoning_effort="most"), "reasoning_effort", "none, minimal"),
    (plain(max_tokens=5000), "messages", "this model holds 2048"),
    ({"messages": "Who?"}, "messages", "no list"),
    ({"messages": [5]}, "messages", "message 0"),
    (chat(url="file:///etc/passwd"), "messages", "--media-root"),
    (chat(url="/etc/passwd"), "messages", "--media-root"),
    (chat(url="http://127.0.0.1/a.png"), "messages", "--allow-url-host"),
    (chat(url="data:image/png;base64,AAAA"), "messages", "picture"),
]


@pytest.mark.parametrize(("body", "param", "words"), WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_a_400_that_names_it(port: int, body: Any, param: str, words: str) -> None:
    reply = call(port, CHAT, body)
    assert (reply.status, reply.error["param"]) == (400, param), reply.body
    assert words in reply.error["message"]
    assert "\n" not in reply.error["message"]


def test_other_refusals_have_their_status(port: int) -> None:
    assert call(port, CHAT, chat(model="gpt")).error["code"] == "model_not_found"
    assert [call(port, path).status for path in ("/v1/models/gpt", "/nope", CHAT)] == [
        404,
        404,
        405,
    ]
    assert call(port, CHAT, plain(), host="evil.example").status == 403
    assert call(port, "/v1/models").json["data"][0]["id"] == NAME


def test_bodies_are_bounded_in_size_and_time(pipe: Pipeline) -> None:
    with running(serve(pipe, max_body_bytes=1000, timeout_s=0.3)) as port:
        assert call(port, CHAT, b" " * 1001).status == 413
        chunked = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(chunked % CHAT.encode() + b"3e9\r\n" + b" " * 1001 + b"\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 413")
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(chunked % CHAT.encode() + b"1\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 408")


def test_files_are_read_below_the_media_root_only(pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b.png").write_bytes((IMAGES / "shapes.png").read_bytes())
    (tmp_path / "out.png").write_bytes((IMAGES / "shapes.png").read_bytes())
    os.symlink(tmp_path / "out.png", tmp_path / "in" / "link.png")
    with running(serve(pipe, media_root=tmp_path / "in")) as port:
        for url in ("a b.png", f"file://{tmp_path}/in/a%20b.png"):
            assert "red circle" in call(port, CHAT, chat(url=url)).body.decode()
        for url in ("../out.png", "link.png", f"{tmp_path}/out.png", "none.png", "a\0b", "."):
            assert call(port, CHAT, chat(url=url)).error["code"] == "invalid_media"


def test_a_full_queue_is_a_429_before_anything_is_read(pipe: Pipeline) -> None:
    server = serve(pipe, max_waiting=2)
    server.gate.rows = 1
    with running(server) as port:
        held = [_half_sent(port) for _ in range(3)]
        until(lambda: server.gate.inside == 3)
        reply = call(port, CHAT, plain())
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        for each in held:
            each.close()
        until(lambda: server.gate.inside == 0)
        assert call(port, CHAT, plain(max_tokens=1)).status == 200


def _half_sent(port: int) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port))
    raw.sendall(
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{" % CHAT.encode()
    )
    return raw


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(pipe: Pipeline, port: int, stream: bool) -> None:
    body = json.dumps(plain(max_tokens=2000, ignore_eos=True, stream=stream)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    engine = pipe.engine
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(head.encode() + body)
        until(lambda: engine.running == 1)
        raw.close()
        before = engine.stats.decode_steps
    until(lambda: engine.running + engine.waiting == 0)
    assert engine.stats.decode_steps - before < 500


def test_counters_and_gauges(pipe: Pipeline) -> None:
    with running(serve(pipe)) as port:
        told = call(port, CHAT, chat()).json
        text = call(port, "/metrics").body.decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    prefix = "mlx_vlm_pipes_"
    assert float(lines[prefix + "generation_tokens_total"]) == told["usage"]["completion_tokens"]
    assert float(lines[prefix + "prompt_tokens_total"]) == told["usage"]["prompt_tokens"]
    assert float(lines[prefix + "requests_running"]) == 0
    assert float(lines[f'{prefix}requests_total{{path="{CHAT}",status="200"}}']) == 1


def test_a_failure_of_ours_is_a_500_without_its_text(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    with running(serve(pipe)) as port:
        monkeypatch.setattr(pipe, "encode", fail)
        reply = call(port, CHAT, plain())
    assert (reply.status, b"secret" in reply.body) == (500, False)


def test_the_command_drains_and_ends_with_0() -> None:
    command = [sys.executable, "-m", "mlx_vlm_pipes.serve", "--port", "0", "--timeout", "20"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().rsplit(":", 1)[1].split("/")[0])
        assert process.stderr.readline().startswith("ready: tiny-idefics3")
        replies: list[Any] = []
        asked = plain(max_tokens=600, ignore_eos=True, stream=True)
        client = threading.Thread(target=lambda: replies.append(call(port, CHAT, asked)))
        client.start()
        until(lambda: b"running 1.0" in call(port, "/metrics").body)
        process.send_signal(signal.SIGTERM)
        until(lambda: call(port, "/health").status == 503)
        assert call(port, CHAT, plain()).error["code"] == "draining"
        client.join(30)
        assert replies[0].events[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0


def test_a_model_that_cannot_be_opened_ends_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlx_vlm_pipes.serve", "--port", "0", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
