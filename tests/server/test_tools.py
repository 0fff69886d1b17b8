"""Tools and reasoning over HTTP: what the model writes is given, how it is told is compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.engine.requests import Chunk, Handle, Timings, Usage
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.processing.types import ProcessedPrompt
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from mlx_vlm_pipes.server.tools import call_grammar
from mlx_vlm_pipes.speech import FORMS, Kind, Speech
from tests.media.test_places import PIXELS
from tests.server.driving import call, running

CHAT = "/v1/chat/completions"
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": NOTHING}}
TEMPLATE = (
    "{% if tools %}Call with <tool_call>. {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls | default('') }}"
    "{% endfor %}assistant:{% if enable_thinking %}<think>{% endif %}"
)
ANSWER = 'On it.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("model") / "tools"
    shutil.copytree(BUNDLED, folder)
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with load(folder) as pipe:
        yield pipe


@pytest.fixture
def says(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What the model is made to write, a few characters a token."""

    def set_answer(answer: str) -> None:
        def submit_n(*_: Any, **__: Any) -> list[Handle]:
            handle = Handle()
            for i in range(0, len(answer), 3):
                handle.put(Chunk(answer[i : i + 3], 5))
            usage, timings = Usage(9, 0, 0, 0, 7), Timings(0.1, 0.1, 0.1)
            handle.put(Chunk("", 1, None, "stop", usage, timings))
            handle.put(None)
            return [handle]

        monkeypatch.setattr(pipe, "submit_n", submit_n)

    return set_answer


@pytest.fixture
def port(pipe: Pipeline) -> Iterator[int]:
    models = Models({"tools": lambda: pipe})
    models.load(models.first)
    with running(Server(models, ServerSettings())) as port:
        yield port


