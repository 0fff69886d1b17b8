"""How much a model is asked to think, in each dialect, for families that can be told and others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlx_vlm_pipes.processing.chat_template import ChatTemplate
from mlx_vlm_pipes.server.chat import read_chat
from mlx_vlm_pipes.server.errors import ApiError
from mlx_vlm_pipes.server.messages import read_messages
from mlx_vlm_pipes.server.responses import Store, read_response
from mlx_vlm_pipes.server.settings import ServerSettings

PLAIN = "{{ messages }}"
SWITCHED = PLAIN + "{% if enable_thinking %}<think>{% endif %}"  # as Qwen3
ALWAYS = PLAIN + "<think>"  # as Qwen3-Thinking
LEVELS = PLAIN + "{{ reasoning_effort }}"  # as gpt-oss
TURNS = [{"role": "user", "content": "Who?"}]
Reading = tuple[Any, Any]  # of enable_thinking or reasoning_effort, and thinking_budget


def read(path: str, body: dict[str, Any], template: str, *, can_close: bool = True) -> Reading:
    known = {"</think>": 5} if can_close else {}
    tokenizer: Any = SimpleNamespace(
        chat_template=ChatTemplate(template, "a test"), tool_template=None, token_id=known.get
    )
    settings = ServerSettings()
    if path == "chat":
        question, _ = read_chat({"messages": TURNS, **body}, tokenizer, settings)
    elif path == "messages":
        asked = {"messages": TURNS, "max_tokens": 9, **body}
        question, _ = read_messages(asked, tokenizer, settings)
    else:
        question, *_ = read_response({"input": "Who?", **body}, Store(), tokenizer, settings)
    (variable,) = question.reading.get("chat_template_kwargs", {"": None}).values()
    return variable, question.options.get("thinking_budget")


@pytest.mark.parametrize(
    ("template", "effort", "told"),
    [
        (SWITCHED, "none", (False, None)),
        (SWITCHED, "minimal", (False, None)),
        (SWITCHED, "low", (True, 1024)),
        (SWITCHED, "high", (True, None)),
        (ALWAYS, "none", (None, 0)),
        (ALWAYS, "medium", (None, 2048)),
        (ALWAYS, "high", (None, None)),
        (LEVELS, "low", ("low", None)),
        (PLAIN, "none", (None, None)),
        (PLAIN, "high", (None, None)),
    ],
)
def test_an_effort_is_what_the_family_knows(template: str, effort: str, told: Reading) -> None:
    assert read("chat", {"reasoning_effort": effort}, template) == told
    asked = {"effort": effort, "summary": "auto"}
    assert read("responses", {"reasoning": asked}, template) == told


def test_what_a_request_says_itself_stands_before_its_effort() -> None:
    own = {"thinking_budget": 7, "chat_template_kwargs": {"enable_thinking": False}}
    assert read("chat", {"reasoning_effort": "low", **own}, SWITCHED) == (False, 7)
    assert read("chat", {"reasoning_effort": "low"}, SWITCHED, can_close=False) == (True, None)


@pytest.mark.parametrize(
    ("template", "thinking", "told"),
    [
        (SWITCHED, {"type": "enabled", "budget_tokens": 2000}, (True, 2000)),
        (SWITCHED, {"type": "adaptive"}, (True, None)),
        (SWITCHED, {"type": "disabled"}, (False, None)),
        (ALWAYS, {"type": "enabled", "budget_tokens": 2000}, (None, 2000)),
        (ALWAYS, {"type": "disabled"}, (None, 0)),
        (PLAIN, {"type": "disabled"}, (None, None)),
    ],
)
def test_anthropics_thinking(template: str, thinking: dict[str, Any], told: Reading) -> None:
    assert read("messages", {"thinking": thinking}, template) == told


def test_anthropics_effort_is_of_the_thinking_that_is_asked_for() -> None:
    effort = {"output_config": {"effort": "low"}}
    assert read("messages", effort, SWITCHED) == (None, None)
    assert read("messages", {**effort, "thinking": {"type": "adaptive"}}, SWITCHED) == (True, 1024)
    enabled = {"type": "enabled", "budget_tokens": 50}
    assert read("messages", {**effort, "thinking": enabled}, SWITCHED) == (True, 50)


@pytest.mark.parametrize(
    ("path", "body", "param", "template"),
    [
        ("chat", {"reasoning_effort": ["low"]}, "reasoning_effort", SWITCHED),
        ("chat", {"reasoning_effort": "none"}, "reasoning_effort", ALWAYS),
        ("responses", {"reasoning": {"effort": "none"}}, "reasoning", ALWAYS),
        ("messages", {"thinking": {"type": "disabled"}}, "thinking", ALWAYS),
        ("messages", {"thinking": {"type": "enabled"}}, "thinking", PLAIN),
        ("messages", {"thinking": {"type": []}}, "thinking", SWITCHED),
        ("messages", {"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking", SWITCHED),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name(
    path: str, body: dict[str, Any], param: str, template: str
) -> None:
    with pytest.raises(ApiError) as refused:
        read(path, body, template, can_close=False)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert refused.value.message.startswith(param)
