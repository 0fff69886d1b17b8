"""/v1/messages and /v1/responses: the same answers in other words."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.server import responses
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from tests.server.driving import Reply, call, running

SHAPES = Path(__file__).parents[2] / "examples" / "images" / "shapes.png"
DATA = base64.b64encode(SHAPES.read_bytes()).decode()
ASKED = "Describe the picture."


@pytest.fixture(scope="module")
def port(pipe: Pipeline) -> Iterator[int]:
    models = Models({"shapes": lambda: pipe})
    models.load(models.first)
    with running(Server(models, ServerSettings())) as port:
        yield port


def message(**more: Any) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": DATA}
    content = [{"type": "image", "source": source}, {"type": "text", "text": ASKED}]
    return {"max_tokens": 50, "messages": [{"role": "user", "content": content}], **more}


def items(**more: Any) -> dict[str, Any]:
    picture = {"type": "input_image", "image_url": f"data:image/png;base64,{DATA}"}
    content = [picture, {"type": "input_text", "text": ASKED}]
    return {"input": [{"role": "user", "content": content}], **more}


def events(reply: Reply) -> list[tuple[str, dict[str, Any]]]:
    """(the event's type, what it carries), of events that have one."""
    parts = [part.split("\n", 1) for part in reply.body.decode().strip().split("\n\n")]
    return [(kind[7:], json.loads(data[6:])) for kind, data in parts]


def test_messages_answer_as_the_pipeline_does(pipe: Pipeline, port: int) -> None:
    own = pipe.generate(ASKED, [SHAPES])
    told = call(port, "/v1/messages", message()).json
    assert told["content"] == [{"type": "text", "text": own.text.strip()}]
    assert (told["type"], told["role"], told["stop_reason"]) == ("message", "assistant", "end_turn")
    usage = told["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == own.usage.prompt_tokens
    assert usage["output_tokens"] == own.usage.completion_tokens
    counted = call(port, "/v1/messages/count_tokens", message()).json
    assert counted == {"input_tokens": own.usage.prompt_tokens}
    assert call(port, "/v1/messages", message(max_tokens=3)).json["stop_reason"] == "max_tokens"
    stopped = call(port, "/v1/messages", message(stop_sequences=["above", "none"])).json
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "above")
    assert stopped["content"][0]["text"].strip() == "a large red circle"


def test_messages_stream_in_anthropics_order(pipe: Pipeline, port: int) -> None:
    own = pipe.generate(ASKED, [SHAPES])
    told = events(call(port, "/v1/messages", message(stream=True)))
    assert [kind for kind, _ in told] == [data["type"] for _, data in told]
    kinds = [kind for kind, _ in told]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    text = "".join(data["delta"]["text"] for kind, data in told if kind == "content_block_delta")
    assert text == own.text.strip()
    assert told[0][1]["message"]["usage"]["input_tokens"] == own.usage.prompt_tokens
    assert told[-2][1]["delta"]["stop_reason"] == "end_turn"


def test_turns_with_tools_are_those_of_a_chat() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "K"}},
    ]
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "text", "text": "20"}],
    }
    from mlx_vlm_pipes.server.messages import _messages

    body = {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
        ],
    }
    call_ = {
        "id": "t1",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "K"}},
    }
    assert _messages(body) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant", "content": [{"type": "text", "text": "Let me see."}],
            "reasoning_content": "Hm.", "tool_calls": [call_],
        },
        {"role": "tool", "tool_call_id": "t1", "content": [{"type": "text", "text": "20"}]},
        {"role": "user", "content": [{"type": "text", "text": "So?"}]},
    ]  # fmt: skip


def test_responses_go_on_from_one_another(pipe: Pipeline, port: int) -> None:
    own = pipe.generate(ASKED, [SHAPES])
    first = call(port, "/v1/responses", items()).json
    assert first["output"][0]["content"][0]["text"] == own.text.strip()
    assert (first["status"], first["usage"]["input_tokens"]) == (
        "completed",
        own.usage.prompt_tokens,
    )
    assert call(port, f"/v1/responses/{first['id']}").json == first

    turns = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": own.text.strip()},
        {"role": "user", "content": "And?"},
    ]
    wanted = pipe.encode(turns, [SHAPES])
    asked = {"input": "And?", "previous_response_id": first["id"], "max_output_tokens": 2}
    second = call(port, "/v1/responses", asked).json
    assert second["usage"]["input_tokens"] == len(wanted.input_ids)
    assert second["status"] == "incomplete"
    assert second["incomplete_details"] == {"reason": "max_output_tokens"}
    unkept = call(port, "/v1/responses", items(store=False)).json
    assert call(port, f"/v1/responses/{unkept['id']}").status == 404
    assert call(port, "/v1/responses", {**asked, "previous_response_id": "x"}).status == 404