def asked(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Weather?"}], **more}


def test_a_call_is_told_whole_and_in_parts(port: int, says: Callable[[str], None]) -> None:
    says(ANSWER)
    choice = call(port, CHAT, asked(tools=[WEATHER])).json["choices"][0]
    (called,) = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("On it.", "tool_calls")
    assert (called["type"], called["function"]["name"]) == ("function", "weather")
    assert json.loads(called["function"]["arguments"]) == {"city": "Köln"}

    events = call(port, CHAT, asked(tools=[WEATHER], stream=True)).events
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "On it."
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert (parts[0]["function"]["name"], parts[0]["id"][:5]) == ("weather", "call_")
    assert {part["index"] for part in parts} == {0}
    assert len(parts) > 3
    text = "".join(part["function"].get("arguments", "") for part in parts)
    assert json.loads(text) == {"city": "Köln"}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_places_in_arguments_are_told_in_pixels(
    pipe: Pipeline, port: int, says: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of another family's is lent to the bundled model, which has no coordinates."""
    encode, seen = pipe.encode, [PIXELS]

    def lent(*arguments: Any, **options: Any) -> ProcessedPrompt:
        return replace(encode(*arguments, **options), media=list(seen))

    monkeypatch.setattr(pipe, "encode", lent)
    point = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    marked = {"type": "object", "properties": {"at": {**point, "x-coordinates": "source"}}}
    click = {"type": "function", "function": {"name": "click", "parameters": marked}}
    body = asked(tools=[click, WEATHER])
    written, told = '{"at": [125, 50], "raw": [125, 50]}', '{"at": [500, 250], "raw": [125, 50]}'
    calls = f'{{"name": "click", "arguments": {written}}}'
    plain = '{"name": "weather", "arguments": {"at": [1, 2]}}'
    says(f"[1, 2]<tool_call>\n{calls}\n</tool_call><tool_call>\n{plain}\n</tool_call>")
    message = call(port, CHAT, body).json["choices"][0]["message"]
    made = [one["function"]["arguments"] for one in message["tool_calls"]]
    assert (message["content"], made) == ("[1, 2]", [told, '{"at": [1, 2]}'])
    events = call(port, CHAT, {**body, "stream": True}).events
    parts = [p for e in events for p in e["choices"][0]["delta"].get("tool_calls", [])]
    first = [part["function"]["arguments"] for part in parts if part["index"] == 0]
    assert "".join(first) == told
    says(f"<tool_call>\n{calls[: calls.index('50') + 1]}")  # cut within the second number
    message = call(port, CHAT, body).json["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["arguments"] == '{"at": [500, 25'
    seen.clear()
    refused = call(port, CHAT, asked(tools=[click]))
    assert (refused.status, refused.error["param"]) == (400, "tools")


def test_without_tools_the_same_answer_is_text(port: int, says: Callable[[str], None]) -> None:
    says(ANSWER)
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message = call(port, CHAT, asked(**more)).json["choices"][0]["message"]
        assert (message["content"], "tool_calls" in message) == (ANSWER, False)


def test_reasoning_is_told_apart(port: int, says: Callable[[str], None]) -> None:
    says("Hm.</think>\n\nYes.")
    thinking = asked(chat_template_kwargs={"enable_thinking": True})
    message = call(port, CHAT, thinking).json["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    deltas = [
        e["choices"][0]["delta"] for e in call(port, CHAT, {**thinking, "stream": True}).events
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."


def test_tools_and_results_reach_the_template(pipe: Pipeline, port: int) -> None:
    function = {"name": "weather", "arguments": '{"city": "K"}'}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "20 degrees"},
    ]
    told = call(port, CHAT, {"messages": messages, "tools": [WEATHER], "max_tokens": 1}).json
    own = pipe.encode(messages, tools=[WEATHER])
    assert "20 degrees" in own.text
    assert told["usage"]["prompt_tokens"] == len(own.input_ids)


CITY = {"type": "object", "properties": {"city": {"enum": ["K", "B"]}}, "required": ["city"]}
TOWN = {"type": "function", "function": {"name": "town", "parameters": CITY}}


def test_a_forced_call_is_made(port: int) -> None:
    named = {"type": "function", "function": {"name": "town"}}
    for choice in ("required", named):
        more = {"tools": [WEATHER, TOWN], "tool_choice": choice, "parallel_tool_calls": False}
        told = call(port, CHAT, asked(temperature=1.0, seed=1, max_tokens=400, **more)).json
        (made,) = told["choices"][0]["message"]["tool_calls"]
        assert made["function"]["name"] in (("town",) if choice == named else ("town", "weather"))
        arguments = json.loads(made["function"]["arguments"])
        assert made["function"]["name"] == "weather" or arguments["city"] in ("K", "B")
        assert told["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("single", [True, False])
def test_each_form_is_forced_and_read(pipe: Pipeline, name: str, single: bool) -> None:
    """What the grammar of a form lets through, its reader takes apart."""
    functions = [{"name": "town", "parameters": CITY}, {"name": "now"}]
    text = call_grammar(FORMS[name], functions, pipe.tokenizer.token_id, is_single=single)
    answer = pipe.generate("Town?", grammar=text, temperature=1.5, seed=3, max_tokens=300)
    speech = Speech(FORMS[name])
    pieces = speech.add(answer.text) + speech.finish()
    assert {piece.kind for piece in pieces} == {Kind.CALL, Kind.ARGUMENTS}
    assert {piece.text for piece in pieces if piece.kind is Kind.CALL} <= {"town", "now"}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": "weather"}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [{"function": {"name": "f", "parameters": {"x-coordinates": "source"}}}]}, "tools"),
    ({"tools": [{"function": {"name": "f", "parameters": 5}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"function": {"name": "x"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("more", "param"), WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_a_400(port: int, more: dict[str, Any], param: str) -> None:
    reply = call(port, CHAT, asked(**more))
    assert (reply.status, reply.error["param"]) == (400, param), reply.body


def test_a_model_without_tools_says_so() -> None:
    models = Models({"plain": load})
    with models.load(models.first), running(Server(models, ServerSettings())) as port:
        reply = call(port, CHAT, asked(tools=[WEATHER]))
    assert (reply.status, reply.error["param"]) == (400, "tools")


def test_special_tokens_of_calls_stay_in_the_text(pipe: Pipeline) -> None:
    tokenizer = pipe.tokenizer
    end = "<end_of_utterance>"
    ids = [tokenizer.require_token_id(end), *tokenizer.encode("a large", add_special_tokens=False)]
    kept, plain = tokenizer.stream_decoder(kept=(end, "[NONE]")), tokenizer.stream_decoder()
    assert "".join(map(kept.add, ids)) + kept.flush() == end + tokenizer.decode(ids)
    assert "".join(map(plain.add, ids)) + plain.flush() == tokenizer.decode(ids)
