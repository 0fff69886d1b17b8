"""Pictures over HTTP: in tools' results, in documents, and the places that answers name in them."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from mlx_vlm_pipes import load
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.processing import pdf
from mlx_vlm_pipes.processing.types import ProcessedPrompt
from tests.fixtures_helper import FIXTURES
from tests.server.driving import call, running
from tests.server.test_server import CHAT, data_url, serve

RED, BLUE = Image.new("RGB", (300, 200), "red"), Image.new("RGB", (60, 90), "blue")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load(FIXTURES / "qwen25vl") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def port(pipe: Pipeline) -> Iterator[int]:
    with running(serve(pipe, max_media=3)) as port:
        yield port


@pytest.fixture
def read(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[ProcessedPrompt]:
    """The prompts that the server has read."""
    seen: list[ProcessedPrompt] = []
    encode = pipe.encode

    def noted(*arguments: Any, **options: Any) -> ProcessedPrompt:
        prompt = encode(*arguments, **options)
        if prompt not in arguments:  # one that was read before is handed back
            seen.append(prompt)
        return prompt

    monkeypatch.setattr(pipe, "encode", noted)
    return seen


BOX = {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}
SCHEMA = {
    "type": "object",
    "properties": {"box": {**BOX, "x-coordinates": "source"}},
    "required": ["box"],
    "additionalProperties": False,
}


def test_places_are_told_in_pixels_of_the_picture(pipe: Pipeline, port: int) -> None:
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 200}
    own = pipe.generate("Where?", RED, schema=SCHEMA, **drawn)
    url = f"data:image/png;base64,{encoded(RED)}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Where?"}]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = {"messages": [{"role": "user", "content": content}], "response_format": form, **drawn}
    whole = call(port, CHAT, body).json["choices"][0]["message"]["content"]
    assert own.parsed != json.loads(own.text)
    assert json.loads(whole) == own.parsed
    events = call(port, CHAT, {**body, "stream": True}).events
    parts = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(parts) == whole
    refused = call(port, CHAT, {**body, "messages": [{"role": "user", "content": "Where?"}]})
    assert (refused.status, refused.error["param"]) == (400, "response_format")
    assert "no picture" in refused.error["message"]


BY_HAND = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nSee?<|im_end|>\n"
    "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n"
    "<|vision_start|><|image_pad|><|vision_end|>Seen:"
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
)


def test_pictures_of_a_tools_result_reach_the_model(
    pipe: Pipeline, port: int, read: list[ProcessedPrompt]
) -> None:
    sources = [encoded(RED), encoded(BLUE)]
    urls = [f"data:image/png;base64,{source}" for source in sources]
    called = {"id": "c", "type": "function", "function": {"name": "see", "arguments": "{}"}}
    parts = [[{"type": "image_url", "image_url": {"url": url}}] for url in urls]
    before = [
        {"role": "user", "content": "See?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
    ]
    text = {"type": "text", "text": "Seen:"}
    result = {"role": "tool", "tool_call_id": "c", "content": [*parts[0], text, *parts[1]]}
    chat = call(port, CHAT, {"messages": [*before, result], "max_tokens": 1}).json

    items = [
        {"role": "user", "content": "See?"},
        {"type": "function_call", "call_id": "c", "name": "see", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [
            {"type": "input_image", "image_url": urls[0]}, {"type": "input_text", "text": "Seen:"},
            {"type": "input_image", "image_url": urls[1]},
        ]},
    ]  # fmt: skip
    response = call(port, "/v1/responses", {"input": items, "max_output_tokens": 1}).json

    blocks: list[dict[str, Any]] = [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": source}}
        for source in sources
    ]
    blocks.insert(1, text)
    turns = [
        {"role": "user", "content": "See?"},
        {"role": "assistant", "content": [
            {"type": "tool_use", "id": "c", "name": "see", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c", "content": blocks}]},
    ]  # fmt: skip
    message = call(port, "/v1/messages", {"messages": turns, "max_tokens": 1}).json

    *read_by_server, own = [*read, pipe.encode(BY_HAND, [RED, BLUE], raw=True)]
    assert [prompt.input_ids for prompt in read_by_server] == [own.input_ids] * 3
    for prompt in read_by_server:
        assert [record.source_size for record in prompt.media] == [RED.size, BLUE.size]
    used = message["usage"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == len(own.input_ids)
    assert chat["usage"]["prompt_tokens"] == response["usage"]["input_tokens"]


def test_a_template_that_shows_no_pictures_of_tools_says_so() -> None:
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(BLUE)}"}}
    text = {"type": "text", "text": "Seen:"}
    messages = [
        {"role": "user", "content": "See?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "tool", "tool_call_id": "c", "content": [text, part]},
    ]
    with load(FIXTURES / "pixtral") as pipe, running(serve(pipe)) as port:
        refused = call(port, CHAT, {"messages": messages})
    assert (refused.status, refused.error["param"]) == (400, "messages")
    assert "shows no images in messages of the role tool" in refused.error["message"]


def test_a_pdf_is_as_many_pictures_as_it_has_pages(
    port: int, read: list[ProcessedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pdf._run
    drawn = functools.cache(lambda data, number: run(data, number, 60.0))  # each page once
    monkeypatch.setattr(pdf, "_run", lambda data, number, _: drawn(data, number))
    source = encoded(RED, "PDF", save_all=True, append_images=[BLUE])
    url = f"data:application/pdf;base64,{source}"
    document = {"type": "base64", "media_type": "application/pdf", "data": source}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("chat/completions", "messages", {"type": "file", "file": {"file_data": url}}),
        ("chat/completions", "messages", {"type": "file", "file": {"file_data": source}}),
        ("responses", "input", {"type": "input_file", "filename": "a.pdf", "file_data": url}),
        ("messages", "messages", {"type": "document", "source": document}),
    ]
    for path, name, part in asked:
        limit = "max_output_tokens" if name == "input" else "max_tokens"
        body = {name: [{"role": "user", "content": [part]}], limit: 1}
        assert call(port, f"/v1/{path}", body).status == 200
        first, second = (record.source_size for record in read[-1].media)
        assert first[0] > first[1]
        assert second[0] < second[1]
        body = {name: [{"role": "user", "content": [part, part]}], limit: 1}
        refused = call(port, f"/v1/{path}", body)
        assert (refused.status, refused.error["param"]) == (400, name)
        assert "takes 3 in a request (--max-media)" in refused.error["message"]
    chosen = {"type": "file", "file": {"file_data": f"{url}#page=2"}}
    call(port, CHAT, {"messages": [{"role": "user", "content": [chosen]}], "max_tokens": 1})
    assert len(read[-1].media) == 1
    unknown = {"type": "file", "file": {"file_id": "file-1"}}
    refused = call(port, CHAT, {"messages": [{"role": "user", "content": [unknown]}]})
    assert (refused.status, "file_id" in refused.error["message"]) == (400, True)


@pytest.mark.parametrize(
    "part",
    [
        {"image": "http://example.com/a.png"},
        {"image_url": {"url": "http://example.com/a.png"}},
        {"type": "", "video": "http://example.com/a.mp4"},
        {"type": "image", "base64": {"url": "http://example.com/a.png"}},
        {"type": "file", "file": {"url": "http://example.com/a.pdf#page=1"}},
        {"type": "document", "source": {"url": "http://example.com/a.pdf"}},
    ],
)
def test_no_way_of_writing_a_part_leads_to_a_host_that_is_not_allowed(
    port: int, part: dict[str, Any]
) -> None:
    refused = call(port, CHAT, {"messages": [{"role": "user", "content": [part]}]})
    assert (refused.status, refused.error["param"]) == (400, "messages")
    assert "--allow-url-host" in refused.error["message"]


def test_a_part_may_be_written_as_the_package_takes_it(port: int) -> None:
    parts = [{"image": data_url("shapes.png")}, "Who?"]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    assert call(port, CHAT, body).status == 200
