"""Bodies that no client should send, drawn at random: each is answered, none with a 500."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from tests.fixtures_helper import FIXTURES
from tests.server.driving import call, running

CASES = 100
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
BOX = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
PLACE = {**BOX, "x-coordinates": "source", "x-image": 0}
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
    "$defs": {"b": {"anyOf": [{"prefixItems": [{"type": "number"}]}, {"$ref": "#/$defs/b"}]}},
}  # fmt: skip
SEEN = {**SCHEMA, "properties": {"a": {"$ref": "#/$defs/b"}, "c": PLACE}}
PNG = (  # one grey pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCB"
    "d81ytgAAAABJRU5ErkJggg=="
)
PARTS = [
    {"type": "text", "text": "Who?"},
    {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
]
GREY = {"type": "base64", "media_type": "image/png", "data": PNG.partition(",")[2]}
FILES = [{"type": "file", "file": {"filename": "a.png", "file_data": PNG}}, {"image": PNG}]
TURNS = [{"role": "user", "content": PARTS[:1]}, {"role": "assistant", "content": "A."}]
USER = {"role": "user", "content": [*PARTS[:1], {"type": "input_text", "text": "b"}]}
CALLED = {"type": "function", "id": "c", "function": {"name": "f", "arguments": "{}"}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "shapes", "messages": [{"role": "system", "content": "S"}, *TURNS, TURNS[0]],
        "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1, "n": 1,
        "stop": ["x"], "logit_bias": {"5": 1.0}, "logprobs": True, "top_logprobs": 2,
        "stream": False, "response_format": {
            "type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "tools": [], "metadata": {"a": 1}, "chat_template_kwargs": {},
        "reasoning_effort": "low", "thinking_budget": None,
    },
    "/v1/completions": {
        "prompt": ["a"], "max_tokens": 2, "echo": False, "logprobs": 1, "stop": "x", "n": 1,
        "presence_penalty": 0.1, "stop_token_ids": [3], "min_tokens": 0,
    },
    "/v1/responses": {
        "input": [USER, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": [
                      {"type": "input_image", "image_url": PNG}]}, TURNS[0]],
        "instructions": "S", "max_output_tokens": 2, "temperature": 0.5, "store": True,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        "previous_response_id": None, "metadata": {"a": [1]},
        "reasoning": {"effort": "low", "summary": "auto"},
        "tools": [{"type": "function", **TOOL, "parameters": SEEN}], "tool_choice": "none",
    },
    "/v1/messages": {
        "messages": [*TURNS, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c", "content": [*PARTS[:1], {
                "type": "document", "source": {"type": "text", "data": "A"}}]},
            {"type": "image", "source": GREY},
        ]}], "system": [{"type": "text", "text": "S"}], "max_tokens": 2, "stop_sequences": ["x"],
        "tool_choice": {"type": "none", "disable_parallel_tool_use": True},
        "thinking": {"type": "disabled", "budget_tokens": 5},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"},
        "tools": [{"name": "f", "input_schema": SCHEMA}],
    },
    "/v1/messages/count_tokens": {"messages": TURNS, "system": "S"},
    "/v1/chat/completions?": {
        "messages": [{"role": "user", "content": [FILES[1], "Where?"]}], "max_tokens": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SEEN}},
    },
    "/v1/plan?": {"messages": [{"role": "tool", "content": FILES}]},
    "/v1/plan": {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [CALLED]}]},
}  # fmt: skip


DEEP = (3, 50, 150, 400, 900, 20_000)  # levels; a text stands for each until it is sent

DRAWN: list[Callable[[random.Random], Any]] = [
    lambda r: None, lambda r: r.random() < 0.5,
    lambda r: r.choice([0, -1, 1, 2**31, 2**63, 10**400]),
    lambda r: r.choice([0.5, -0.0, 1e308, float("inf"), float("nan")]),
    lambda r: r.choice(["", "x", "\ud800", "\0", "é" * 50, "{{ x }}", "{% for %}", "data:,"]),
    lambda r: "a" * 9999,
    lambda r: r.choice([[], {}, [[]], [None], [{}], {"": None}, {"type": {}}, {"type": []}]),
    lambda r: f"@{r.choice(DEEP)}@", lambda r: {"type": "text", "text": 5},
    lambda r: {"$ref": "#"}, lambda r: [{"role": "user", "content": [{"type": "image"}]}],
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def broken(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The body with one to three values changed, left out, repeated or swapped."""
    made = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        found = list(places(made))
        if not found:
            break
        inside, key = rng.choice(found)
        way = rng.random()
        if way < 0.7:
            inside[key] = rng.choice(DRAWN)(rng)
        elif way < 0.8:
            del inside[key]
        else:
            other, at = rng.choice(found)
            inside[key] = copy.deepcopy(other[at]) if at in other or isinstance(other, list) else 1
    return made


def test_nothing_that_is_sent_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    rng, paths = random.Random(13), list(BODIES)
    with load(FIXTURES / "qwen25vl") as pipe:
        models = Models({"shapes": lambda: pipe})
        models.load(models.first)
        with running(Server(models, ServerSettings(max_tokens=4))) as port:
            for path, body in BODIES.items():
                assert call(port, path, body).status == 200, path  # each is whole before it breaks
            for i in range(CASES):
                path = paths[i % len(paths)]
                body = broken(BODIES[path], rng)
                raw = json.dumps(body)
                for levels in DEEP:
                    nested = '{"a":[' * levels + "]}" * levels
                    raw = raw.replace(f'"@{levels}@"', nested)
                reply = call(port, path, raw.encode())
                assert reply.status in (200, 400, 404), (i, path, raw[:2000], reply.body)
                assert b"internal_error" not in reply.body, (i, path, raw[:2000])
                if reply.status != 200:
                    assert reply.error["message"]
    assert not caplog.records
