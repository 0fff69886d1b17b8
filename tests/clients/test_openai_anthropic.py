"""The clients of OpenAI and Anthropic against a server of ours."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.clients.conftest import ASK, CHAT, CITIES, ENCODED, WHO

pytestmark = pytest.mark.slow  # their imports alone take seconds
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": list(CITIES)}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_openai_chats(port: int, answer: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x")
    assert [model.id for model in client.models.list()] == ["shapes", "calling"]
    told = client.chat.completions.create(model="shapes", messages=CHAT)
    assert told.choices[0].message.content == answer
    with client.chat.completions.stream(model="shapes", messages=CHAT) as stream:
        assert stream.get_final_completion().choices[0].message.content == answer
    form = {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": SCHEMA}}
    told = client.chat.completions.create(
        model="shapes", messages=WHO, max_tokens=60, response_format=form
    )
    assert json.loads(told.choices[0].message.content)["city"] in CITIES
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="none", messages=WHO)
    assert caught.value.code == "model_not_found"


def test_openai_calls_tools_and_goes_on_from_responses(port: int) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x")
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    forced = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model="calling", messages=WHO, tools=[tool], tool_choice=forced, max_tokens=200
    ) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] in CITIES
    first = client.responses.create(model="shapes", input="Who?", max_output_tokens=8)
    more = {"previous_response_id": first.id, "max_output_tokens": 8}
    with client.responses.stream(model="shapes", input="And then?", **more) as stream:
        last = stream.get_final_response()
    assert (last.previous_response_id, bool(last.output_text)) == (first.id, True)


def test_openai_asks_twelve_things_at_once(port: int, answer: str) -> None:
    openai = pytest.importorskip("openai")

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x") as at:
            asked = (at.chat.completions.create(model="shapes", messages=CHAT) for _ in range(12))
            return await asyncio.gather(*asked)

    assert {told.choices[0].message.content for told in asyncio.run(ask())} == {answer}


def test_anthropic_chats_and_calls_tools(port: int, answer: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key="x")
    source = {"type": "base64", "media_type": "image/png", "data": ENCODED}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": ASK}]
    asked: Any = {"model": "shapes", "messages": [{"role": "user", "content": parts}]}
    assert client.messages.create(max_tokens=50, **asked).content[0].text == answer
    with client.messages.stream(max_tokens=50, **asked) as stream:
        assert stream.get_final_text() == answer
        used = stream.get_final_message().usage
    tokens = client.messages.count_tokens(**asked).input_tokens
    assert tokens == used.input_tokens + (used.cache_read_input_tokens or 0)
    tool = {"name": "weather", "input_schema": SCHEMA}
    forced: Any = {"tools": [tool], "tool_choice": {"type": "tool", "name": "weather"}}
    told = client.messages.create(model="calling", messages=WHO, max_tokens=200, **forced)
    assert told.stop_reason == "tool_use"
    assert told.content[-1].input["city"] in CITIES
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="shapes", messages=[], max_tokens=1)