def test_responses_stream_their_items(pipe: Pipeline, port: int) -> None:
    own = pipe.generate(ASKED, [SHAPES])
    told = events(call(port, "/v1/responses", items(stream=True)))
    assert [data["sequence_number"] for _, data in told] == list(range(len(told)))
    kinds = [kind.removeprefix("response.") for kind, _ in told]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    text = "".join(data["delta"] for kind, data in told if kind.endswith("text.delta"))
    assert text == own.text.strip() == told[-4][1]["text"]
    assert told[-1][1]["response"]["output"] == [told[-2][1]["item"]]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_STORED_CHARACTERS", 100)
    store = responses.Store()
    for name in "abc":
        store.add([{"content": "x" * 40}], {"id": name})
    store.add([{"content": "x" * 101}], {"id": "large"})
    assert store.response("c") == {"id": "c"}
    for gone in ("a", "large"):
        with pytest.raises(Exception, match="is kept here"):
            store.response(gone)


FROG = {"type": "frog"}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": []}, "max_tokens"),
    ("messages", message(stop_sequences=5), "stop_sequences"),
    ("messages", message(top_k=0), "top_k"),
    ("messages", message(thinking={"type": "enabled", "budget_tokens": 5}), "thinking"),
    ("messages", message(tools=[{"name": "f"}]), "tools"),
    ("messages", message(tool_choice={"type": []}), "tool_choice"),
    ("messages", message(modalities=["audio"]), "modalities"),
    ("messages", message(output_config={"format": {"type": "json_schema"}}), "output_config"),
    ("messages", message(output_config={"format": [5]}), "output_config"),
    ("messages", message(output_config={"format": FROG}), "output_config"),
    ("messages", message(output_config={"colour": 1}), "output_config"),
    ("messages", message(max_completion_tokens=5), "max_completion_tokens"),
    ("messages", message(max_tokens=5000), "messages"),
    ("messages", message(adapter="mine"), "adapter"),
    ("messages", {"max_tokens": 5, "messages": [{"role": "system", "content": "x"}]}, "messages"),
    ("messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [{}]}]}, "messages"),
    ("responses", {"input": 5}, "input"),
    ("responses", items(max_output_tokens=0), "max_output_tokens"),
    ("responses", items(background=True), "background"),
    ("responses", items(text={"format": {"type": "json_schema"}}), "text"),
    ("responses", items(text={"format": "json"}), "text"),
    ("responses", items(text={"format": {"type": "json_schema", "schema": FROG}}), "text"),
    ("responses", items(max_output_tokens=5000), "input"),
    ("responses", items(reasoning={"effort": "most"}), "reasoning"),
    ("responses", items(reasoning={"summary": "detailed"}), "reasoning"),
    ("responses", items(reasoning="high"), "reasoning"),
    ("responses", items(truncation="auto"), "truncation"),
    ("responses", {"input": [{"type": "computer_call"}]}, "input"),
    ("responses", items(tools=[{"type": "web_search"}]), "tools"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_a_400_that_names_it(
    port: int, path: str, body: dict[str, Any], param: str
) -> None:
    reply = call(port, f"/v1/{path}", body)
    assert (reply.status, reply.error["param"]) == (400, param), reply.body
    assert (reply.json.get("type") == "error") == (path == "messages")


def test_a_message_in_a_form(port: int) -> None:
    schema = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 2}
    form = {"type": "json_schema", "schema": schema}
    asked = message(output_config={"format": form}, max_tokens=100, cache_control={"type": "x"})
    told = call(port, "/v1/messages", asked).json
    assert set(json.loads(told["content"][0]["text"])) <= {"red", "blue"}


def test_a_dialects_own_name_stands_in_the_sentence(port: int) -> None:
    for path, body, words in (
        ("messages", message(stop_sequences=5), "stop_sequences is 5, expected"),
        ("responses", items(max_output_tokens=0), "max_output_tokens is 0, expected"),
        ("responses", items(input=[]), "input is no list"),
    ):
        assert call(port, f"/v1/{path}", body).error["message"].startswith(words)
    assert call(port, "/v1/messages", message(seed=1, min_p=0.1)).status == 200
